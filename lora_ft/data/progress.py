"""Progress of reading and tokenizing: a line in a terminal while it takes more than a second.

reading rows  120,000  23,100 rows/s
tokenizing rows  240,000 of 1,000,000  9,800 rows/s  1:18 left
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

Found = TypeVar("Found")
Show = Callable[[str], None]

_FIRST_SECONDS, _SECONDS_BETWEEN = 1.0, 0.2
_displays: list[Show] = []  # of commands that have a line of their own; the last one shows


@contextlib.contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Let `show` display the progress until the block ends, instead of a line of its own; "" clears it."""
    _displays.append(show)
    try:
        yield
    finally:
        _displays.remove(show)


def counted(
    what: str, chunks: Iterable[Found], rows: Callable[[Found], int], total: int | None = None
) -> Iterator[Found]:
    """Yield chunks and show how many rows they had so far."""
    started = last = time.monotonic()
    count = 0
    with contextlib.ExitStack() as stack:
        show: Show | None = None
        for chunk in chunks:
            yield chunk
            count += rows(chunk)
            now = time.monotonic()
            if now - started >= _FIRST_SECONDS and now - last >= _SECONDS_BETWEEN:
                if show is None:
                    show = stack.enter_context(_display())
                show(_line(what, count, total, now - started))
                last = now


def _line(what: str, count: int, total: int | None, seconds: float) -> str:
    rate = count / seconds
    left = "" if total is None else f"  {(total - count) / rate // 60:.0f}:{(total - count) / rate % 60:02.0f} left"
    return f"{what}  {count:,}{f' of {total:,}' if total else ''}  {rate:,.0f} rows/s{left}"


@contextlib.contextmanager
def _display() -> Iterator[Show]:
    console = Console(stderr=True)
    if _displays:
        yield _displays[-1]
        _displays[-1]("")
    elif console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda line: live.update(Text(line), refresh=True)
    else:
        yield lambda line: None
