"""Train one adapter: rows, base, attach, fit, save. Read this file first.

lora-ft train model=smollm2_135m quant=nf4 data=chatterbot adapter.r=8 train.max_steps=50

rows -> examples -> packed batches -------------------+
base -> quantize -> freeze -> accelerate -> attach ---+-> trainer: loss sums / weight -> backward -> clip, step
                                                      +-> callbacks: progress, trackers, your own
                                                      +-> RUN FOLDER: metrics.jsonl, result.json, adapter/

Several processes (training/ranks.py) run the same lines, each with its part of every step; the main one writes.

The jobs of a sweep share the rows and the base: each is attached, trained and detached in turn.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_ft import config, run_rows, runs, validation
from lora_ft.adapters import audit, init
from lora_ft.cli import entry
from lora_ft.config import Schedule
from lora_ft.io import durable
from lora_ft.memory import auto
from lora_ft.memory.forecast import Forecast
from lora_ft.models import device
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.shards import sharded
from lora_ft.ops.ranks import Ranks
from lora_ft.training import checkpoint, trackers
from lora_ft.training.callbacks import Callback, Callbacks, checked
from lora_ft.training.deterministic import deterministic_kernels
from lora_ft.training.dry_run import dry_run
from lora_ft.training.finish import Result, finish
from lora_ft.training.metrics import reset_peak_memory
from lora_ft.training.out_of_memory import out_of_memory_as_error
from lora_ft.training.progress import displayed
from lora_ft.training.ranks import joined
from lora_ft.training.shared import Shared, load, prepare
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import attached
from lora_ft.training.trainer import fit

log = logging.getLogger("lora_ft")


def main(cfg: config.TrainRun, invocation: entry.Invocation) -> float | None:
    """Run one training from the command line; return train.best_metric of the adapter, which a sweeper can optimize."""
    with joined(cfg.dist, cfg.device) as ranks:
        folder = Path(ranks.agreed(str(invocation.folder)))  # has the time in its name
        if not _run(cfg, folder, invocation.overrides, ranks) and ranks.is_main:
            _tell_finished(folder)
        value: float | None = ranks.on_main(lambda: runs.objective(runs.read_result(folder)))
    return value


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
    cfg, callbacks = validation.typed(cfg, config.TrainRun), checked(callbacks)
    with joined(cfg.dist, cfg.device) as ranks:
        folder = Path(ranks.agreed(str(runs.folder_of(cfg, folder))))
        cfg = run_rows.with_rows(cfg, folder, rows, eval_rows)
        validation.locate_paths(cfg)
        validation.validate(cfg)
        _run(cfg, folder, [], ranks, callbacks, partial(run_rows.write_rows, folder, rows, eval_rows))
        ranks.wait()  # for the result
        return Run(folder, Result(**runs.read_result(folder)), runs.read_metrics(folder))


def _run(
    cfg: config.TrainRun,
    folder: Path,
    overrides: list[str],
    ranks: Ranks,
    callbacks: Sequence[Callback] = (),
    write_rows: Callable[[], None] = lambda: None,
) -> bool:
    """Begin or continue the run of a folder; return False if it is finished. The main rank writes and has callbacks."""
    with contextlib.ExitStack() as held:
        if ranks.is_main:
            held.enter_context(runs.locked(folder))
        if not ranks.on_main(runs.begin, folder, cfg, overrides):
            return False
        ranks.on_main(write_rows)
        shown = [held.enter_context(displayed(folder)), *callbacks] if ranks.is_main else []
        stop = held.enter_context(on_signals(tells=ranks.is_main))
        train_job(cfg, folder, prepare(cfg, ranks), shown, stop)
    return True


def _tell_finished(folder: Path) -> None:
    result = runs.read_result(folder)
    reason = result.get("stopped_by")
    stopped = f", stopped after step {result['steps']}: {reason}" if reason else ""
    sys.stdout.write(f"{folder} is already finished{stopped}. More train.epochs or train.max_steps continue it\n")


def train_job(
    cfg: config.TrainRun,
    folder: Path,
    shared: Shared,
    callbacks: Sequence[Callback] = (),
    stop: Stop | None = None,
    until: int | None = None,
) -> Result | None:
    """Train the run of a folder that was begun by `runs.begin`, from its newest checkpoint if it has one.

    Returns None if it paused after `until` steps, with a checkpoint. When it returns or raises, the base is unchanged
    and the adapter's memory is freed. Raises ResourceError if memory is too small.
    """
    target = device.resolve_device(cfg.device)
    if shared.ranks.is_main:
        runs.record_device(folder, device.describe(target))
    reset_peak_memory(target)
    memory = Forecast(cfg, shared, target)
    deterministic, oom = deterministic_kernels(cfg.train.deterministic, target), partial(memory.explain, folder)
    with device.selected(target), deterministic, out_of_memory_as_error(oom):
        return _train_job(cfg, folder, shared, memory, callbacks, stop, until)


def _train_job(
    cfg: config.TrainRun,
    folder: Path,
    shared: Shared,
    memory: Forecast,
    callbacks: Sequence[Callback],
    stop: Stop | None,
    until: int | None,
) -> Result | None:
    started, ranks = time.perf_counter(), shared.ranks
    if ranks.is_main:
        _check(cfg, folder, shared, memory)
    shared.base = loaded = shared.base or load(cfg, shared.tokenizer, shared.rows.dataset.classes)
    ranks.check_equal("the base (hash of its weights)", loaded.fingerprint)
    for reason in loaded.accelerated.reasons:
        log.info(reason)
    base, dataset = loaded.base, shared.rows.dataset
    changes_base = init.find(cfg.adapter.init).changes_base
    if changes_base or ranks.shards:
        shared.base = None  # the next job loads its own
    log.info(str(dataset.report))
    callback = Callbacks([*trackers.callbacks(cfg.track), *callbacks] if ranks.is_main else [])
    with attached(cfg, folder, base, dataset, loaded.accelerated.paths, loaded.fingerprint, ranks) as state:
        log.info("%s parameters train, %d steps", f"{state.num_trainable:,}", len(state.steps))
        try:
            checkpoint.resume(state)
            if ranks.world_size > 1:
                ranks.check_equal("the settings, rows, base and adapter (hashes)", [state.inputs, state.values_hash()])
            auto.settle(state)
            if ranks.on_main(runs.keep_changes, folder, cfg):
                state.stopped_by = None  # what a callback stopped is continued by asking for more steps
                if cfg.optim.schedule is not Schedule.constant and ranks.is_main:
                    log.warning("the learning rate now follows the schedule of the longer run")
            with sharded(base.model, ranks) as shards:
                before = shards.checksum() if shards else loaded.fingerprint
                log.info("ready in %.1f s", time.perf_counter() - started)
                callback.on_start(state)
                fit(state, [callback], stop, until, shared.base_losses)
                result = None
                if state.is_done:
                    if state.stopped_by:
                        log.info("stopped after step %d of %d: %s", state.step, len(state.steps), state.stopped_by)
                    if not changes_base:
                        after = shards.checksum() if shards else fingerprint(base.model)
                        audit.check_base_unchanged(before, after)
                    memory.follow(state)
                    state.predicted_peak_bytes = memory.peak() if ranks.is_main else None
                    result = finish(state, base, dataset, shared.comparisons)
        except BaseException as error:
            memory.follow(state)
            callback.on_end(state, error)
            raise
        callback.on_end(state, result)
    return result


def _check(cfg: config.TrainRun, folder: Path, shared: Shared, memory: Forecast) -> None:
    check = dry_run(cfg, shared.rows, shared.tokenizer, folder)
    durable.write_json(folder / runs.CHECK, asdict(check))
    for warning in check.warnings:
        log.warning(warning)
    memory.check(check)


if __name__ == "__main__":
    entry.run("train")
