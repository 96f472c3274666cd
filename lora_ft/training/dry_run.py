"""Check a run before its base is loaded: rows, loss mask, steps, learning rate, layers, disk space.

    rows = read_rows(cfg, tokenizer)                 # raises what training would raise, minutes earlier
    check = dry_run(cfg, rows, tokenizer, folder)
    check.steps.count, check.layers.trainable        # equal those of the run's result.json
    check.warnings                                   # allowed, but rarely intended

`lora-ft check` prints it; `train` does it first, writes check.json and logs the warnings. It shares its code with
training: rows come from `prepare_rows`, steps from `plan_steps`, and PEFT attaches the layers, to a base on the meta
device.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_ft import config, metric_table, mixing, objectives
from lora_ft.adapters import summary
from lora_ft.adapters.summary import Layers
from lora_ft.data import mixed_dataset, statistics
from lora_ft.data.dataset import Dataset, Report
from lora_ft.data.mixed_dataset import Mix, mix_of, prepare_each, read_sources
from lora_ft.data.rows import excerpt
from lora_ft.data.statistics import Statistics, measure
from lora_ft.data.statistics import warnings as warnings_of_rows
from lora_ft.errors import LoraFtError
from lora_ft.io import durable
from lora_ft.io.allocator import release_freed_memory
from lora_ft.models.device import resolve_device
from lora_ft.models.load import Base
from lora_ft.models.meta_model import load_meta_model
from lora_ft.models.stored import agreed
from lora_ft.ops.kernels import choose_kernels
from lora_ft.training import checkpoint, limits, ranks, state, task_metrics, trackers
from lora_ft.training.ineffective_settings import ineffective
from lora_ft.training.optimizers import learning_rate

_RATES = 60  # points of the learning rate's curve: one terminal line
_FEW_STEPS = 10
_MANY_PASSES = 5

Found = TypeVar("Found")


@dataclass(frozen=True)
class PlannedSource:
    """The part of a source in a run: the share of supervised tokens that is asked for, the tokens, the passes."""

    share: float
    supervised_tokens: int
    passes: float


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of the run: number, passes over the data, tokens per step, learning rates.

    alone: documents longer than train.tokens_per_step. rates: evenly spaced over the run, first and last included.
    sources: the part of each source of data.sources.
    """

    count: int
    epochs: float
    smallest: int
    median: float
    largest: int
    alone: int
    first_rate: float
    peak_rate: float
    last_rate: float
    rates: list[float]
    sources: dict[str, PlannedSource] = field(default_factory=dict)


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes: adapter weights, adapter and checkpoints at their peak, and free space."""

    adapter: int
    needed: int
    free: int


@dataclass(frozen=True)
class Rows:
    """Examples of a run and their statistics; jobs with equal `data` and `model` settings share them."""

    dataset: Dataset
    statistics: Statistics


@dataclass(frozen=True)
class DryRun:
    """Content of check.json."""

    rows: Report
    statistics: Statistics
    steps: Steps
    layers: Layers
    disk: Disk
    warnings: list[str]


@dataclass(frozen=True)
class PartialDryRun:
    """Parts of a dry run; None for a part that an error prevented."""

    rows: Rows | None
    steps: Steps | None
    layers: Layers | None
    disk: Disk | None
    warnings: list[str]


class ErrorCollector:
    """Calls the parts of a check in the order of training and collects their errors, so that one run shows all."""

    def __init__(self) -> None:
        self.errors: list[LoraFtError] = []

    def __call__(self, part: Callable[..., Found], *arguments: Any) -> Found | None:
        """Return the part's result, or None after an error, which is kept once."""
        try:
            return part(*arguments)
        except LoraFtError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)
            return None

    def raise_errors(self) -> None:
        """Raise the collected errors, if any: several as one, with the exit code of the first."""
        if len(self.errors) > 1:
            together = LoraFtError(
                f"{len(self.errors)} errors; training would stop at the first:\n"
                + "\n".join(textwrap.indent(str(error), "  ").replace("  ", "- ", 1) for error in self.errors)
            )
            together.exit_code = self.errors[0].exit_code
            raise together
        for error in self.errors:
            raise error


def check_machine(cfg: config.TrainRun) -> None:
    """Raise ConfigError if this machine cannot run it: several processes, a missing device, missing kernels."""
    ranks.check(cfg.dist)
    choose_kernels(resolve_device(cfg.device), cfg.fast.kernels)


def read_rows(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read the rows of a run, build its examples and their statistics; raises the errors of `prepare_rows`."""
    data = objectives.data_of(cfg.objective, cfg.data)
    found = read_sources(data)
    release_freed_memory()  # arrays of a million rows leave gaps, and the next ones may not fit into them
    classes = objectives.classes_of(cfg.objective, found, cfg.data)
    made = prepare_each(found, data, tokenizer, objectives.find(cfg.objective, classes).examples, classes)
    dataset = mixed_dataset.combined(made)
    release_freed_memory()
    measured = [
        (found[name], measure(found[name], made[name], source, tokenizer))
        for name, source in mixing.named(data).items()
    ]
    release_freed_memory()
    return Rows(dataset, statistics.combined(measured, dataset) if dataset.parts else measured[0][1])


def dry_run(cfg: config.TrainRun, rows: Rows, tokenizer: PreTrainedTokenizerBase, folder: Path) -> DryRun:
    """Check everything about a run that needs no weights; `folder` is where it will write.

    Raises the errors that training would raise, and ResourceError if the disk is too full; several errors as one.
    """
    collect = ErrorCollector()
    found = partial_dry_run(collect, cfg, rows, tokenizer, folder)
    collect.raise_errors()
    assert found.steps and found.layers and found.disk  # a part is missing only after an error
    return DryRun(rows.dataset.report, rows.statistics, found.steps, found.layers, found.disk, found.warnings)


def partial_dry_run(
    collect: ErrorCollector, cfg: config.TrainRun, rows: Rows | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PartialDryRun:
    """Check as much of a run as its errors allow, even without rows; `collect` keeps the errors."""
    classes = rows.dataset.classes if rows else None
    objective = collect(objectives.find, cfg.objective, classes)
    if objective:
        cfg = objectives.complete(cfg)
    base = collect(
        load_meta_model, cfg.model, cfg.quant, cfg.device, tokenizer, objective.model_class if objective else None,
        classes,
    )  # fmt: skip
    collect(trackers.check, cfg.track)
    collect(metric_table.check, "train.eval_metrics", cfg.train.eval_metrics)
    collect(metric_table.check, "train.best_metric", [cfg.train.best_metric])
    steps = _steps(cfg, rows.dataset) if rows else None
    if rows and steps:
        collect(limits.check_added_tokens, cfg.model, tokenizer, rows.dataset.train)
        if base:
            collect(_check_lengths, cfg, base, rows.dataset)
        collect(limits.check_warmup, cfg.optim, steps.count)
        collect(_check_metrics, cfg, rows.dataset)
    layers = collect(summary.layers, base, cfg, objective.task_type) if base and objective else None
    as_trained = replace(cfg, quant=agreed(cfg.quant, base.identity.stored)) if base else cfg
    disk = collect(_disk, cfg, folder, layers.trainable, steps.count) if layers and steps else None
    warnings = [
        *(warnings_of_rows(rows.statistics, rows.dataset.report, cfg.data, classes) if rows else ()),
        *(_labels_without_rows(rows.dataset) if rows else ()),
        *(_unknown_stop_tokens(rows.statistics, base) if rows and base else ()),
        *(_step_warnings(steps, len(rows.dataset.train), cfg.train) if rows and steps else ()),
        *(summary.warnings(layers, cfg) if layers else ()),
        *(_unverified_base(base) if base and cfg.adapter.init_from else ()),
        *ineffective(
            as_trained, rows.dataset if rows else None, steps.count if steps else 0, steps.largest if steps else 0
        ),
    ]
    return PartialDryRun(rows, steps, layers, disk, warnings)


def _check_lengths(cfg: config.TrainRun, base: Base, dataset: Dataset) -> None:
    chosen = state.choose_eval(dataset, cfg.train.eval_rows)
    limits.check_lengths(dataset.train, chosen.examples, base.model, cfg)


def _check_metrics(cfg: config.TrainRun, dataset: Dataset) -> None:
    names = [name for name in task_metrics.names(cfg.train) if name in metric_table.METRICS]
    task_metrics.check(names, dataset, state.choose_eval(dataset, cfg.train.eval_rows).prompts, cfg.data)


def _steps(cfg: config.TrainRun, dataset: Dataset) -> Steps:
    mix = mix_of(dataset, cfg.data)
    planned = state.plan_steps(dataset.train, cfg.train, cfg.seed, mix)
    count, tokens = len(planned), planned.tokens
    rates = [learning_rate(cfg.optim, step, count) for step in range(count)]
    shown = np.unique(np.linspace(0, count - 1, _RATES).round().astype(int))
    return Steps(
        count=count,
        epochs=mix.epochs(planned) if mix else int(planned.documents.sum()) / len(dataset.train),
        smallest=int(tokens.min()),
        median=float(np.median(tokens)),
        largest=int(tokens.max()),
        alone=int((dataset.train.lengths > cfg.train.tokens_per_step).sum()),
        first_rate=rates[0],
        peak_rate=max(rates),
        last_rate=rates[-1],
        rates=[rates[i] for i in shown],
        sources=_planned_sources(mix, dataset, planned) if mix else {},
    )


def _planned_sources(mix: Mix, dataset: Dataset, planned: Sequence[np.ndarray]) -> dict[str, PlannedSource]:
    seen, passes = np.concatenate([*planned]), mix.passes(planned)
    supervised = mix.counts(seen, dataset.train.supervised_tokens[seen])
    return {name: PlannedSource(mix.shares[name], int(supervised[name]), passes[name]) for name in mix.parts}


def _disk(cfg: config.TrainRun, folder: Path, num_trainable: int, num_steps: int) -> Disk:
    disk = Disk(4 * num_trainable, checkpoint.bytes_needed(num_trainable, num_steps, cfg), durable.free_bytes(folder))
    checkpoint.check_free_space(folder, disk.needed)
    return disk


def _labels_without_rows(dataset: Dataset) -> Iterator[str]:
    missing = [label for label, count in (dataset.report.labels or {}).items() if not count]
    if missing and not dataset.report.is_stream:
        yield f"no training row has the label {excerpt(', '.join(missing))}, which data.labels names"


def _unknown_stop_tokens(statistics: Statistics, base: Base) -> Iterator[str]:
    """Yield a warning for each end of turn that the base's files do not list: other programs do not stop there."""
    if not statistics.ends:  # a classifier writes nothing, and has no settings of generation
        return
    listed = base.model.generation_config.eos_token_id if base.model.generation_config else None
    known = {*(listed if isinstance(listed, list) else [listed]), base.tokenizer.eos_token_id}
    for end, count in statistics.ends.items():
        if base.tokenizer.convert_tokens_to_ids(end) not in known:
            yield (
                f"{count:,} documents end with {end}, but neither the tokenizer nor generation_config.json lists it as "
                "a stop token: other programs will not stop there"
            )


def _unverified_base(base: Base) -> Iterator[str]:
    if base.identity.weights_sha256 is None:
        yield "the base's weights are not on this machine: adapter.init_from is checked when they are loaded"


def _step_warnings(steps: Steps, documents: int, train: config.Train) -> Iterator[str]:
    if steps.alone:
        yield (
            f"{steps.alone:,} of {documents:,} documents are longer than train.tokens_per_step="
            f"{train.tokens_per_step}: each becomes a step of its own"
        )
    for name, source in steps.sources.items():
        if source.passes > max(_MANY_PASSES, steps.epochs):
            yield (
                f"the rows of data.sources.{name} are seen {source.passes:.1f} times: lower data.mix.{name}, or end "
                "epochs with data.mix_until=first"
            )
    if steps.count < _FEW_STEPS and train.max_steps is None:
        yield f"only {steps.count} steps: lower train.tokens_per_step or raise train.epochs to learn more"
