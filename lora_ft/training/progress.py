"""Progress display of a training run: a live line in a terminal or notebook, plain lines elsewhere.

    step   42/180  loss 2.114  eval loss 2.305  lr 1.8e-04  norm 0.91  143 tokens/s  1.9 GB  3:12 left

Messages and progress go to stderr and to log.txt of the run; stdout is for results.
"""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_ft import runs
from lora_ft.data.progress import shown_by as rows_shown_by
from lora_ft.io import durable, streams
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.metrics import peak_memory_bytes
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

_SECONDS_BETWEEN_LINES = 2.0


class Progress(Callback):
    """Shows one line per step, replaced in a terminal, appended elsewhere."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console, self._live = console, live
        self._last_shown = 0.0

    def on_step(self, state: TrainingState, metrics: Metrics) -> None:
        self._show(state, metrics)
        if state.is_done and not state.unread and self._live:  # keeps the last line on the screen
            self._live.stop()

    def on_evaluate(self, state: TrainingState, metrics: Metrics) -> None:
        if "lr" not in metrics:  # not part of a step that is shown already
            self._show(state, metrics)

    def _show(self, state: TrainingState, metrics: Metrics) -> None:
        line = _line(state, metrics)
        log.debug(line)
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif "eval_loss" in metrics or time.monotonic() - self._last_shown >= _SECONDS_BETWEEN_LINES:
            self._console.print(Text(line), soft_wrap=True)
            self._last_shown = time.monotonic()


class LogFile(logging.Handler):
    """Appends messages and steps to log.txt of a run; each line is on disk before training continues."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.DEBUG)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        durable.append_line(self._folder / runs.LOG, f"{time.strftime('%H:%M:%S')} {record.getMessage()}")


def _line(state: TrainingState, metrics: Metrics) -> str:
    step, num_steps = metrics["step"], len(state.steps)
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    if state.evaluations:
        last = state.evaluations[-1]
        measured = "" if last.step == step else f" (step {last.step})"
        sources = ", ".join(f"{name} {loss:.3f}" for name, loss in last.result.losses.items())
        parts.append(f"eval loss {last.result.loss:.3f}{f' ({sources})' if sources else ''}{measured}")
        parts += [f"{name} {last.value(name):.3f}" for name in state.task.names if name in last.result.metrics]
    if "lr" in metrics:
        left = state.seconds / step * (num_steps - step)
        parts += [
            f"lr {metrics['lr']:.1e}",
            f"norm {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_second']:.0f} tokens/s",
            f"{left // 60:.0f}:{left % 60:02.0f} left",
        ]
    parts.append(f"{peak_memory_bytes(state.base.device) / 1e9:.1f} GB")
    return "  ".join(parts)


def live_on(console: Console) -> Live | None:
    """Return a live display for a terminal or a notebook (where rich needs ipywidgets), None for plain output."""
    is_live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return Live(console=console, transient=False, auto_refresh=False) if is_live else None


@contextlib.contextmanager
def displayed(folder: Path) -> Iterator[Progress]:
    """Show progress and the messages of lora_ft until the block ends, and write both to log.txt."""
    console = Console(file=streams.lasting(sys.stderr))
    # rich would exit when the reader of a pipe is gone; training continues.
    console.on_broken_pipe = functools.partial(setattr, console, "quiet", True)  # type: ignore[method-assign]
    live = live_on(console)
    handlers = [_ConsoleHandler(console), LogFile(folder)]
    level = log.level
    log.setLevel(logging.DEBUG)
    for handler in handlers:
        log.addHandler(handler)
    try:
        with live or contextlib.nullcontext(), rows_shown_by(_shown_by(live)):
            yield Progress(console, live)
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)


def _shown_by(live: Live | None) -> Callable[[str], None]:
    return (lambda line: live.update(Text(line), refresh=True)) if live else (lambda line: None)


class _ConsoleHandler(logging.Handler):
    """Prints messages above the live line, as plain text without markup."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(record.getMessage()), soft_wrap=True)
