"""Files that somebody might hand to lora-ft with bad intent, made when the tests run; no blob of them lies in git.

Each attack builds its files in a folder, hands them to the function that a command would, and says how that must end.
`outside` holds what a path or link may lead to, and is watched by the kernel: whoever opens a file there is seen,
whatever language he is written in. `canary` is a file that only code of the attacker's would make.
"""

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_ft.errors import LoraFtError


@dataclass(frozen=True)
class Place:
    """Where an attack is laid out: the folder that is handed over, what lies outside of it, and the canary."""

    folder: Path
    outside: Path
    canary: Path

    def plant_code(self, path: Path) -> None:
        """A Python file that leaves the canary when it is imported."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(self.canary)!r}, 'w')\n")

    def pickle(self) -> bytes:
        """A pickle that leaves the canary when it is loaded: open(canary, 'w'), in the oldest protocol."""
        return f"cbuiltins\nopen\n(S{str(self.canary)!r}\nS'w'\ntR.".encode()


@dataclass(frozen=True)
class Attack:
    """What is built and handed over, and the error it must end with; None: it is read as if it were not there."""

    name: str
    build: Callable[[Place], None]
    run: Callable[[Place], object]
    error: type[LoraFtError] | None
    says: str = ""


@contextlib.contextmanager
def opened_in(folder: Path) -> Iterator[list[str]]:
    """The names of the files of a folder that anything opens during the block, as the kernel reports them (Linux)."""
    names: list[str] = []
    if sys.platform != "linux":
        yield names
        return
    libc = ctypes.CDLL(None, use_errno=True)
    in_open = 0x20
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0
    assert libc.inotify_add_watch(watch, os.fsencode(folder), in_open) >= 0
    try:
        yield names
        with contextlib.suppress(BlockingIOError):
            while data := os.read(watch, 65536):
                while data:
                    length = struct.unpack_from("iIII", data)[3]
                    names.append(data[16 : 16 + length].rstrip(b"\0").decode())
                    data = data[16 + length :]
    finally:
        os.close(watch)
