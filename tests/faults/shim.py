"""An `os` for io/durable.py that counts disk operations, lets one of them fail, and keeps a record.

durable.os = Shim(Fault(7, "kill"))     # the process ends by SIGKILL in the place of its seventh change
durable.os = Shim()                     # nothing fails; shim.trace is what was done, for `unsafe` to judge
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
    """What happens at the change number `at`, counted from 1.

    kill: the process ends; a write is half done then.
    full: the disk is full, and stays so for whatever needs space; a write is half done then.
    broken: input/output error, once.
    """

    at: int
    kind: str


@dataclass(frozen=True)
class Change:
    """A change that was done (or an fsync): `path`, for a rename where it went, and the files that were in it then."""

    name: str
    path: str
    to: str = ""
    files: tuple[str, ...] = ()


class Shim:
    """Everything of `os`, its changes counted; fsync is only counted, as no test here cuts the power."""

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
        place = self._paths[arguments[0]] if isinstance(arguments[0], int) else str(arguments[0])
        if name in ("rename", "replace"):
            files = tuple(str(path) for path in _tree(Path(place)) if path.is_file())
            self.trace.append(Change("rename", place, str(arguments[1]), files))
        else:
            self.trace.append(Change(name, place))


def _tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


def unsafe(trace: list[Change]) -> list[str]:
    """What a power failure could spoil if only what was fsynced were kept: sentences, none where the order is right.

    A rename must find the file, or every file and folder below it, fsynced since the last change, and its parent must
    be fsynced before anything is removed for it and before the end. What a checkpoint counts on, the run's metrics,
    must be on the disk with their name before the checkpoint gets its own.
    """
    found: list[str] = []
    synced: set[str] = set()  # files whose bytes are on the disk
    unnamed: set[str] = set()  # folders with an entry that a power failure could take back
    moved: set[str] = set()  # of these, those where something was renamed
    for number, change in enumerate(trace, 1):
        where, parent = f"operation {number}, {change.name} {change.path}", str(Path(change.path).parent)
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
                if change.name == "makedirs":  # as a rename: here is the name that stays
                    moved.add(parent)
            case "unlink" | "rmdir":
                found += [f"{where}: before the renames in {folder} are on the disk" for folder in sorted(moved)]
                unnamed.add(parent)
            case "rename":
                aside = ".old-" in change.to  # on its way out: what is in it does not matter any more
                if not aside:
                    found += [f"{where}: {file} is not on the disk" for file in change.files if file not in synced]
                    below = [f for f in unnamed if f == change.path or f.startswith(change.path + "/")]
                    found += [f"{where}: names in {folder} are not on the disk" for folder in sorted(below)]
                if Path(parent).name == "checkpoints" and not aside:
                    run = str(Path(parent).parent)
                    metrics = f"{run}/metrics.jsonl"
                    if run in unnamed or (metrics not in synced and any(c.path == metrics for c in trace[:number])):
                        found.append(f"{where}: {metrics} is not on the disk")
                for file in change.files:
                    if file in synced:
                        synced.add(change.to + file.removeprefix(change.path))
                unnamed.add(parent)
                moved |= {parent, str(Path(change.to).parent)}
    found += [f"at the end: a name in {folder} is not on the disk" for folder in sorted(moved)]
    return found
