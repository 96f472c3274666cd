"""Fit adapters to data: check first -> load -> attach -> resume -> fit -> audit -> save. Read this file first.

lora-ft train model=smollm2_135m quant=nf4 data=chatterbot adapter.r=8 train.max_steps=50

rows -prepare-> token rows --------------------+
base -load-> frozen model -attach-> + adapter --+-> loop: loss_sum / supervised tokens -> backward, step
                                                +-> RUN FOLDER: metrics, result, adapter/
"""

import hashlib
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_ft import config, durable, entry, rules, runs
from lora_ft.adapters import audit, files, origin
from lora_ft.config import Schedule
from lora_ft.data.prepare import Dataset
from lora_ft.errors import ConfigError
from lora_ft.evaluation import compare
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, load_base, load_tokenizer, resolve_device
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.kernels import Kernels, choose_kernels
from lora_ft.training import checkpoint
from lora_ft.training.learner import Learner, make_learner, overfitting
from lora_ft.training.loop import Metrics, Observer, fit
from lora_ft.training.metrics import observers, peak_memory_bytes
from lora_ft.training.paths import use_fast_paths
from lora_ft.training.preflight import check_first
from lora_ft.training.progress import Progress, displayed
from lora_ft.training.stop import Stop, on_signals

log = logging.getLogger("lora_ft")

_SAMPLE_TOKENS = 48  # enough to see what an answer is like


@dataclass(frozen=True)
class Result:
    """What result.json holds: the outcome of one run; losses in nats per token, None where nothing was held out."""

    heldout_loss: float | None
    base_heldout_loss: float | None
    heldout_tokens: int
    best_step: int | None
    best_heldout_loss: float | None
    steps: int
    stopped_early: bool
    tokens: int
    tokens_per_second: float
    train_seconds: float
    trainable_parameters: int
    peak_memory_bytes: int
    adapter_sha256: str


def main(cfg: config.TrainRun, invocation: entry.Invocation) -> float | None:
    """Run one training from the command line; returns the held-out loss, which a sweeper can minimize."""
    folder = invocation.folder
    with runs.locked(folder):
        if not (cfg.resume and runs.exists(folder)):
            runs.create(folder, rules.to_plain(cfg), invocation.overrides)
        elif not runs.reopen(folder, cfg):
            sys.stdout.write(f"{folder} is finished: nothing to resume\n")
            return runs.read_result(folder).get("heldout_loss")
        with displayed([folder]) as progress, on_signals() as stop:
            (result,) = train([cfg], [folder], progress, stop)
    return result.heldout_loss


def train(
    cfgs: list[config.TrainRun], folders: list[Path], progress: Progress, stop: Stop | None = None
) -> list[Result]:
    """Train one adapter per config over one base; the configs share model, quant, fast and device.

    Each folder must have been made by `runs.create`; a learner whose folder holds a checkpoint goes on from there.
    Errors are those of lora_ft.errors, and Interrupted where `stop` was asked for.
    """
    cfg = cfgs[0]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"training runs in one process so far, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    started = time.perf_counter()
    keep_freed_memory()
    kernels = choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)
    tokenizer = load_tokenizer(cfg.model)
    datasets = [_checked(c, tokenizer, folder) for c, folder in zip(cfgs, folders, strict=True)]
    base = load_base(cfg.model, cfg.quant, cfg.device, tokenizer)
    switch_off_dropout(base.model)
    before = fingerprint(base.model)
    learners = _make_learners(cfgs, folders, base, datasets, kernels, before)
    for learner in learners:
        checkpoint.resume(learner)
        if runs.keep_changes(learner.folder, learner.cfg) and learner.cfg.optim.schedule is not Schedule.constant:
            log.warning("the learning rate goes on by the schedule of the longer run, not from where it had fallen to")
    log.info("ready in %.1f s", time.perf_counter() - started)
    outlets: dict[str, list[Observer]] = {learner.name: [*observers(learner), progress] for learner in learners}

    def observe(learner: Learner, metrics: Metrics) -> None:
        for outlet in outlets[learner.name]:
            outlet(learner, metrics)

    fit(learners, observe, stop)
    progress.end()
    audit.check_base_unchanged(before, fingerprint(base.model))
    return [_finish(learner, base, dataset) for learner, dataset in zip(learners, datasets, strict=True)]


def _checked(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset:
    """The rows of a run, after all checks that need no weights: what `lora-ft check` shows is kept in check.json."""
    dataset, preflight = check_first(cfg, tokenizer, folder)
    durable.write_json(folder / runs.CHECK, asdict(preflight))
    for warning in preflight.warnings:
        log.warning(warning)
    return dataset


def _make_learners(
    cfgs: list[config.TrainRun],
    folders: list[Path],
    base: Base,
    datasets: list[Dataset],
    kernels: Kernels,
    base_fingerprint: str,
) -> list[Learner]:
    in_full = {part for cfg in cfgs for part in cfg.adapter.modules_to_save}
    paths = use_fast_paths(base.model, cfgs[0].fast, kernels, in_full)
    for reason in paths.reasons:
        log.info(reason)
    model, learners = base.model, []
    for number, (cfg, folder, dataset) in enumerate(zip(cfgs, folders, datasets, strict=True)):
        log.info(str(dataset.report))
        learner = make_learner(f"adapter{number}", cfg, folder, base, model, dataset, paths, base_fingerprint)
        model = learner.model
        log.info("%s parameters train, %d steps", f"{learner.num_trainable:,}", len(learner.steps))
        learners.append(learner)
    return learners


def _finish(learner: Learner, base: Base, dataset: Dataset) -> Result:
    """Check what was learned, save it, compare it with the base, and say so."""
    adapter, train = learner.folder / "adapter", learner.cfg.train
    learner.take_kept_state()
    source = origin.Origin(base.identity, learner.cfg.quant, dataset.report.sha256)
    files.save(learner.model, learner.name, adapter, base.tokenizer, source)
    for sentence in overfitting(learner):
        log.info(sentence)
    comparison = None
    if learner.heldout:
        learner.model.set_adapter(learner.name)
        log.info("comparing base and adapter on %d held-out rows", len(learner.heldout))
        comparison = compare.compare(
            learner.model,
            base.tokenizer,
            learner.heldout,
            learner.questions,
            learner.paths,
            train.tokens_per_microbatch or train.tokens_per_step,
            train.samples,
            _SAMPLE_TOKENS,
        )
    result = Result(
        heldout_loss=comparison.adapter.loss if comparison else None,
        base_heldout_loss=comparison.base.loss if comparison else None,
        heldout_tokens=comparison.adapter.tokens if comparison else 0,
        best_step=learner.best.step if learner.best else None,
        best_heldout_loss=learner.best.heldout.loss if learner.best else None,
        steps=len(learner.losses),
        stopped_early=learner.stopped_early,
        tokens=learner.tokens,
        tokens_per_second=learner.tokens / learner.seconds,
        train_seconds=learner.seconds,
        trainable_parameters=learner.num_trainable,
        peak_memory_bytes=peak_memory_bytes(base.model.device),
        adapter_sha256=hashlib.sha256((adapter / files.WEIGHTS).read_bytes()).hexdigest(),
    )
    durable.write_json(learner.folder / runs.RESULT, asdict(result))
    _print(learner, base, comparison, result)
    return result


def _print(learner: Learner, base: Base, comparison: compare.Comparison | None, result: Result) -> None:
    facts = {
        "trainable parameters": f"{result.trainable_parameters:,}",
        "speed": f"{result.tokens_per_second:.0f} tokens/s ({result.tokens:,} tokens in {result.train_seconds:.0f} s)",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
        "adapter": str(learner.folder / "adapter"),
    }
    console = Console()
    console.print(compare.render(comparison, facts))
    # Lines to copy: outside of any table, and never folded.
    lines = origin.loading_lines(learner.folder / "adapter", base, learner.cfg)
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)


if __name__ == "__main__":
    entry.run("train")
