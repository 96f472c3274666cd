"""Rank the jobs of a sweep by a metric; jobs that differ only in their seed are repeats of one setting.

ranking = rank(sweep)
ranking.boards[0].ranked[0].name         the best job
ranking.columns                          the settings that differ: ("adapter.r", "optim.lr")

The metric is the eval loss, or train.best_metric if all jobs have the same. Jobs share a board only if they were
evaluated on the same rows: those of equal text or, by the loss, of the same token count and loss of the base. No torch.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_ft import config, metric_table, validation
from lora_ft.metric_table import LOSS
from lora_ft.sweeps.results import JobResult, State, Sweep

SEED = "seed"
_NOT_COMPARED = {SEED, "resume", "track.name"}
_SAME_LOSS = 1e-5  # relative; micro-batches of another size round differently


@dataclass(frozen=True)
class Setting:
    """Jobs that differ only in their seed, with the mean and the standard deviation of their metric."""

    values: dict[str, Any]
    jobs: tuple[JobResult, ...]
    metric: str = LOSS

    @property
    def results(self) -> list[float]:
        return [found for job in self.jobs if (found := value_of(job, self.metric)) is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.results) if self.results else None

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.results) if len(self.results) > 1 else None


@dataclass(frozen=True)
class Board:
    """Finished jobs evaluated on the same rows, best first; jobs without a finite value of the metric come last.

    base_loss: None if it is unknown or if the jobs have several bases.
    """

    eval_tokens: int | None
    base_loss: float | None
    ranked: tuple[JobResult, ...]
    settings: tuple[Setting, ...]
    metric: str = LOSS

    def place(self, job: JobResult) -> int | None:
        """Return the place of a job, 1 for the best; equal values share a place. None without a finite value."""
        own = _cost(value_of(job, self.metric), self.metric)
        others = [_cost(value_of(other, self.metric), self.metric) for other in self.ranked]
        return None if math.isinf(own) else 1 + sum(other < own for other in others)

    @property
    def base_value(self) -> float | None:
        """The value of the metric for the base; None if it is unknown or if the jobs have several bases."""
        return base_value_of(self.bases[0], self.metric) if len(self.bases) == 1 else None

    @property
    def bases(self) -> tuple[tuple[JobResult, ...], ...]:
        """The jobs of each base, that of the best job first. A metric compares jobs on several bases and with a head.

        What stands for the base of a head is the class frequencies of the training rows.
        """
        return _by_base(self.ranked)


@dataclass(frozen=True)
class Ranking:
    """The boards of a sweep; `columns` are the settings that differ except the seed; `rest` are unfinished jobs."""

    sweep: Sweep
    columns: tuple[str, ...]
    has_seeds: bool
    boards: tuple[Board, ...]
    rest: tuple[JobResult, ...]
    metric: str = LOSS

    @property
    def best(self) -> JobResult | None:
        """The best job; None if there are several boards, which cannot be compared."""
        ranked = self.boards[0].ranked if len(self.boards) == 1 else ()
        return ranked[0] if ranked and value_of(ranked[0], self.metric) is not None else None

    def value(self, job: JobResult) -> float | None:
        """Return the value of the metric that ranks the jobs."""
        return value_of(job, self.metric)

    def values(self, job: JobResult) -> dict[str, Any]:
        """Return the settings of a job that differ between jobs, with the seed if it differs."""
        names = [*self.columns, SEED] if self.has_seeds else self.columns
        known = values_of(job)
        return {name: known[name] for name in names if name in known}


def rank(sweep: Sweep) -> Ranking:
    """Rank the finished jobs of a sweep; jobs without a result are in `rest`."""
    columns, has_seeds = _differing(sweep.jobs)
    metrics = {job.metric for job in sweep.jobs if job.settings}
    metric = metrics.pop() if len(metrics) == 1 else LOSS
    boards = tuple(_board(jobs, columns, metric) for jobs in _comparable(sweep.jobs, metric))
    rest = sorted((job for job in sweep.jobs if not job.is_finished), key=lambda job: [*State].index(job.state))
    return Ranking(sweep, columns, has_seeds, boards, tuple(rest), metric)


def value_of(job: JobResult, metric: str) -> float | None:
    """Return the eval loss of a finished job, or the value of the metric that it was ranked by."""
    return job.figures.eval_loss if metric == LOSS else job.figures.value


def base_value_of(jobs: tuple[JobResult, ...], metric: str) -> float | None:
    """Return the value of the metric for the base of jobs that have the same one; None if it is unknown."""
    values = (job.figures.base_eval_loss if metric == LOSS else job.figures.base_value for job in jobs)
    return next((value for value in values if value is not None), None)


def _cost(value: float | None, metric: str) -> float:
    return math.inf if value is None else metric_table.cost(metric, value)


def values_of(job: JobResult) -> dict[str, Any]:
    """Return settings by dotted key: from the config, or from the overrides until the config is written."""
    pairs = [override.lstrip("+").split("=", 1) for override in job.overrides if "=" in override]
    overrides = {key: text for key, text in pairs if not key.startswith("hydra")}
    if job.settings:
        return overrides | job.settings
    return {key: _scalar(text) for key, text in overrides.items()}


def _scalar(text: str) -> Any:
    """Parse an override's value as a config would hold it."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _differing(jobs: tuple[JobResult, ...]) -> tuple[tuple[str, ...], bool]:
    seen: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in values_of(job).items():
            seen.setdefault(key, set()).add(json.dumps(value))
    differ = {key for key, values in seen.items() if len(values) > 1}
    if all(
        job.settings for job in jobs
    ):  # instead of a choice such as model=NAME, compare the settings that it selects
        differ &= {key for job in jobs for key in job.settings} | {SEED}
    order = {setting.key: number for number, setting in enumerate(validation.settings(config.TrainRun))}
    columns = sorted(differ - _NOT_COMPARED, key=lambda key: (order.get(key, len(order)), key))
    return tuple(columns), SEED in differ


def _comparable(jobs: tuple[JobResult, ...], metric: str) -> list[list[JobResult]]:
    """Group finished jobs by what their values are of, the largest group first.

    Losses compare on one base, on the same rows, per token or per row; other metrics on the same rows.
    """
    if metric != LOSS:
        by_rows: dict[str | None, list[JobResult]] = {}
        for job in (job for job in jobs if job.is_finished):
            by_rows.setdefault(job.eval_rows, []).append(job)
        return sorted(by_rows.values(), key=len, reverse=True)

    groups = _by_base(sorted((job for job in jobs if job.is_finished), key=_losses_of))
    return sorted(map(list, groups), key=len, reverse=True)


def _by_base(jobs: Iterable[JobResult]) -> tuple[tuple[JobResult, ...], ...]:
    """Group jobs by the loss of their base on their rows, in the order of the first job of each group."""
    groups: list[list[JobResult]] = []
    for job in jobs:
        kind, base = _losses_of(job)
        for group in groups:
            own, loss = _losses_of(group[0])
            if own == kind and math.isclose(loss, base, rel_tol=_SAME_LOSS):
                group.append(job)
                break
        else:
            groups.append([job])
    return tuple(map(tuple, groups))


def _losses_of(job: JobResult) -> tuple[tuple[bool, int], float]:
    """Return what the losses of a job are of, and the loss of its base."""
    base = job.figures.base_eval_loss
    return (job.has_head, job.figures.eval_tokens or 0), math.inf if base is None else base


def _board(jobs: list[JobResult], columns: tuple[str, ...], metric: str) -> Board:
    repeats: dict[str, list[JobResult]] = {}
    for job in jobs:
        repeats.setdefault(json.dumps([values_of(job).get(column) for column in columns]), []).append(job)
    settings = [Setting({column: values_of(same[0]).get(column) for column in columns}, tuple(same), metric)
                for same in repeats.values()]  # fmt: skip
    first = jobs[0].figures
    return Board(
        first.eval_tokens,
        first.base_eval_loss if len(_by_base(jobs)) == 1 else None,
        tuple(sorted(jobs, key=lambda job: _cost(value_of(job, metric), metric))),
        tuple(sorted(settings, key=lambda setting: _cost(setting.mean, metric))),
        metric,
    )
