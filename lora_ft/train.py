"""Train one adapter: rows, base, attach, fit, save. Read this file first.

lora-ft train model=smollm2_135m quant=nf4 data=chatterbot adapter.r=8 train.max_steps=50

rows -> examples -> packed batches -------------------+
base -> quantize -> freeze -> accelerate -> attach ---+-> trainer: loss sums / weight -> backward -> clip, step
                                                      +-> callbacks: progress, trackers, your own
                                                      +-> RUN FOLDER: metrics.jsonl, result.json, adapter/

The jobs of a sweep share the rows and the base: each is attached, trained and detached in turn.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft import config, objectives, runs, validation
from lora_ft.adapters import audit
from lora_ft.cli import entry
from lora_ft.config import Schedule
from lora_ft.evaluation.comparison import Comparison
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable
from lora_ft.models.acceleration import Accelerated, accelerate
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, load_base, load_tokenizer, resolve_device
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.kernels import choose_kernels
from lora_ft.training import checkpoint, trackers
from lora_ft.training.callbacks import Callback, Callbacks
from lora_ft.training.dry_run import Rows, check_first, check_machine, read_rows
from lora_ft.training.finish import Result, finish
from lora_ft.training.progress import displayed
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import attached
from lora_ft.training.trainer import fit

log = logging.getLogger("lora_ft")


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base, accelerated, with the fingerprint of its weights."""

    base: Base
    accelerated: Accelerated
    fingerprint: str


@dataclass
class Shared:
    """What the jobs of a sweep share: tokenizer, rows and, once loaded, the base.

    base_losses, comparisons: what was measured of the bare base, by what decides it, so that it is measured once.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    base: LoadedBase | None = None
    base_losses: dict[object, EvalLoss] = field(default_factory=dict)
    comparisons: dict[object, Comparison] = field(default_factory=dict)


def main(cfg: config.TrainRun, invocation: entry.Invocation) -> float | None:
    """Run one training from the command line; return the eval loss, which a sweeper can minimize."""
    folder = invocation.folder
    with runs.locked(folder):
        if not runs.begin(folder, cfg, invocation.overrides):
            sys.stdout.write(f"{folder} is finished: nothing to resume\n")
            return runs.read_result(folder).get("heldout_loss")
        with displayed(folder) as progress, on_signals() as stop:
            result = train_job(cfg, folder, prepare(cfg), [progress], stop)
    return result.heldout_loss if result else None


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its result, and the lines of metrics.jsonl."""

    folder: Path
    result: Result
    history: list[dict[str, Any]]


def train(
    cfg: config.TrainRun,
    rows: Any = None,
    eval_rows: Any = None,
    folder: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train one adapter from Python; see `lora_ft.train`."""
    folder = Path(folder or runs.new_folder()).expanduser().absolute()
    cfg = runs.with_rows(cfg, folder, rows, eval_rows)
    validation.locate_paths(cfg)
    validation.validate(cfg)
    with runs.locked(folder):
        if runs.begin(folder, cfg, []):
            runs.write_rows(folder, rows, eval_rows)
            with displayed(folder) as progress, on_signals() as stop:
                train_job(cfg, folder, prepare(cfg), [progress, *callbacks], stop)
    return Run(folder, Result(**runs.read_result(folder)), runs.read_metrics(folder))


def prepare(cfg: config.TrainRun) -> Shared:
    """Read the tokenizer and the rows of a run; no weights are loaded."""
    keep_freed_memory()
    check_machine(cfg)
    tokenizer = load_tokenizer(cfg.model)
    return Shared(tokenizer, read_rows(cfg, tokenizer))


def train_job(
    cfg: config.TrainRun,
    folder: Path,
    shared: Shared,
    callbacks: Sequence[Callback] = (),
    stop: Stop | None = None,
    until: int | None = None,
) -> Result | None:
    """Train the run of a folder that was begun by `runs.begin`, from its newest checkpoint if it has one.

    Returns None if `until` steps are done and more follow: the state is saved. Afterwards, and after an error, the
    base is as it was before, and nothing of the adapter is left in memory.
    """
    started = time.perf_counter()
    check = check_first(cfg, shared.rows, shared.tokenizer, folder)
    durable.write_json(folder / runs.CHECK, asdict(check))
    for warning in check.warnings:
        log.warning(warning)
    shared.base = loaded = shared.base or load(cfg, shared)
    for reason in loaded.accelerated.reasons:
        log.info(reason)
    base, dataset = loaded.base, shared.rows.dataset
    log.info(str(dataset.report))
    told = Callbacks([*trackers.callbacks(cfg.track), *callbacks])
    with attached(cfg, folder, base, dataset, loaded.accelerated.paths, loaded.fingerprint) as state:
        log.info("%s parameters train, %d steps", f"{state.num_trainable:,}", len(state.steps))
        try:
            checkpoint.resume(state)
            if runs.keep_changes(folder, cfg) and cfg.optim.schedule is not Schedule.constant:
                log.warning("the learning rate follows the schedule of the longer run, not the one it had fallen to")
            log.info("ready in %.1f s", time.perf_counter() - started)
            told.on_start(state)
            fit(state, [told], stop, until, shared.base_losses)
            result = None
            if state.is_done:
                audit.check_base_unchanged(loaded.fingerprint, fingerprint(base.model))
                result = finish(state, base, dataset, shared.comparisons)
        except BaseException as error:
            told.on_end(state, error)
            raise
        told.on_end(state, result)
    return result


def load(cfg: config.TrainRun, shared: Shared) -> LoadedBase:
    """Load the base of a run, freeze and accelerate it."""
    kernels = choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)
    model_class = objectives.find(cfg.objective).model_class
    base = load_base(cfg.model, cfg.quant, cfg.device, shared.tokenizer, model_class)
    switch_off_dropout(base.model)
    before = fingerprint(base.model)
    made = accelerate(base.model, cfg.fast, kernels, set(cfg.adapter.modules_to_save))
    return LoadedBase(base, made, before)


if __name__ == "__main__":
    entry.run("train")
