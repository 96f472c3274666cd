"""Fit adapters to data: check first -> load -> attach -> resume -> fit -> audit -> save. Read this file first.

lora-ft train model=smollm2_135m quant=nf4 data=chatterbot adapter.r=8 train.max_steps=50

rows -prepare-> token rows --------------------+
base -load-> frozen model -attach-> + adapter --+-> loop: loss_sum / supervised tokens -> backward, step
                                                +-> RUN FOLDER: metrics, result, adapter/

Several adapters take turns on one base (`lora-ft sweep`); what they share is made once.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs
from lora_ft.adapters import audit
from lora_ft.cli import entry
from lora_ft.config import Schedule
from lora_ft.data.dataset import Dataset
from lora_ft.errors import ResourceError
from lora_ft.evaluation.comparison import Comparison
from lora_ft.io import durable
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, load_base, load_tokenizer, resolve_device
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.gradient_checkpointing import available_bytes
from lora_ft.ops.kernels import choose_kernels
from lora_ft.ops.token_loss import Paths
from lora_ft.training import checkpoint, logs
from lora_ft.training.dry_run import Rows, check_first, check_machine, read_rows
from lora_ft.training.finish import Result, finish
from lora_ft.training.halving import Halving
from lora_ft.training.optimizers import learner_bytes
from lora_ft.training.paths import use_fast_paths
from lora_ft.training.progress import displayed
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import Learner, make_learner
from lora_ft.training.trackers import Tracked, tracked
from lora_ft.training.trainer import Metrics, Watcher, fit_each

log = logging.getLogger("lora_ft")


@dataclass(frozen=True)
class Job:
    """One adapter to train: its place in the list it came in, settings, run folder and number of parameters."""

    number: int
    cfg: config.TrainRun
    folder: Path
    num_trainable: int


@dataclass(frozen=True)
class Shared:
    """What is there once for all adapters of a base; `fingerprint` is of its bytes before the first step.

    compared: comparisons with the bare base, by what decides the base's part in them.
    """

    base: Base
    dataset: Dataset
    paths: Paths
    fingerprint: str
    compared: dict[object, Comparison] = field(default_factory=dict)


class BaseTouched(Exception):
    """A job failed while its adapter was being attached: the base may hold traces of it, and has to be loaded again."""


def main(cfg: config.TrainRun, invocation: entry.Invocation) -> float | None:
    """Run one training from the command line; returns the held-out loss, which a sweeper can minimize."""
    folder = invocation.folder
    with runs.locked(folder):
        if not runs.begin(folder, cfg, invocation.overrides):
            sys.stdout.write(f"{folder} is finished: nothing to resume\n")
            return runs.read_result(folder).get("heldout_loss")
        with displayed([folder]) as progress, on_signals() as stop:
            (result,) = train([cfg], [folder], progress, stop)
    return result.heldout_loss


def train(
    cfgs: list[config.TrainRun], folders: list[Path], progress: Watcher, stop: Stop | None = None
) -> list[Result]:
    """Train one adapter per config over one base, as `train_each` does; the first failure is raised."""
    results = {}
    for number, outcome in train_each(cfgs, folders, progress, stop):
        if isinstance(outcome, Exception):
            raise outcome
        results[number] = outcome
    if left := len(cfgs) - len(results):
        raise ResourceError(f"out of memory for {len(cfgs)} adapters on one base at a time: train {left} of them apart")
    return [results[number] for number in range(len(cfgs))]


def train_each(
    cfgs: list[config.TrainRun],
    folders: list[Path],
    progress: Watcher,
    stop: Stop | None = None,
    halving: Halving | None = None,
) -> Iterator[tuple[int, Result | Exception]]:
    """Train one adapter per config over one base; yields number and outcome of each as it ends.

    The configs share model, quant, data, fast and device. Each folder must have been made by `runs.create`; a learner
    whose folder holds a checkpoint goes on from there. What fails for one is yielded, what fails for all is raised:
    errors of lora_ft.errors, BaseTouched, and Interrupted where `stop` was asked for. Where memory does not allow all
    of them on one base, the last ones are left out.
    """
    started = time.perf_counter()
    progress.turn(None, "loading")
    keep_freed_memory()
    check_machine(cfgs[0])
    tokenizer = load_tokenizer(cfgs[0].model)
    rows = read_rows(cfgs[0], tokenizer)
    jobs = []
    for number, (cfg, folder) in enumerate(zip(cfgs, folders, strict=True)):
        try:
            jobs.append(_checked(number, cfg, folder, rows, tokenizer))
        except Exception as error:
            yield number, error
    if not jobs:
        return
    shared = _load(jobs, rows.dataset, tokenizer)
    learners: dict[str, tuple[Job, Learner]] = {}
    for job in _fitting(jobs, shared.base):
        try:
            learner = _begin(job, shared, [learner for _, learner in learners.values()], halving)
        except Exception as error:
            yield job.number, error
            raise BaseTouched from None
        learners[learner.name] = job, learner
    log.info("ready in %.1f s", time.perf_counter() - started)
    left = len(learners)
    with tracked([learner for _, learner in learners.values()]) as track:
        for learner, failure in _fit(learners, track, progress, stop, halving):
            job, left = learners[learner.name][0], left - 1
            progress.turn(job.folder, "end")
            if not left:
                progress.end()
            outcome = failure or _ended(learner, shared)
            track.ended(learner, outcome)
            yield job.number, outcome


def _checked(number: int, cfg: config.TrainRun, folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Job:
    """All checks of a run that need no weights: what `lora-ft check` shows is kept in check.json."""
    with logs.about(folder):
        preflight = check_first(cfg, rows, tokenizer, folder)
        durable.write_json(folder / runs.CHECK, asdict(preflight))
        for warning in preflight.warnings:
            log.warning(warning)
    return Job(number, cfg, folder, preflight.layers.trainable)


def _load(jobs: list[Job], dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Shared:
    cfg = jobs[0].cfg
    kernels = choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)
    base = load_base(cfg.model, cfg.quant, cfg.device, tokenizer)
    switch_off_dropout(base.model)
    before = fingerprint(base.model)
    paths = use_fast_paths(
        base.model, cfg.fast, kernels, {part for job in jobs for part in job.cfg.adapter.modules_to_save}
    )
    for reason in paths.reasons:
        log.info(reason)
    log.info(str(dataset.report))
    return Shared(base, dataset, paths, before)


def _fitting(jobs: list[Job], base: Base) -> list[Job]:
    """The first jobs whose learners leave half of the memory that is left to their steps; one always."""
    available, taken = available_bytes(base.model.device), 0
    for count, job in enumerate(jobs):
        taken += learner_bytes(job.num_trainable, job.cfg)
        if count and available is not None and taken > available / 2:
            log.info("memory allows %d of %d adapters on this base at a time", count, len(jobs))
            return jobs[:count]
    return jobs


def _begin(job: Job, shared: Shared, others: list[Learner], halving: Halving | None) -> Learner:
    """The learner of a job, where its run's newest checkpoint stands."""
    with logs.about(job.folder):
        model = others[-1].model if others else shared.base.model
        name = f"adapter{len(others)}"
        learner = make_learner(
            name, job.cfg, job.folder, shared.base, model, shared.dataset, shared.paths, shared.fingerprint
        )
        log.info("%s parameters train, %d steps", f"{learner.num_trainable:,}", len(learner.steps))
        if halving:
            halving.set_rungs(learner)
        checkpoint.resume(learner)
        if runs.keep_changes(job.folder, job.cfg) and job.cfg.optim.schedule is not Schedule.constant:
            log.warning("the learning rate goes on by the schedule of the longer run, not from where it had fallen to")
    return learner


def _fit(
    learners: dict[str, tuple[Job, Learner]],
    track: Tracked,
    progress: Watcher,
    stop: Stop | None,
    halving: Halving | None,
) -> Iterator[tuple[Learner, Exception | None]]:
    def observe(learner: Learner, metrics: Metrics) -> None:
        track(learner, metrics)
        progress(learner, metrics)

    def begins(learner: Learner) -> None:
        progress.turn(learner.folder, "step")

    return fit_each([learner for _, learner in learners.values()], observe, stop, halving, begins)


def _ended(learner: Learner, shared: Shared) -> Result | Exception:
    with logs.about(learner.folder):
        try:
            audit.check_base_unchanged(shared.fingerprint, fingerprint(shared.base.model))
            return finish(learner, shared.base, shared.dataset, shared.compared)
        except Exception as error:
            return error


if __name__ == "__main__":
    entry.run("train")
