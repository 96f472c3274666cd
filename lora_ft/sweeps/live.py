"""Show all jobs of a sweep while they run, in one display of the parent process, from their files. No torch here.

    job               state      step   loss  eval loss  best  tokens/s
      0  adapter.r=4  finished  40/40  2.114     2.305  2.305       143
      1  adapter.r=8  running   12/40  2.290     2.410  2.410       139
      2  adapter.r=16 waiting
    1 finished, 1 running, 1 left; 2:31 so far, about 5 min left

If stderr is not a terminal: one line per change of a job's state, and a summary line every half minute.
"""

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_ft import runs
from lora_ft.io import streams
from lora_ft.sweeps import results
from lora_ft.sweeps.executors.interface import Handle
from lora_ft.sweeps.jobs import Job
from lora_ft.sweeps.results import JobResult, State

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_STYLES = {"running": "bold", "loading": "bold", "failed": "red", "unreadable": "red", "waiting": "dim",
           "stopped": "yellow", "finished": "green"}  # fmt: skip
_FAILED = ("failed", "unreadable")
_ENDED = (*_FAILED, "stopped", "finished")
_OTHER_LINES = 4  # of a terminal: the header, the number of jobs left out, the summary, the cursor
_LEAST_SECONDS, _LEAST_PART = 15.0, 0.05  # of a sweep, before its end is estimated


@dataclass(frozen=True)
class View:
    """One job now: waiting, loading, running, finished, stopped, failed or unreadable."""

    job: Job
    state: str
    result: JobResult


@contextlib.contextmanager
def displayed(jobs: list[Job], left: list[Job]) -> Iterator[Callable[[Sequence[Handle]], None]]:
    """Show the jobs of a sweep until the block ends; `left` are those that the sweep will run.

    Call the yielded function often, with the running workers: it updates the display at most once a second. The sweep
    continues if the reader of stderr closes it.
    """
    console = Console(file=streams.lasting(sys.stderr))
    console.on_broken_pipe = functools.partial(setattr, console, "quiet", True)  # type: ignore[method-assign]
    live = Live(console=console, transient=False, auto_refresh=False) if console.is_terminal else None
    display = _Display(jobs, left, console, live)
    with live or contextlib.nullcontext():
        try:
            yield display
        finally:
            display.show([])


class _Display:
    def __init__(self, jobs: list[Job], left: list[Job], console: Console, live: Live | None) -> None:
        self._jobs, self._console, self._live = jobs, console, live
        self._titles = titles(jobs)
        # A finished run that is to train for longer keeps its earlier result until it begins.
        self._outdated = {job.number: results.stamp(job.folder / runs.RESULT) for job in left}
        self._before = self._look([])
        # Failed jobs run again, and jobs with a result were reported earlier.
        self._states = {v.job.number: "waiting" if v.state == "failed" else v.state for v in self._before}
        self._began = self._last_line = time.monotonic()
        self._looked = -_SECONDS_BETWEEN_LOOKS

    def __call__(self, running: Sequence[Handle]) -> None:
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self.show(running)

    def show(self, running: Sequence[Handle]) -> None:
        """Read the files and show the state of each job."""
        views = self._look(running)
        self._looked = time.monotonic()
        changed = [v for v in views if v.state != self._states[v.job.number]]
        self._states |= {v.job.number: v.state for v in changed}
        # In a terminal the table shows the other changes; it has no room for reasons.
        self._print(self._news([v for v in changed if v.state in _FAILED] if self._live else changed))
        if self._live:
            self._live.update(page(views, self._titles, self._summary(views), self._console.height), refresh=True)
        elif self._looked - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._print([self._summary(views)])
            self._last_line = self._looked

    def _look(self, running: Sequence[Handle]) -> list[View]:
        phases = {beat.folder: beat.doing for beat in (handle.beat() for handle in running)}
        return [self._view(job, phases.get(job.folder)) for job in self._jobs]

    def _view(self, job: Job, phase: str | None) -> View:
        found = results.read_job(job.folder, job.number, is_running=phase is not None)
        state = found.state.value
        if found.state is State.running:
            state = "loading" if phase == "loading" or not found.step else "running"
        elif found.state in (State.waiting, State.interrupted) or (
            found.is_finished and results.stamp(job.folder / runs.RESULT) == self._outdated.get(job.number)
        ):
            state = "waiting"
        return View(job, state, found)

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)

    def _news(self, changed: list[View]) -> list[str]:
        """Return one line per job; jobs with the same news share a line."""
        by_news: dict[str, list[str]] = {}
        for view in changed:
            title = self._titles[view.job.number]
            by_news.setdefault(news(view), []).append(f"{view.job.number} ({title})" if title else str(view.job.number))
        return [f"job{'s' if len(names) > 1 else ''} {', '.join(names)}: {text}" for text, names in by_news.items()]

    def _summary(self, views: list[View]) -> str:
        seconds = time.monotonic() - self._began
        left = seconds_left(self._before, views, seconds)
        return f"{counts(views)}; {clock(seconds)} so far" + (f", {roughly(left)} left" if left is not None else "")


def titles(jobs: list[Job]) -> dict[int, str]:
    """Return for each job, by number, its overrides that not all jobs have."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    return {job.number: results.shown(" ".join(o for o in job.overrides if o not in shared)) for job in jobs}


def news(view: View) -> str:
    """Return the text about a job that has just changed to its state."""
    found = view.result
    match view.state:
        case "finished":
            loss, seconds = found.figures.eval_loss, found.figures.train_seconds
            text = "finished" + (f", eval loss {loss:.3f}" if loss is not None else "")
            return text + (f", {seconds:.0f} s" if seconds is not None else "")
        case "failed" | "unreadable" | "stopped":
            reason = found.reason.partition("\n")[0]
            log = found.log if view.state == "failed" and "; see " not in reason else None
            return f"{view.state}: {reason}" + (f" (see {log})" if log else "")
        case "running" if found.num_steps:
            return f"running, {found.num_steps} steps"
        case "waiting" if found.step:
            return f"waiting, after step {found.step}"
        case state:
            return state


def page(views: list[View], titles: dict[int, str], summary: str, height: int) -> Group:
    """Make the table for a terminal of `height` lines; if not all jobs fit, running and failed jobs come first."""
    room = max(1, height - _OTHER_LINES)
    chosen = {v.job.number for v in sorted(views, key=lambda v: [*_STYLES].index(v.state))[:room]}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("")  # gives way in a narrow terminal
    table.add_column("state", no_wrap=True)
    for title in ("step", "loss", "eval loss", "best", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for v in (v for v in views if v.job.number in chosen):
        table.add_row(
            str(v.job.number),
            Text(titles[v.job.number], no_wrap=True, overflow="ellipsis"),
            Text(v.state, _STYLES[v.state]),
            *_figures(v.result),
        )
    more = [Text(f"... {len(views) - len(chosen)} more", "dim")] if len(chosen) < len(views) else []
    return Group(table, *more, Text(summary))


def _figures(found: JobResult) -> Iterator[str]:
    """Yield step, train loss, eval loss, best eval loss and tokens per second, empty if unknown."""
    figures, curve = found.figures, found.curve
    eval_losses = [loss for _, loss in curve.eval_losses]
    yield f"{found.step}/{found.num_steps}" if found.num_steps else str(found.step or "")
    for losses in ([loss for _, loss in curve.losses], [*eval_losses, figures.eval_loss]):
        yield next((f"{loss:.3f}" for loss in reversed(losses) if loss is not None), "")
    best = min(eval_losses, default=None) if figures.best_eval_loss is None else figures.best_eval_loss
    yield "" if best is None else f"{best:.3f}"
    speed = curve.tokens_per_second if figures.tokens_per_second is None else figures.tokens_per_second
    yield "" if speed is None else f"{speed:.0f}"


def counts(views: list[View]) -> str:
    number = Counter(v.state for v in views)
    number["running"] += number.pop("loading", 0)
    number["left"] = number.pop("waiting", 0)
    states = ("finished", "stopped", "failed", "unreadable", "running", "left")
    return ", ".join(f"{number[state]} {state}" for state in states if number[state]) or "no jobs"


def seconds_left(before: list[View], now: list[View], seconds: float) -> float | None:
    """Estimate from the steps made so far; None if the jobs' steps differ in cost or too few were made."""
    cfgs = [view.job.cfg for view in now]
    costs = {(c.model.path, c.quant.kind, c.data.path, c.data.max_length, c.train.tokens_per_step) for c in cfgs}
    known = [v.result.num_steps for v in now if v.result.num_steps]
    if len(costs) != 1 or not known:
        return None
    typical = sum(known) / len(known)
    going = [v for v in now if v.state not in _ENDED]
    left = sum(max(0, (v.result.num_steps or v.job.cfg.train.max_steps or typical) - v.result.step) for v in going)
    done = sum(max(0, new.result.step - old.result.step) for new, old in zip(now, before, strict=True))
    if not going or seconds < _LEAST_SECONDS or done < _LEAST_PART * (done + left):
        return None
    return seconds / done * left if done else None


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def roughly(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {minutes} min"
