"""SIGINT and SIGTERM: the first finishes the current step and saves a checkpoint, the second stops at once.

    with on_signals() as stop:
        fit(state, callbacks, stop)       # checks stop.signum after each step

Outside of training steps (loading the base, comparing base and adapter) the first signal stops at once.
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
    """The signal received during training steps; `signum` is None until then."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._can_wait = False

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Until the block ends, a first signal only sets `signum`, which the caller checks after every step."""
        self._can_wait = True
        try:
            yield
        finally:
            self._can_wait = False

    def ask(self, signum: int, _frame: types.FrameType | None = None) -> None:
        """Handle a signal; raises Interrupted for a second one, and outside of training steps."""
        name = signal.Signals(signum).name
        if self.signum is not None or not self._can_wait:
            raise Interrupted(signum, f"stopped by {name}")
        self.signum = signum
        # Not sys.stderr, which may be in the middle of a write. Ctrl-C also ends the reader of a pipe (`| tee log`).
        with contextlib.suppress(OSError):
            os.write(
                _STDERR, f"\n{name}: finishing this step and saving a checkpoint; send it again to stop now\n".encode()
            )


def replaceable() -> list[signal.Signals]:
    """Return those of SIGINT and SIGTERM whose handlers this thread can replace and restore."""
    if threading.current_thread() is not threading.main_thread():
        return []
    kept = (signal.SIG_IGN, None)  # None: a handler not set from Python, which could not be restored
    return [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in kept]


@contextlib.contextmanager
def handled_by(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler` until the block ends; signals that cannot be restored are skipped."""
    before = {signum: signal.signal(signum, handler) for signum in replaceable()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Yield a Stop that receives SIGINT and SIGTERM until the block ends.

    A signal that the process ignores from its start (SIGINT of a background job) stays ignored. Outside of the main
    thread, where Python cannot set handlers, no signal is received.
    """
    stop = Stop()
    with handled_by(stop.ask):
        yield stop
