"""What is known of a run before its base is loaded: rows, masks, steps, learning rate, layers, disk.

    dataset, preflight = check_first(cfg, tokenizer, folder)    # raises what training would raise, minutes earlier
    preflight.steps.count, preflight.layers.trainable           # equal those of the run's result.json
    preflight.warnings                                          # allowed, but seldom meant

`lora-ft check` shows it; `train` does it first, keeps it as check.json and logs the warnings. Nothing is computed
twice in two ways: rows come from `prepare_rows`, steps from `plan_steps`, and the layers are PEFT's own, attached to
the base's skeleton.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_ft import config, durable
from lora_ft.adapters import outline
from lora_ft.adapters.outline import Layers
from lora_ft.data.prepare import Dataset, Report, prepare_rows
from lora_ft.data.read import read
from lora_ft.data.survey import Survey, survey
from lora_ft.data.survey import warnings as warnings_of_rows
from lora_ft.models.load import Base
from lora_ft.models.skeleton import load_skeleton
from lora_ft.training import checkpoint, learner
from lora_ft.training.optimizers import learning_rate
from lora_ft.training.unused import without_effect

_RATES = 60  # points of the learning rate's curve, which fit on a line
_FEW_STEPS = 10


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
class Preflight:
    """All that check.json holds."""

    rows: Report
    seen: Survey
    steps: Steps
    layers: Layers
    disk: Disk
    warnings: list[str]


def check_first(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Dataset, Preflight]:
    """Read and tokenize the rows of a run that will write below `folder`, and check all that needs no weights.

    Raises what `prepare` and `make_learner` raise, and ResourceError where the disk is too full.
    """
    found = read(cfg.data)
    dataset = prepare_rows(found, cfg.data, tokenizer)
    seen = survey(found, dataset, cfg.data, tokenizer)
    base = load_skeleton(cfg.model, cfg.quant, cfg.device, tokenizer)
    steps = _steps(cfg, base, dataset)
    layers = outline.layers(base, cfg)
    disk = _disk(cfg, folder, layers.trainable, steps.count)
    said = [
        *warnings_of_rows(seen, dataset.report, cfg.data),
        *_foreign_ends(seen, base),
        *_doubtful_steps(steps, len(dataset.train), cfg.train),
        *outline.warnings(layers, cfg.adapter),
        *without_effect(cfg, dataset, steps.count, steps.largest),
    ]
    return dataset, Preflight(dataset.report, seen, steps, layers, disk, said)


def _steps(cfg: config.TrainRun, base: Base, dataset: Dataset) -> Steps:
    learner.check_added_tokens(cfg.model, base.tokenizer, dataset.train)
    heldout, _ = learner.evaluation_rows(dataset, cfg.train.eval_rows)
    lengths = np.array([len(document.ids) for document in dataset.train])
    planned = learner.plan_steps(lengths.tolist(), cfg.train, cfg.seed)
    learner.check_lengths([*dataset.train, *heldout], base.model, cfg.train)
    learner.check_warmup(cfg.optim, len(planned))
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


def _doubtful_steps(steps: Steps, documents: int, train: config.Train) -> Iterator[str]:
    if steps.alone:
        yield (
            f"{steps.alone:,} of {documents:,} documents are longer than train.tokens_per_step="
            f"{train.tokens_per_step}: each is a step of its own"
        )
    if steps.count < _FEW_STEPS and train.max_steps is None:
        yield f"few steps ({steps.count}): lower train.tokens_per_step or raise train.epochs to learn more"
