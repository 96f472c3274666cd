"""The charts of a sweep: train loss, eval loss, the metric of its ranking, also against rank and size. No torch here.

for chart in charts(ranking):
    chart.svg                      # <svg> for the page
    chart.png()                    # a file

A job has one look (colour, dash, marker) in all charts, by its number in the sweep.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ft import metric_table
from lora_ft.evaluation.charts import ACCENT, DASHES, TEXT, blank, drawing, look, png, svg
from lora_ft.metric_table import LOSS
from lora_ft.sweeps.leaderboard import Board, Ranking, value_of, values_of
from lora_ft.sweeps.results import JobResult, finite
from lora_ft.sweeps.tables import describe, loss_text, loss_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANK = "adapter.r"
_LONG = 60  # points; a longer curve is drawn smoothed, over the single steps in the background
_FEW = 7  # ranks that each get a tick
_MEAN = "mean"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One chart: `jobs` are the numbers of the jobs in it, `means` the labels of its lines through several jobs."""

    name: str
    title: str
    note: str
    jobs: tuple[int, ...]
    means: tuple[str, ...]
    figure: "Figure"
    svg: str

    def png(self) -> bytes:
        with drawing(self.name):
            return png(self.figure, self.title)


def charts(ranking: Ranking) -> list[Chart]:
    """Draw the charts that have something to show."""
    titles = {job.number: _title(ranking, job) for job in ranking.sweep.jobs}
    plans = [("train_loss", "Train loss", "step", functools.partial(_train_loss, ranking)),
             ("eval_loss", "Eval loss", "step", functools.partial(_eval_loss, ranking))]  # fmt: skip
    title = metric_table.title(ranking.metric).capitalize()
    if ranking.metric != LOSS:
        plans.append((f"eval_{ranking.metric}", title, "step", functools.partial(_eval_values, ranking)))
    for number, board in enumerate(ranking.boards, 1):
        which = "" if len(ranking.boards) == 1 else f"{number}"
        plans += [(f"rank{which}", f"{title} against rank {which}".strip(), "rank, log2 scale",
                   functools.partial(_against_rank, ranking, board)),
                  (f"size{which}", f"{title} against adapter size {which}".strip(), "adapter size, MB",
                   functools.partial(_against_size, board))]  # fmt: skip
    made = []
    for name, title, x_label, draw in plans:
        with drawing(name):
            is_loss = ranking.metric == LOSS or name in ("train_loss", "eval_loss")
            figure, axes = blank(x_label, f"loss, {loss_unit(ranking.sweep.jobs)}" if is_loss else ranking.metric)
            note = draw(axes)
            if lines := axes.get_lines():
                note += " Higher values are cut off." if is_loss and _limit(axes) else ""
                jobs = {int(gid.removeprefix("job-")) for line in lines if (gid := line.get_gid() or _MEAN) != _MEAN}
                means = tuple(str(line.get_label()) for line in lines if line.get_gid() == _MEAN)
                drawn = svg(figure, title, titles)
                made.append(Chart(name, title, note.strip(), tuple(sorted(jobs)), means, figure, drawn))
    return made


def _title(ranking: Ranking, job: JobResult) -> str:
    value = value_of(job, ranking.metric)
    outcome = job.state.value if value is None else f"{metric_table.title(ranking.metric)} {loss_text(value)}"
    return ", ".join(filter(None, [f"job {job.name}", describe(ranking.values(job)), outcome]))


def _plot(axes: "Axes", job: JobResult, points: Points, **options: Any) -> None:
    axes.plot(*zip(*points, strict=True), gid=f"job-{job.number}", **(look(job.number) | options))


def _train_loss(ranking: Ranking, axes: "Axes") -> str:
    jobs = [job for job in ranking.sweep.jobs if job.curve.losses]
    notes = []
    for job in jobs:
        points = job.curve.losses
        shown: Points = points
        if len(points) >= _LONG:
            _plot(axes, job, points, marker="", linewidth=1, linestyle="-", alpha=0.16)
            shown = smoothed(points)
            notes = ["Bold: mean of neighbouring steps. Light: single steps."]
        _plot(axes, job, shown, label=f"job {job.name}", **({"marker": ""} if len(points) > 1 else {}))
        # An invisible line that is easier to point at than a thin one.
        _plot(axes, job, shown[:: len(shown) // 40 + 1], marker="", linewidth=12, linestyle="-", alpha=0)
    stride = max((job.curve.stride for job in jobs), default=1)
    return " ".join([*notes, f"Long runs show one step in {stride}." if stride > 1 else ""])


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Average each point over a window of an eighth of the curve; the window is cut off at the ends."""
    sums = [0.0, *itertools.accumulate(loss for _, loss in points)]
    half = max(1, len(points) // 16)
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    means = [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _eval_loss(ranking: Ranking, axes: "Axes") -> str:
    for job in ranking.sweep.jobs:
        if job.curve.eval_losses:
            _plot(axes, job, job.curve.eval_losses, label=f"job {job.name}")
    return _step_zero(ranking)


def _eval_values(ranking: Ranking, axes: "Axes") -> str:
    for job in ranking.sweep.jobs:
        if job.curve.values:
            _plot(axes, job, job.curve.values, label=f"job {job.name}")
    return _step_zero(ranking)


def _step_zero(ranking: Ranking) -> str:
    has_head = any(job.has_head for job in ranking.sweep.jobs)
    return "Step 0 is the base; with a head, its random start." if has_head else "Step 0 is the base."


def _against_rank(ranking: Ranking, board: Board, axes: "Axes") -> str:
    found = [(job, r, loss) for job, loss in _with_loss(board) if (r := _rank(job))]
    ranks = sorted({r for _, r, _ in found})
    if len(ranks) < 2:
        return ""
    others = _independent(ranking, [(job, r) for job, r, _ in found])
    lines: dict[str, dict[int, list[float]]] = {}
    for job, r, loss in found:
        label = describe({name: values_of(job).get(name) for name in others}) or "all jobs"
        lines.setdefault(label, {}).setdefault(r, []).append(loss)
    for number, (label, losses) in enumerate(lines.items()):
        means = [(r, statistics.fmean(losses[r])) for r in sorted(losses)]
        axes.plot(*zip(*means, strict=True), gid=_MEAN, label=label, **mean_look(number))
    _points(axes, found)
    _use_log2(axes, ranks)
    return "Points: jobs. Lines: means over seeds." if ranking.has_seeds else ""


def mean_look(number: int) -> dict[str, Any]:
    """Options of `axes.plot` for the `number`-th line through several jobs."""
    return {"color": TEXT, "linewidth": 1.5, "linestyle": DASHES[number % len(DASHES)], "zorder": 1}


def _rank(job: JobResult) -> int | None:
    r = job.settings.get(RANK)
    return r if type(r) is int and r > 0 and finite(r) else None


def _independent(ranking: Ranking, jobs: list[tuple[JobResult, int]]) -> list[str]:
    """Return the settings that differ and are not a function of the rank, as lora_alpha=${adapter.r} is."""

    def varies(name: str) -> bool:
        seen = {(r, json.dumps(values_of(job).get(name))) for job, r in jobs}
        return len(seen) > len({r for r, _ in seen})

    return [name for name in ranking.columns if name != RANK and varies(name)]


def _against_size(board: Board, axes: "Axes") -> str:
    found = [(job, job.figures.adapter_bytes / 1e6, loss) for job, loss in _with_loss(board)
             if job.figures.adapter_bytes]  # fmt: skip
    sizes = sorted({size for _, size, _ in found})
    if len(sizes) < 2:
        return ""
    sign = metric_table.cost(board.metric, 1.0)
    best = [(size, sign * cost) for size, cost in front([(size, sign * value) for _, size, value in found])]
    axes.step(*zip(*best, strict=True), where="post", label="Pareto front", **mean_look(0))
    _points(axes, found)
    axes.plot(
        *zip(*best, strict=True),
        "o",
        markersize=18,
        markerfacecolor="none",
        markeredgecolor=ACCENT,
        markeredgewidth=1.6,
    )
    if sizes[-1] / sizes[0] >= 4:
        _use_log2(axes, [])
        axes.set_xlabel("adapter size, MB, log2 scale")
    else:
        axes.margins(x=0.1)
    return "Circled: the Pareto front; no other adapter is both as small and as good."


def front(points: Points) -> list[tuple[float, float]]:
    """Return the Pareto front, in order of x: no other point is as low in both coordinates. Higher is worse."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _with_loss(board: Board) -> Iterator[tuple[JobResult, float]]:
    for job in sorted(board.ranked, key=lambda job: job.number):
        if (value := value_of(job, board.metric)) is not None:
            yield job, value


def _points(axes: "Axes", found: Sequence[tuple[JobResult, float, float]]) -> None:
    for job, x, loss in found:
        _plot(axes, job, [(x, loss)], linestyle="none", label=f"job {job.name}")


def _use_log2(axes: "Axes", ticks: list[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(2, numticks=_FEW))
    if 0 < len(ticks) <= _FEW:
        axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.1)


def _limit(axes: "Axes") -> bool:
    """Cut the values of diverged runs, which would flatten all other curves; True if any were cut."""
    import numpy

    shown = [numpy.asarray(line.get_ydata(), float) for line in axes.get_lines() if line.get_alpha() is None]
    values = [float(y) for y in numpy.sort(numpy.concatenate(shown))]
    low, most = values[0], values[(len(values) - 1) * 9 // 10]
    limit = most + 3 * (most - low)
    cut = low < limit < values[-1]
    high = limit if cut else values[-1]
    margin = 0.05 * (high - low) or abs(low) * 0.05 or 1.0
    axes.set_ylim(low - margin, high + margin)
    return cut
