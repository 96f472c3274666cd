"""A replacement of `os` for io/durable.py that counts and records disk operations and makes one of them fail.

durable.os = Shim(Fault(7, "kill"))     # SIGKILL instead of the seventh operation
durable.os = Shim()                     # nothing fails; `unsafe(shim.trace)` checks the order of fsyncs
"""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "makedirs", "rmdir", "ftruncate", "fchmod")
_NEED_SPACE = ("open", "write", "mkdir", "makedirs")


@dataclass(frozen=True)
class Fault:
    """A fault at operation number `at`, counted from 1.

    kill: SIGKILL; a write is half done.
    full: no space left, from then on for every operation that needs space; a write is half done.
    broken: one input/output error.
    """

    at: int
    kind: str


@dataclass(frozen=True)
class Change:
    """A completed operation; a rename also has its target and the files that it moved."""

    name: str
    path: str
    to: str = ""
    files: tuple[str, ...] = ()


class Shim:
    """The module `os` with counted changes; fsync is counted but not done, to save time."""

    def __init__(self, fault: Fault | None = None, watch: Callable[[], None] = lambda: None) -> None:
        self.count, self.trace = 0, list[Change]()
        self._fault, self._watch, self._paths = fault, watch, dict[int, str]()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            changes = name != "open" or arguments[1] & os.O_CREAT
            if changes:
                self.count += 1
                self._fail(name, arguments)
                self._record(name, arguments)
            if name == "fsync":
                return None
            result = real(*arguments, **options)
            if name == "open":
                self._paths[result] = str(arguments[0])
            self._watch()
            return result

        return call

    def _fail(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self._fault is None or self.count < self._fault.at:
            return
        kind, first = self._fault.kind, self.count == self._fault.at
        if first and name == "write" and kind in ("kill", "full"):
            os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if first and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif first and kind == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif kind == "full" and (first or name in _NEED_SPACE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _record(self, name: str, arguments: tuple[Any, ...]) -> None:
        path = self._paths[arguments[0]] if isinstance(arguments[0], int) else str(arguments[0])
        if name in ("rename", "replace"):
            files = tuple(str(file) for file in _tree(Path(path)) if file.is_file())
            self.trace.append(Change("rename", path, str(arguments[1]), files))
        else:
            self.trace.append(Change(name, path))


def _tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


def unsafe(trace: list[Change]) -> list[str]:
    """Return one sentence for each loss that a power failure could cause if only fsynced data survives; [] if none.

    Before a rename, the file, or every file and folder in the folder, must be fsynced. After it, the parent must be
    fsynced before anything is removed and before the end. The metrics of a run must be on the disk under their name
    before a checkpoint is renamed to its final name.
    """
    problems: list[str] = []
    synced: set[str] = set()  # files whose content is on the disk
    unnamed: set[str] = set()  # folders with an entry that a power failure could undo
    moved: set[str] = set()  # those of them in which something was renamed
    for number, change in enumerate(trace, 1):
        operation, parent = f"operation {number}, {change.name} {change.path}", str(Path(change.path).parent)
        match change.name:
            case "write" | "ftruncate" | "fchmod":
                synced.discard(change.path)
            case "fsync":
                synced.add(change.path)
                unnamed.discard(change.path)
                moved.discard(change.path)
            case "open" | "mkdir" | "makedirs":
                synced.discard(change.path)
                unnamed.add(parent)
                if change.name == "makedirs":  # like a rename: the name is final
                    moved.add(parent)
            case "unlink" | "rmdir":
                problems += [f"{operation}: before the renames in {folder} are on the disk" for folder in sorted(moved)]
                unnamed.add(parent)
            case "rename":
                is_discarded = ".old-" in change.to  # about to be removed, so its content does not matter
                if not is_discarded:
                    problems += [
                        f"{operation}: {file} is not on the disk" for file in change.files if file not in synced
                    ]
                    below = [f for f in unnamed if f == change.path or f.startswith(change.path + "/")]
                    problems += [f"{operation}: names in {folder} are not on the disk" for folder in sorted(below)]
                if Path(parent).name == "checkpoints" and not is_discarded:
                    run = str(Path(parent).parent)
                    metrics = f"{run}/metrics.jsonl"
                    if run in unnamed or (metrics not in synced and any(c.path == metrics for c in trace[:number])):
                        problems.append(f"{operation}: {metrics} is not on the disk")
                for file in change.files:
                    if file in synced:
                        synced.add(change.to + file.removeprefix(change.path))
                unnamed.add(parent)
                moved |= {parent, str(Path(change.to).parent)}
    problems += [f"at the end: a name in {folder} is not on the disk" for folder in sorted(moved)]
    return problems
