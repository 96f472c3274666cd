"""Warnings about settings that were changed and have no effect, usually because something else was intended.

    lora-ft train optim.decay_fraction=0.1      "optim.decay_fraction has no effect: it is for optim.schedule=wsd"

Settings that contradict each other are errors of validation.py.
"""

from collections.abc import Iterator
from typing import Any

from lora_ft import config, metric_table, validation
from lora_ft.config import Optimizer, QuantKind, Schedule, TrainOn
from lora_ft.data.dataset import Dataset
from lora_ft.data.read import eval_split
from lora_ft.metric_table import Source


def ineffective(cfg: config.TrainRun, dataset: Dataset | None, num_steps: int, largest_step: int) -> list[str]:
    """Return a sentence for each changed setting without effect; rules about rows need a dataset. Unit: tokens."""
    changed = {s.key for s in validation.settings(type(cfg)) if _value(cfg, s.key) != s.default}
    cases = [*_by_settings(cfg)]
    if dataset:
        cases += [*_by_rows(cfg, dataset), *_by_steps(cfg, num_steps, largest_step)]
    return [f"{key} has no effect: {why}" for key, idle, why in cases if idle and key in changed]


def _value(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


_Cases = Iterator[tuple[str, bool, str]]  # setting, whether it has no effect, why


def _by_settings(cfg: config.TrainRun) -> _Cases:
    kind, schedule = cfg.quant.kind, cfg.optim.schedule
    four_bits = kind in (QuantKind.nf4, QuantKind.fp4)
    yield "quant.double", not four_bits, f"it is for nf4 and fp4, and quant.kind={kind.value}"
    yield "quant.compute_dtype", not four_bits, f"it is for nf4 and fp4, and quant.kind={kind.value}"
    yield "optim.decay_fraction", schedule is not Schedule.wsd, f"it is for wsd, and optim.schedule={schedule.value}"
    yield "optim.min_lr_ratio", schedule is Schedule.constant, "a constant learning rate does not fall"
    yield (
        "optim.offload",
        cfg.optim.name is not Optimizer.adamw,
        f"it is for adamw, and optim.name={cfg.optim.name.value}",
    )
    yield "data.mix_until", not cfg.data.mix, "there is no data.mix"
    of_answers = metric_table.of(Source.answers, [n for n in cfg.train.eval_metrics if n in metric_table.METRICS])
    yield "train.max_new_tokens", not of_answers, "train.eval_metrics names no metric of generated answers"
    for name in ("multi_label", "class_weights", "balanced", "label_smoothing"):
        yield f"objective.{name}", cfg.objective.name == "sft", "it is for objective=classification"
    yield "train.epochs", cfg.train.max_steps is not None, "train.max_steps overrides it"
    apart = "data.eval_path" if cfg.data.eval_path else "data.eval_split"
    yield "data.eval_fraction", bool(cfg.data.eval_path or cfg.data.eval_split), f"{apart} names the eval rows"
    only_checks = isinstance(cfg, config.CheckRun) and cfg.resume == "auto"
    yield "resume", only_checks, "check always looks at a run from its first step"


def _by_rows(cfg: config.TrainRun, dataset: Dataset) -> _Cases:
    none = "there are no eval rows"
    yield "train.eval_every_steps", not dataset.eval, none
    yield "train.eval_rows", not dataset.eval, none
    validation = eval_split(cfg.data) != cfg.data.eval_split
    yield "data.eval_fraction", validation, f"the eval rows are the validation files of {cfg.data.path}"
    yield (
        "train.samples",
        not dataset.eval_prompts,
        "the eval rows are plain text, without prompts" if dataset.eval else none,
    )
    if dataset.classes:
        yield "train.samples", bool(dataset.eval), "a classifier writes no answers"
        yield "data.train_on", True, "a classifier learns the label"
        yield "data.train_on_thoughts", True, "a classifier learns the label"
        yield "model.chat_template", True, "a classifier reads the text without a template"
    text = dataset.report.format == "text"
    yield "data.train_on", text, "plain text is learned as a whole"
    no_choice = "plain text has no thoughts" if text else "data.train_on=all learns every token"
    yield "data.train_on_thoughts", text or cfg.data.train_on is TrainOn.all, no_choice
    yield "model.chat_template", text, "plain text is not rendered by a template"


def _by_steps(cfg: config.TrainRun, num_steps: int, largest_step: int) -> _Cases:
    train = cfg.train
    every, most = train.eval_every_steps or 1, train.microbatch_limit or 0
    yield "train.eval_every_steps", every >= num_steps, f"the run is evaluated at its end, after {num_steps} steps"
    yield "train.tokens_per_microbatch", most >= largest_step, f"no step has more than {largest_step:,} tokens"
    yield "train.keep_checkpoints", train.save_every_steps is None, "train.save_every_steps=null writes one, at the end"
