"""Show all jobs of a sweep while they run, in one display of the parent process and from files alone. No torch here.

    job               state      step   loss  eval loss  best  tokens/s
      0  adapter.r=4  finished  40/40  2.114     2.305  2.305       143
      1  adapter.r=8  running   12/40  2.290     2.410  2.410       139
      2  adapter.r=16 waiting
    1 finished, 1 running, 1 left; 2:31 so far, about 5 min left

If stderr is not a terminal: one line per change of a job's state, and a summary line every half minute.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_ft import runs
from lora_ft.io.redact import redact
from lora_ft.sweeps.jobs import Job
from lora_ft.sweeps.metrics_reader import ENDS, MetricsReader, View, beats

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_FIRST = ("running", "loading", "failed", "waiting", "stopped", "finished")  # if not all fit
_STYLES = {"running": "bold", "failed": "red", "waiting": "dim", "stopped": "yellow", "finished": "green"}
_OTHER_LINES = 4  # of a terminal: header, jobs left out, the whole, the cursor's
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_LEAST_SECONDS, _LEAST_PART = 15.0, 0.05  # of a sweep, before its end is estimated


@contextlib.contextmanager
def displayed(jobs: list[Job], folder: Path) -> Iterator[Callable[[], None]]:
    """Show the jobs of the sweep in `folder` until the block ends.

    Call the yielded function often: it updates the display at most once a second. The sweep goes on if the reader of
    stderr leaves.
    """
    console = Console(stderr=True)
    console.on_broken_pipe = functools.partial(setattr, console, "quiet", True)  # type: ignore[method-assign]
    live = Live(console=console, transient=False, auto_refresh=False) if console.is_terminal else None
    display = _Display(jobs, folder, console, live)
    with live or contextlib.nullcontext():
        try:
            yield display
        finally:
            display.show()


class _Display:
    def __init__(self, jobs: list[Job], folder: Path, console: Console, live: Live | None) -> None:
        self._folder, self._console, self._live = folder, console, live
        self._readers = [MetricsReader(job) for job in jobs]
        self._names = {job.number: name for job, name in zip(jobs, names(jobs), strict=True)}
        self._before = self._look()
        # Failed jobs are run again, and jobs with a result were reported earlier.
        self._states = {v.job.number: "waiting" if v.state == "failed" else v.state for v in self._before}
        self._began = self._told = time.monotonic()
        self._looked = -_SECONDS_BETWEEN_LOOKS

    def __call__(self) -> None:
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self.show()

    def show(self) -> None:
        """Read the files and show the jobs' state."""
        views = self._look()
        self._looked = time.monotonic()
        changed = [v for v in views if v.state != self._states[v.job.number]]
        self._states |= {v.job.number: v.state for v in changed}
        # In a terminal the table shows the other changes; it has no room for reasons.
        self._say(self._news([v for v in changed if v.state == "failed"] if self._live else changed))
        if self._live:
            self._live.update(page(views, self._names, self._whole(views), self._console.height), refresh=True)
        elif self._looked - self._told >= _SECONDS_BETWEEN_LINES:
            self._say([self._whole(views)])
            self._told = self._looked

    def _look(self) -> list[View]:
        now = beats(self._folder)
        return [reader.view(now.get(reader.job.folder)) for reader in self._readers]

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(visible(line)), soft_wrap=True)

    def _news(self, changed: list[View]) -> list[str]:
        """Return one line per job; jobs with the same news share a line."""
        alike: dict[str, list[str]] = {}
        for view in changed:
            name = self._names[view.job.number]
            alike.setdefault(news(view), []).append(f"{view.job.number} ({name})" if name else str(view.job.number))
        return [f"job{'s' if len(who) > 1 else ''} {', '.join(who)}: {what}" for what, who in alike.items()]

    def _whole(self, views: list[View]) -> str:
        seconds = time.monotonic() - self._began
        left = seconds_left(self._before, views, seconds)
        return f"{counts(views)}; {clock(seconds)} so far" + (f", {roughly(left)} left" if left is not None else "")


def names(jobs: list[Job]) -> list[str]:
    """Return for each job its overrides that not all jobs have."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    return [redact(" ".join(word for word in job.overrides if word not in shared)) for job in jobs]


def visible(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return text.translate(_CONTROLS)


def news(view: View) -> str:
    """Return the text about a job that has just changed to this state."""
    match view.state:
        case "finished":
            loss = f", eval loss {view.eval_loss:.3f}" if view.eval_loss is not None else ""
            return "finished" + loss + (f", {view.seconds:.0f} s" if view.seconds is not None else "")
        case "failed":
            reason, log = view.reason.partition("\n")[0], view.job.folder / runs.LOG
            return f"failed: {reason}" + (f" (see {log})" if log.is_file() and "; see " not in reason else "")
        case "stopped":
            return f"stopped: {view.reason}"
        case "running" if view.num_steps:
            return f"running, {view.num_steps} steps"
        case "waiting" if view.step:
            return f"waiting, after step {view.step}"
        case state:
            return state


def page(views: list[View], titles: dict[int, str], whole: str, height: int) -> Group:
    """Make the table for a terminal of `height` lines; if not all jobs fit, it shows those that matter most."""
    room = max(1, height - _OTHER_LINES)
    first = {v.job.number for v in sorted(views, key=lambda v: _FIRST.index(v.state))[:room]}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("")  # gives way in a narrow terminal
    table.add_column("state", no_wrap=True)
    for title in ("step", "loss", "eval loss", "best", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for v in (v for v in views if v.job.number in first):
        table.add_row(
            str(v.job.number),
            Text(visible(titles[v.job.number]), no_wrap=True, overflow="ellipsis"),
            Text(v.state, _STYLES.get(v.state, "")),
            f"{v.step}/{v.num_steps}" if v.num_steps else "",
            *("" if loss is None else f"{loss:.3f}" for loss in (v.loss, v.eval_loss, v.best_eval_loss)),
            "" if v.tokens_per_second is None else f"{v.tokens_per_second:.0f}",
        )
    more = [Text(f"... {len(views) - len(first)} more", "dim")] if len(first) < len(views) else []
    return Group(table, *more, Text(whole))


def counts(views: list[View]) -> str:
    number = Counter(v.state for v in views)
    shown = {
        "finished": number["finished"],
        "stopped": number["stopped"],
        "failed": number["failed"],
        "running": number["running"] + number["loading"],
        "left": number["waiting"],
    }
    return ", ".join(f"{count} {what}" for what, count in shown.items() if count) or "no jobs"


def seconds_left(before: list[View], now: list[View], seconds: float) -> float | None:
    """Estimate from the steps made so far; None if the jobs' steps differ in cost or too few were made."""
    cfgs = [view.job.cfg for view in now]
    alike = {(c.model.path, c.quant.kind, c.data.path, c.data.max_length, c.train.tokens_per_step) for c in cfgs}
    known = [v.num_steps for v in now if v.num_steps]
    if len(alike) != 1 or not known:
        return None
    typical = sum(known) / len(known)
    going = [v for v in now if v.state not in ENDS]
    left = sum(max(0, (v.num_steps or v.job.cfg.train.max_steps or typical) - v.step) for v in going)
    done = sum(max(0, new.step - old.step) for new, old in zip(now, before, strict=True))
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
