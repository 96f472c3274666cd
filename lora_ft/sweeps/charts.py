"""What the pictures of a sweep show, before it is known how they are drawn: as SVG (page) or as PNG (plots).

charts(standing)  ->  train loss · held-out loss · loss against rank · loss against adapter size

Curves are of jobs; a job has one look (colour, dash, marker) in all charts, by its number in the sweep.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lora_ft.sweeps.results import JobResult
from lora_ft.sweeps.standing import Board, Standing
from lora_ft.sweeps.tables import value_text

RANK = "adapter.r"
_MOST_TICKS = 7
_LONG = 60  # points: from here on a line through means of neighbours is drawn over the raw one


class Kind(Enum):
    line = "line"
    raw = "raw"  # a line in the background
    points = "points"
    means = "means"  # a line of several jobs, or the Pareto front
    rings = "rings"  # around points that are marked


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one job, or of several (job None), in order of x."""

    kind: Kind
    points: tuple[tuple[float, float], ...]
    job: int | None = None
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture: `name` is its file's; on a `log2` axis x doubles at even distances; `x_ticks` empty: round numbers."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log2: bool = False
    x_ticks: tuple[float, ...] = ()
    note: str = ""

    @property
    def jobs(self) -> list[int]:
        return sorted({series.job for series in self.series if series.job is not None})


def charts(standing: Standing) -> list[Chart]:
    """Those charts that have something to show."""
    made = [_train_loss(standing), _heldout_loss(standing)]
    for number, board in enumerate(standing.boards):
        suffix = "" if len(standing.boards) == 1 else f" {number + 1}"
        made += [_against_rank(standing, board, suffix), _against_size(standing, board, suffix)]
    return [chart for chart in made if chart.series]


def _train_loss(standing: Standing) -> Chart:
    series: list[Series] = []
    for number, job in enumerate(standing.sweep.jobs):
        points = job.curve.losses
        if len(points) >= _LONG:
            series.append(Series(Kind.raw, points, number))
        if points:
            series.append(Series(Kind.line, smoothed(points) if len(points) >= _LONG else points, number, job.name))
    stride = max((job.curve.stride for job in standing.sweep.jobs), default=1)
    long = any(one.kind is Kind.raw for one in series)
    note = "Bold: mean of neighbouring steps; light: single steps." if long else ""
    note += f" Of long runs every {_ordinal(stride)} step." if stride > 1 else ""
    return Chart("train_loss", "Train loss", "step", "loss, nats per token", tuple(series), note=note.strip())


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def smoothed(points: tuple[tuple[int, float], ...]) -> tuple[tuple[float, float], ...]:
    """Each loss as the mean of a window of an eighth of the curve around it, cut off at the ends."""
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    half, made = max(1, len(points) // 16), []
    for i, (step, _) in enumerate(points):
        begin, end = max(0, i - half), min(len(points), i + half + 1)
        made.append((step, (sums[end] - sums[begin]) / (end - begin)))
    return tuple(made)


def _heldout_loss(standing: Standing) -> Chart:
    series: list[Series] = []
    for number, job in enumerate(standing.sweep.jobs):
        if points := job.curve.heldout:
            series += [Series(Kind.line, points, number, job.name)] if len(points) > 1 else []
            series.append(Series(Kind.points, points, number, job.name))
    note = "Step 0 is the base." if series else ""
    return Chart("heldout_loss", "Held-out loss", "step", "loss, nats per token", tuple(series), note=note)


def _ranked(standing: Standing, board: Board) -> Iterator[tuple[int, JobResult, float]]:
    """The jobs of a board that have a finite loss, with their number in the sweep and that loss."""
    names = {job.name for job in board.ranked}
    for number, job in enumerate(standing.sweep.jobs):
        if job.name in names and job.figures.heldout_loss is not None:
            yield number, job, job.figures.heldout_loss


def _against_rank(standing: Standing, board: Board, suffix: str) -> Chart:
    found = [(n, job, job.settings[RANK], loss) for n, job, loss in _ranked(standing, board)
             if type(job.settings.get(RANK)) is int and job.settings[RANK] > 0]  # fmt: skip
    series: list[Series] = []
    if len({rank for _, _, rank, _ in found}) > 1:
        others = _independent(standing, [job for _, job, _, _ in found])
        lines: dict[str, dict[int, list[float]]] = {}
        for _, job, rank, loss in found:
            label = ", ".join(f"{name} {value_text(standing.value(job, name))}" for name in others)
            lines.setdefault(label, {}).setdefault(rank, []).append(loss)
        for label, losses in lines.items():
            means = tuple((float(rank), statistics.fmean(losses[rank])) for rank in sorted(losses))
            series.append(Series(Kind.means, means, None, label))
        series += [Series(Kind.points, ((rank, loss),), n, job.name) for n, job, rank, loss in found]
    ranks = tuple(sorted({float(rank) for _, _, rank, _ in found}))
    note = "Points: jobs. Lines: means over seeds." if standing.has_seeds else ""
    return Chart(f"rank{suffix.strip()}", f"Held-out loss against rank{suffix}", "rank, log2 scale",
                 "loss, nats per token", tuple(series), log2=True, x_ticks=ranks if len(ranks) <= _MOST_TICKS else (),
                 note=note)  # fmt: skip


def _independent(standing: Standing, jobs: list[JobResult]) -> list[str]:
    """The differing settings that are chosen beside the rank, and not by it (as alpha=${adapter.r} is)."""

    def values(name: str) -> dict[int, set[str]]:
        seen: dict[int, set[str]] = {}
        for job in jobs:
            seen.setdefault(job.settings[RANK], set()).add(json.dumps(standing.value(job, name)))
        return seen

    return [name for name in standing.columns
            if name != RANK and any(len(found) > 1 for found in values(name).values())]  # fmt: skip


def _against_size(standing: Standing, board: Board, suffix: str) -> Chart:
    found = [(n, job, job.figures.adapter_bytes / 1e6, loss) for n, job, loss in _ranked(standing, board)
             if job.figures.adapter_bytes]  # fmt: skip
    sizes = {size for _, _, size, _ in found}
    series: list[Series] = []
    if len(sizes) > 1:
        best = front([(size, loss) for _, _, size, loss in found])
        series = [Series(Kind.means, stepped(best), None, "Pareto front"), Series(Kind.rings, best)]
        series += [Series(Kind.points, ((size, loss),), n, job.name) for n, job, size, loss in found]
    log2 = len(sizes) > 1 and max(sizes) / min(sizes) >= 4
    label = "adapter size, MB, log2 scale" if log2 else "adapter size, MB"
    note = "Ringed: the Pareto front, where no other adapter is as small and as good."
    return Chart(f"size{suffix.strip()}", f"Held-out loss against adapter size{suffix}", label, "loss, nats per token",
                 tuple(series), log2=log2, note=note)  # fmt: skip


def front(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points that no other one equals or beats in both coordinates, in order of x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return tuple(kept)


def stepped(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """A front as the stairs that it is: the loss of a point is reached by every larger size up to the next."""
    corners = [(right[0], left[1]) for left, right in itertools.pairwise(points)]
    return tuple(one for pair in zip(points, corners, strict=False) for one in pair) + points[-1:]


def y_range(chart: Chart) -> tuple[float, float, bool]:
    """Lowest and highest value to show, and whether higher ones are cut: a run that diverged would hide the rest."""
    values = sorted(y for series in chart.series if series.kind is not Kind.raw for _, y in series.points)
    low, most = values[0], values[(len(values) - 1) * 9 // 10]
    limit = most + 3 * (most - low)
    cut = low < limit < values[-1]
    high = limit if cut else values[-1]
    margin = 0.05 * (high - low) or abs(low) * 0.05 or 1.0
    return low - margin, high + margin, cut


def x_range(chart: Chart) -> tuple[float, float]:
    """Leftmost and rightmost value to show; points that stand alone get room at their sides."""
    values = [x for series in chart.series for x, _ in series.points]
    low, high = min(values), max(values)
    if chart.log2:
        return low / 2**0.3, high * 2**0.3
    if chart.name.startswith("size"):
        return low - 0.1 * (high - low), high + 0.1 * (high - low)
    return (low, high) if high > low else (low - 1, high + 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers in [low, high], evenly spaced."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def doublings(low: float, high: float, most: int = _MOST_TICKS) -> list[float]:
    """Powers of two in [low, high]; every second, third ... where there are too many."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return [2.0**power for power in range(first, last + 1, stride)]
