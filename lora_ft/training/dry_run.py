"""Check a run before its base is loaded: rows, masks, steps, learning rate, layers, disk.

    rows = read_rows(cfg, tokenizer)                           # raise what training would raise, minutes earlier
    preflight = check_first(cfg, rows, tokenizer, folder)
    preflight.steps.count, preflight.layers.trainable          # equal those of the run's result.json
    preflight.warnings                                         # allowed, but seldom meant

`lora-ft check` shows it; `train` does it first, keeps it as check.json and logs the warnings. Nothing is computed
twice in two ways: rows come from `prepare_rows`, steps from `plan_steps`, and the layers are PEFT's own, attached to
the base's skeleton.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_ft import config, objectives
from lora_ft.adapters import summary
from lora_ft.adapters.summary import Layers
from lora_ft.data.dataset import Dataset, Report, prepare_rows
from lora_ft.data.read import read
from lora_ft.data.statistics import Survey, survey
from lora_ft.data.statistics import warnings as warnings_of_rows
from lora_ft.errors import LoraFtError
from lora_ft.io import durable
from lora_ft.models.load import Base, resolve_device
from lora_ft.models.meta_model import load_meta_model
from lora_ft.ops.kernels import choose_kernels
from lora_ft.training import checkpoint, ranks, state, trackers
from lora_ft.training.ineffective_settings import without_effect
from lora_ft.training.optimizers import learning_rate

_RATES = 60  # points of the learning rate's curve, which fit on a line
_FEW_STEPS = 10

Found = TypeVar("Found")


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of the run: their number, passes over the data, tokens in one, and learning rates.

    alone: documents longer than train.tokens_per_step. rates: evenly spaced over the run, first and last included.
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


@dataclass(frozen=True)
class Disk:
    """Bytes: of the adapter's weights, of adapter and checkpoints at their most, and what is free."""

    adapter: int
    needed: int
    free: int


@dataclass(frozen=True)
class Rows:
    """Rows to train on, and what is noticed about them; runs whose `data` and `model` are equal can share it."""

    dataset: Dataset
    seen: Survey


@dataclass(frozen=True)
class Preflight:
    """All that check.json holds."""

    rows: Report
    seen: Survey
    steps: Steps
    layers: Layers
    disk: Disk
    warnings: list[str]


@dataclass(frozen=True)
class Known:
    """As much of it as can be known; None is what an error stands in the way of."""

    rows: Rows | None
    steps: Steps | None
    layers: Layers | None
    disk: Disk | None
    warnings: list[str]


class Tries:
    """Parts of a check: one that fails does not keep the next from being tried. In the order of training, which would
    end with the first of the errors."""

    def __init__(self) -> None:
        self.errors: list[LoraFtError] = []

    def __call__(self, part: Callable[..., Found], *arguments: Any) -> Found | None:
        """Return the result of the part, or None and keep its error, unless that is known already."""
        try:
            return part(*arguments)
        except LoraFtError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)
            return None

    def end(self) -> None:
        """Raise the errors, if there are any: as one, with the exit code of the first."""
        if len(self.errors) > 1:
            together = LoraFtError(
                f"{len(self.errors)} errors, of which training would end with the first:\n"
                + "\n".join(textwrap.indent(str(error), "  ").replace("  ", "- ", 1) for error in self.errors)
            )
            together.exit_code = self.errors[0].exit_code
            raise together
        for error in self.errors:
            raise error


def check_machine(cfg: config.TrainRun) -> None:
    """ConfigError for what no other rows would change: several processes, a device or kernels that are not here."""
    ranks.current()
    choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)


def read_rows(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read the rows of a run, make and survey its examples; raises the errors of `prepare`."""
    found = read(cfg.data)
    dataset = prepare_rows(found, cfg.data, tokenizer, objectives.find(cfg.objective).examples)
    return Rows(dataset, survey(found, dataset, cfg.data, tokenizer))


def check_first(cfg: config.TrainRun, rows: Rows, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Preflight:
    """Check all that needs no weights of a run that trains on `rows` and will write below `folder`.

    Raises what `make_learner` raises, and ResourceError where the disk is too full; several errors as one.
    """
    tries = Tries()
    known = look(tries, cfg, rows, tokenizer, folder)
    tries.end()
    assert known.steps and known.layers and known.disk  # only an error leaves one out
    return Preflight(rows.dataset.report, rows.seen, known.steps, known.layers, known.disk, known.warnings)


def look(
    tries: Tries, cfg: config.TrainRun, rows: Rows | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Known:
    """All that can be known of such a run, also without its rows; what fails is in `tries`."""
    objective = tries(objectives.find, cfg.objective)
    base = tries(
        load_meta_model, cfg.model, cfg.quant, cfg.device, tokenizer, objective.model_class if objective else None
    )
    tries(trackers.check, cfg.track)
    steps = _steps(cfg, rows.dataset) if rows else None
    if rows and steps:
        tries(state.check_added_tokens, cfg.model, tokenizer, rows.dataset.train)
        if base:
            tries(_check_lengths, cfg, base, rows.dataset)
        tries(state.check_warmup, cfg.optim, steps.count)
    layers = tries(summary.layers, base, cfg) if base else None
    disk = tries(_disk, cfg, folder, layers.trainable, steps.count) if layers and steps else None
    said = [
        *(warnings_of_rows(rows.seen, rows.dataset.report, cfg.data) if rows else ()),
        *(_foreign_ends(rows.seen, base) if rows and base else ()),
        *(_doubtful_steps(steps, len(rows.dataset.train), cfg.train) if rows and steps else ()),
        *(summary.warnings(layers, cfg) if layers else ()),
        *(_unseen_weights(base) if base and cfg.adapter.init_from else ()),
        *without_effect(
            cfg, rows.dataset if rows else None, steps.count if steps else 0, steps.largest if steps else 0
        ),
    ]
    return Known(rows, steps, layers, disk, said)


def _check_lengths(cfg: config.TrainRun, base: Base, dataset: Dataset) -> None:
    eval_examples, _ = state.choose_eval(dataset, cfg.train.eval_rows)
    state.check_lengths([*dataset.train, *eval_examples], base.model, cfg.train)


def _steps(cfg: config.TrainRun, dataset: Dataset) -> Steps:
    lengths = np.array([len(document.ids) for document in dataset.train])
    planned = state.plan_steps(dataset.train, cfg.train, cfg.seed)
    count = len(planned)
    tokens = [int(lengths[step].sum()) for step in planned]
    rates = [learning_rate(cfg.optim, step, count) for step in range(count)]
    shown = np.unique(np.linspace(0, count - 1, _RATES).round().astype(int))
    return Steps(
        count=count,
        epochs=sum(map(len, planned)) / len(lengths),
        smallest=min(tokens),
        median=float(np.median(tokens)),
        largest=max(tokens),
        alone=int((lengths > cfg.train.tokens_per_step).sum()),
        first_rate=rates[0],
        peak_rate=max(rates),
        last_rate=rates[-1],
        rates=[rates[i] for i in shown],
    )


def _disk(cfg: config.TrainRun, folder: Path, num_trainable: int, num_steps: int) -> Disk:
    disk = Disk(4 * num_trainable, checkpoint.bytes_needed(num_trainable, num_steps, cfg), durable.free_bytes(folder))
    checkpoint.check_free_space(folder, disk.needed)
    return disk


def _foreign_ends(seen: Survey, base: Base) -> Iterator[str]:
    """Ends of turns that the base's files do not call an end: `lora-ft chat` knows them, other programs may not."""
    listed = base.model.generation_config.eos_token_id if base.model.generation_config else None
    known = {*(listed if isinstance(listed, list) else [listed]), base.tokenizer.eos_token_id}
    for end, count in seen.ends.items():
        if base.tokenizer.convert_tokens_to_ids(end) not in known:
            yield (
                f"documents end with {end} ({count:,}), which neither the tokenizer nor generation_config.json calls "
                "an end: other programs will not stop there"
            )


def _unseen_weights(base: Base) -> Iterator[str]:
    if base.identity.weights_sha256 is None:
        yield "the base's weights are not on this machine: whether adapter.init_from was trained on them is seen later"


def _doubtful_steps(steps: Steps, documents: int, train: config.Train) -> Iterator[str]:
    if steps.alone:
        yield (
            f"{steps.alone:,} of {documents:,} documents are longer than train.tokens_per_step="
            f"{train.tokens_per_step}: each is a step of its own"
        )
    if steps.count < _FEW_STEPS and train.max_steps is None:
        yield f"few steps ({steps.count}): lower train.tokens_per_step or raise train.epochs to learn more"
