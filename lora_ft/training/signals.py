"""Signals that end a run: the current step is finished and a checkpoint saved.

    SIGINT, SIGTERM               a second one of these stops at once
    SIGHUP, SIGUSR1, SIGUSR2      a closed terminal, and the notices of schedulers; repeated ones change nothing

    with on_signals() as stop:
        fit(state, callbacks, stop)       # checks stop.signum after each step

Outside of training steps (loading the base, comparing base and adapter) the first signal stops at once.
"""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence

from lora_ft.errors import Interrupted

_STDERR = 2
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
# Windows has none of these.
_NOTICES = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
STOPPING: tuple[signal.Signals, ...] = (*_INSISTENT, *_NOTICES)


def stops_at_once(received: Sequence[int]) -> bool:
    """Return True if the signals received so far, in this order, ask to stop without finishing the step."""
    return len([signum for signum in received if signum in _INSISTENT]) > 1


class Stop:
    """The first signal received during training steps; `signum` is None before it.

    tells: write to stderr what happens next; one of several ranks does.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self._tells = tells
        self._received: list[int] = []
        self._can_wait = False

    @property
    def signum(self) -> int | None:
        return self._received[0] if self._received else None

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Until the block ends, a first signal only sets `signum`, which the caller checks after every step."""
        self._can_wait = True
        try:
            yield
        finally:
            self._can_wait = False

    def ask(self, signum: int, _frame: types.FrameType | None = None) -> None:
        """Handle a signal; raises Interrupted for a second SIGINT or SIGTERM, and outside of training steps."""
        name = signal.Signals(signum).name
        self._received.append(signum)
        if not self._can_wait or stops_at_once(self._received):
            raise Interrupted(signum, f"stopped by {name}")
        if len(self._received) > 1 or not self._tells:
            return
        again = "; send it again to stop now" if signum in _INSISTENT else ""
        # Not sys.stderr, which may be in the middle of a write. Ctrl-C also ends the reader of a pipe (`| tee log`).
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"\n{name}: finishing this step and saving a checkpoint{again}\n".encode())


def replaceable() -> list[signal.Signals]:
    """Return those of STOPPING whose handlers this thread can replace and restore."""
    if threading.current_thread() is not threading.main_thread():
        return []
    kept = (signal.SIG_IGN, None)  # None: a handler not set from Python, which could not be restored
    return [s for s in STOPPING if signal.getsignal(s) not in kept]


@contextlib.contextmanager
def handled_by(handler: Callable[[int, types.FrameType | None], None]) -> Iterator[None]:
    """Handle STOPPING with `handler` until the block ends; signals that cannot be restored are skipped."""
    before = {signum: signal.signal(signum, handler) for signum in replaceable()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextlib.contextmanager
def on_signals(*, tells: bool = True) -> Iterator[Stop]:
    """Yield a Stop that receives the signals until the block ends.

    A signal that the process ignores from its start (SIGINT of a background job, SIGHUP with nohup) stays ignored.
    Outside of the main thread, where Python cannot set handlers, no signal is received.
    """
    stop = Stop(tells=tells)
    with handled_by(stop.ask):
        yield stop
