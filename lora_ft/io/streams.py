"""Make stdin, stdout and stderr usable for a command, whatever they are connected to. No torch here.

    with streams.usable():       a closed stream                         /dev/null takes its place
                                 an encoding without a character         stdout gets '?', stderr an escape
                                 a terminal that was closed              the rest is written nowhere
                                 a full disk behind stdout               ResourceError

A reader of stdout that leaves is a BrokenPipeError, as always: entry.py ends the command with exit code 141.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from lora_ft.errors import ResourceError

_GONE = {errno.EIO, errno.ENXIO, errno.EBADF}  # a terminal that hung up
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAMES = ("stdin", "stdout", "stderr")


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """Replace the three streams until the block ends; their encodings stay, and errors of encoding are restored."""
    _open_missing()
    before = sys.stdin, sys.stdout, sys.stderr
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None:  # closed when the process began
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    handlings = [(stream, stream.errors) for stream in (sys.stdin, sys.stdout) if isinstance(stream, io.TextIOWrapper)]
    try:
        for stream, handling in handlings:
            if handling in ("strict", "surrogateescape"):  # the second: of the locale C
                stream.reconfigure(errors="replace")
        sys.stdout, sys.stderr = lasting(sys.stdout, is_result=True), lasting(sys.stderr)
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream, handling in handlings:
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile, or a flush that fails
                stream.reconfigure(errors=handling)


def lasting(stream: TextIO, *, is_result: bool = False) -> TextIO:
    """Return a stream that goes on, into nothing, after its terminal is gone; results need a reader or a disk."""
    return cast(TextIO, _Lasting(stream, is_result=is_result))


def _open_missing() -> None:
    """Open /dev/null for descriptors 0 to 2 that are closed; a file opened later would get their number."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


class _Lasting:
    """A text stream whose writes do not fail if they reach nobody."""

    def __init__(self, stream: TextIO, *, is_result: bool) -> None:
        self._stream, self._is_result = stream, is_result

    def write(self, text: str, /) -> int:
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def writelines(self, lines: Iterable[str], /) -> None:
        for line in lines:
            self.write(line)

    def _do(self, name: str, *arguments: str) -> None:
        try:
            getattr(self._stream, name)(*arguments)
        except OSError as error:
            if self._is_result and error.errno in _FULL:
                self._drop()
                raise ResourceError(f"standard output cannot be written: {error.strerror}") from None
            if error.errno not in _GONE and (self._is_result or error.errno not in _FULL | {errno.EPIPE}):
                raise
            self._drop()

    def _drop(self) -> None:
        """Connect the descriptor to /dev/null, so that neither the buffer nor a library fails at the end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
