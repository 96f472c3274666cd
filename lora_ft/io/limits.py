"""Work that a stranger's file asks for, ended when it runs away. No torch here.

with limits.bounded("the chat template of owner/name"):      # SecurityError after 5 s, or 1 GiB more memory
    text = template.render(...)

A template can loop without end, or double a text forty times; Jinja's sandbox stops neither. The time is the
processor's, so that a busy machine is no reason; it is watched by a signal, which only the main thread can have.
The memory is the kernel's limit on the address space (Linux), which an allocation meets before it succeeds.
"""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lora_ft.errors import SecurityError

SECONDS = 5.0
NUM_BYTES = 2**30

_AGAIN = 0.1  # seconds: what swallows one exception meets the next


class _OutOfTime(BaseException):
    """Not an Exception, which templates' and libraries' own handlers would take for theirs."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Run a block for at most SECONDS of processor time and NUM_BYTES of new memory; SecurityError names `what`."""
    try:
        with _time(), _memory():
            yield
    except _OutOfTime:
        raise SecurityError(f"{what} did not come to an end within {SECONDS:g} s") from None
    except MemoryError:
        raise SecurityError(f"{what} asked for more than {NUM_BYTES // 2**20:,} MiB of memory") from None
    except RecursionError:
        raise SecurityError(f"{what} calls itself without end, or is nested too deeply") from None


@contextlib.contextmanager
def _time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)  # a template's rendering takes 20 us, pathlib's reading half
    pages = int(os.read(descriptor, 64).split()[0])
    os.close(descriptor)
    limit = pages * resource.getpagesize() + NUM_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
