"""Who is ahead: jobs ranked by held-out loss, and seeds as repeats of one setting. No torch here.

standing = of(sweep)
standing.boards[0].ranked[0].name        the best job; a second board where the held-out rows are others
standing.columns                         the settings that differ: ("adapter.r", "optim.lr")

Losses are compared where the same rows were held out, which equal counts of tokens and equal losses of the base show.
"""

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

from lora_ft import config, validation
from lora_ft.sweeps.results import JobResult, State, Sweep

SEED = "seed"
_NOT_COMPARED = {SEED, "resume", "track.name"}
_SAME_LOSS = 1e-5  # relative: micro-batches of another size round otherwise


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in their seed only: mean of their held-out losses and, of two and more, standard deviation."""

    values: dict[str, Any]
    jobs: tuple[JobResult, ...]

    @property
    def losses(self) -> list[float]:
        return [job.figures.heldout_loss for job in self.jobs if job.figures.heldout_loss is not None]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Board:
    """Finished jobs whose held-out rows are the same, best first; those without a finite loss last."""

    heldout_tokens: int | None
    base_loss: float | None
    ranked: tuple[JobResult, ...]
    settings: tuple[Setting, ...]

    def place(self, job: JobResult) -> int | None:
        """1 for the lowest loss, the same for equal ones; None without a finite loss."""
        loss = job.figures.heldout_loss
        if loss is None:
            return None
        return 1 + sum(other.figures.heldout_loss < loss for other in self.ranked
                       if other.figures.heldout_loss is not None)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """A sweep's jobs in order: `columns` are the settings that differ, seed apart; `rest` has no result."""

    sweep: Sweep
    columns: tuple[str, ...]
    has_seeds: bool
    boards: tuple[Board, ...]
    rest: tuple[JobResult, ...]

    @property
    def best(self) -> JobResult | None:
        """The job of the lowest loss, where there is one board to be best on."""
        ranked = self.boards[0].ranked if len(self.boards) == 1 else ()
        return ranked[0] if ranked and ranked[0].figures.heldout_loss is not None else None

    def value(self, job: JobResult, column: str) -> Any:
        """A setting of a job; None where neither config nor words tell."""
        return values_of(job).get(column)

    def values(self, job: JobResult) -> dict[str, Any]:
        """The settings that differ, and the seed where it does, as far as they are known of this job."""
        names = [*self.columns, SEED] if self.has_seeds else self.columns
        known = values_of(job)
        return {name: known[name] for name in names if name in known}


def of(sweep: Sweep) -> Standing:
    columns, has_seeds = _differing(sweep.jobs)
    boards = tuple(_board(jobs, columns) for jobs in _comparable(sweep.jobs))
    rest = sorted((job for job in sweep.jobs if not job.is_finished), key=lambda job: [*State].index(job.state))
    return Standing(sweep, columns, has_seeds, boards, tuple(rest))


def values_of(job: JobResult) -> dict[str, Any]:
    """Settings by dotted key: of the config, and, as long as that is not written, what the words say."""
    words = dict(word.lstrip("+").split("=", 1) for word in job.words if "=" in word and not word.startswith("hydra"))
    if job.settings:
        return {key: value for key, value in words.items() if key not in job.settings} | job.settings
    return {key: _scalar(value) for key, value in words.items()}


def _scalar(text: str) -> Any:
    """What a typed value is in a config, for values that are no text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _differing(jobs: tuple[JobResult, ...]) -> tuple[tuple[str, ...], bool]:
    seen: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in values_of(job).items():
            seen.setdefault(key, set()).add(json.dumps(value))
    differ = {key for key, values in seen.items() if len(values) > 1}
    if all(job.settings for job in jobs):  # a choice such as model=NAME is told by what it chose
        differ &= {key for job in jobs for key in job.settings} | {SEED}
    declared = [setting.key for setting in validation.settings(config.TrainRun)]
    order = {key: number for number, key in enumerate(declared)}
    columns = sorted(differ - _NOT_COMPARED, key=lambda key: (order.get(key, len(order)), key))
    return tuple(columns), SEED in differ


def _comparable(jobs: tuple[JobResult, ...]) -> list[list[JobResult]]:
    """Finished jobs by their held-out rows, the most jobs first."""

    def rows(job: JobResult) -> tuple[int, float]:
        figures = job.figures
        base = figures.base_heldout_loss
        return figures.heldout_tokens or 0, math.inf if base is None else base

    groups: list[list[JobResult]] = []
    for job in sorted((job for job in jobs if job.is_finished), key=rows):
        tokens, base = rows(job)
        before = rows(groups[-1][0]) if groups else (None, 0.0)
        if before[0] == tokens and math.isclose(before[1], base, rel_tol=_SAME_LOSS):
            groups[-1].append(job)
        else:
            groups.append([job])
    return sorted(groups, key=len, reverse=True)


def _board(jobs: list[JobResult], columns: tuple[str, ...]) -> Board:
    def loss(job: JobResult) -> float:
        return math.inf if job.figures.heldout_loss is None else job.figures.heldout_loss

    repeats: dict[str, list[JobResult]] = {}
    for job in jobs:
        repeats.setdefault(json.dumps([values_of(job).get(column) for column in columns]), []).append(job)
    settings = [Setting({column: values_of(same[0]).get(column) for column in columns}, tuple(same))
                for same in repeats.values()]  # fmt: skip
    settings.sort(key=lambda setting: setting.mean if setting.losses else math.inf)
    first = jobs[0].figures
    return Board(first.heldout_tokens, first.base_heldout_loss, tuple(sorted(jobs, key=loss)), tuple(settings))
