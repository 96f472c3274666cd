"""SIGINT and SIGTERM: the first lets the running step end and its state be saved, a second stops at once.

    with on_signals() as stop:
        fit(learners, observe, stop)       # after each step: stop.signum

Outside the steps (while the base loads, while base and adapter are compared) nothing is half done that a checkpoint
could keep, so that the first signal stops at once there.
"""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator

from lora_ft.errors import Interrupted

_STDERR = 2


class Stop:
    """What a signal asked for: `signum` is None until one came between `fit`'s first and last step."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._can_wait = False

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """While this lasts, somebody looks at `signum` after every step."""
        self._can_wait = True
        try:
            yield
        finally:
            self._can_wait = False

    def ask(self, signum: int, _frame: types.FrameType | None = None) -> None:
        """The signals' handler."""
        name = signal.Signals(signum).name
        if self.signum is not None or not self._can_wait:
            raise Interrupted(signum, f"stopped by {name}")
        self.signum = signum
        # Not through sys.stderr: a signal may come while it is being written to. Ctrl-C ends `| tee log` as well.
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"\n{name}: this step, then a checkpoint; again to stop now\n".encode())


def replaceable() -> list[signal.Signals]:
    """Return which of SIGINT and SIGTERM this thread can handle, and give back later."""
    if threading.current_thread() is not threading.main_thread():
        return []
    kept = (signal.SIG_IGN, None)  # None: a handler that is not Python's, which could not be given back
    return [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in kept]


@contextlib.contextmanager
def handled_by(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Let a handler receive the replaceable ones of SIGINT and SIGTERM until the block ends."""
    before = {signum: signal.signal(signum, handler) for signum in replaceable()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Let a Stop receive SIGINT and SIGTERM until the block ends.

    A signal that the process was started to ignore (SIGINT, in the background of a script) stays ignored. In another
    thread than the main one, where Python sets no handlers, nothing is received.
    """
    stop = Stop()
    with handled_by(stop.ask):
        yield stop
