"""Malicious input files for lora-ft, built when the tests run; none of them is stored in git.

Each attack builds its files in a folder, passes them to the function that a command would call, and names the error
that must follow. `outside` holds the targets of paths and links; the kernel reports every file opened there, from any
language. `canary` is a file that only the attacker's code would create.
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
class Paths:
    """Paths of an attack: the folder that lora-ft gets, a folder outside it, and the canary."""

    folder: Path
    outside: Path
    canary: Path

    def plant_code(self, path: Path) -> None:
        """Write a Python file that creates the canary when it is imported."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(self.canary)!r}, 'w')\n")

    def pickle(self) -> bytes:
        """Return a pickle that creates the canary when it is loaded: open(canary, 'w'), in the oldest protocol."""
        return f"cbuiltins\nopen\n(S{str(self.canary)!r}\nS'w'\ntR.".encode()


@dataclass(frozen=True)
class Attack:
    """An attack and the error that it must raise; None if its files are ignored without an error."""

    name: str
    build: Callable[[Paths], None]
    run: Callable[[Paths], object]
    error: type[LoraFtError] | None
    says: str = ""


@contextlib.contextmanager
def opened_in(folder: Path) -> Iterator[list[str]]:
    """Collect the names of files in a folder that are opened during the block, as reported by inotify (Linux only)."""
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
