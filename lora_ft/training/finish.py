"""The end of a run: save the adapter, compare it with the bare base, write and print the result.

state -> adapter/  ->  base against adapter on the eval set  ->  result.json
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.text import Text

from lora_ft import metric_table, mixing, runs
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.data import split
from lora_ft.data.dataset import Dataset, EvalPrompt
from lora_ft.evaluation import class_report
from lora_ft.evaluation.classification import Classification, classify
from lora_ft.evaluation.comparison import Comparison, EvalSet, compare, render
from lora_ft.io import durable
from lora_ft.io.hashing import sha256
from lora_ft.metric_table import LOSS, Source
from lora_ft.models.load import Base
from lora_ft.objectives.classification import Classification as ByHead
from lora_ft.training.metrics import gpu_memory, peak_memory_bytes
from lora_ft.training.overfitting import overfitting
from lora_ft.training.state import NAME, TrainingState
from lora_ft.training.task_metrics import yardstick

log = logging.getLogger("lora_ft")

_SAMPLE_TOKENS = 48  # of each sample answer

Classes = tuple[Classification | None, Classification] | None  # of base and adapter; None without labels


@dataclass(frozen=True)
class Result:
    """Content of result.json: the outcome of one run; losses in nats per token, None without an eval set.

    Those of a classifier are in nats per row, and its base is the yardstick of evaluation/heads.py.

    peak_memory_bytes: of the process, which in a sweep trains several jobs; on a GPU what torch allocated for this job.
    peak_reserved_bytes, device_used_bytes: of the GPU, see `metrics.gpu_memory`; None for other devices.
    predicted_peak_bytes: the same as predicted by memory/forecast.py; None if the run was too short to trace it.
    tokens_per_microbatch: at the end of the run, None for the whole step. shrinks: how often it was halved because
    memory ran out. stopped_by: why a run ended early. eval_losses, base_eval_losses: of each source of data.sources.
    best_value: of the metric `best_metric`, which train.best_metric names, at `best_step`. metrics, base_metrics: of
    train.eval_metrics. classification: of the rows with labels; None without data.labels. eval_rows_sha256: of the
    texts of the eval rows, which are equal for runs that a metric other than the loss compares.
    """

    eval_loss: float | None
    base_eval_loss: float | None
    eval_tokens: int
    best_step: int | None
    best_eval_loss: float | None
    steps: int
    stopped_early: bool
    stopped_by: str | None
    tokens: int
    tokens_per_second: float
    train_seconds: float
    trainable_parameters: int
    peak_memory_bytes: int
    adapter_sha256: str
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    tokens_per_microbatch: int | None = None
    shrinks: int = 0
    eval_losses: dict[str, float] = field(default_factory=dict)
    base_eval_losses: dict[str, float] = field(default_factory=dict)
    best_metric: str = LOSS
    best_value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    base_metrics: dict[str, float] = field(default_factory=dict)
    classification: Classification | None = None
    eval_rows_sha256: str | None = None

    @property
    def objective(self) -> float | None:
        """The value of `best_metric` for the saved adapter, which a sweep ranks by; None without an eval set."""
        return self.eval_loss if self.best_metric == LOSS else self.metrics.get(self.best_metric)


def finish(state: TrainingState, base: Base, dataset: Dataset, comparisons: dict[object, Comparison]) -> Result | None:
    """Save the adapter, compare it with the base, write and print the result; the main rank writes, and returns it.

    `comparisons` caches comparisons, so that jobs on one base evaluate the base once.
    """
    state.take_kept_state()
    if state.ranks.is_main:
        files.save(state.model, NAME, state.folder / "adapter", base.tokenizer, _provenance(state, base, dataset))
    for sentence in overfitting(state):
        log.info(sentence)
    comparison = _compared(state, base, comparisons) if state.eval_examples else None
    if not state.ranks.is_main:
        return None
    classes = _classified(state, comparison) if comparison else None
    result = _result(state, comparison, classes)
    if classes and (drawn := class_report.picture(classes[1], "Confusion matrix of the eval rows")):
        durable.write_bytes(state.folder / runs.CONFUSION, drawn)
    durable.write_json(state.folder / runs.RESULT, asdict(result))
    _print(state, base, comparison, result, classes)
    return result


def _provenance(state: TrainingState, base: Base, dataset: Dataset) -> provenance.Provenance:
    data, classes = state.cfg.data, dataset.classes
    labels = list(classes.names) if classes else dataset.answers if mixing.has_labels(data) else None
    return provenance.Provenance(
        base.identity,
        state.cfg.quant,
        dataset.report.sha256,
        template=data.template,
        labels=labels,
        classes=classes,
    )


def _compared(state: TrainingState, base: Base, comparisons: dict[object, Comparison]) -> Comparison:
    train = state.cfg.train
    log.info("comparing base and adapter on the eval set: %d examples", len(state.eval_examples))
    capacity = state.tokens_per_microbatch or train.tokens_per_step
    key = (len(state.eval_examples), capacity, train.samples, *state.task.names, train.max_new_tokens)
    is_of_head = isinstance(state.objective, ByHead)
    eval_set = EvalSet(
        state.eval_examples,
        [] if is_of_head or state.ranks.shards else state.eval_prompts[: train.samples],
        capacity,
        _SAMPLE_TOKENS,
        state.objective.loss,
        state.eval_sources,
        state.task.classes,
        state.task,
        is_of_head,
        state.ranks,
    )
    earlier = yardstick(state.objective, eval_set) or comparisons.get(key)
    comparisons[key] = compare(state.model, base.tokenizer, eval_set, state.paths, earlier, state.measured)
    return comparisons[key]


def _classified(state: TrainingState, compared: Comparison) -> Classes:
    if compared.adapter_classes is None:
        return None
    base, seed = compared.base_classes, state.cfg.seed
    return classify(base, seed) if base else None, classify(compared.adapter_classes, seed)


def _sha256(prompts: Sequence[EvalPrompt]) -> str:
    return hashlib.sha256(b"".join(split.content_hash(prompt.row) for prompt in prompts)).hexdigest()


def _result(state: TrainingState, comparison: Comparison | None, classes: Classes) -> Result:
    patience = f"train.patience={state.cfg.train.patience}" if state.stopped_early else None
    metric, best = state.cfg.train.best_metric, state.best
    return Result(
        eval_loss=comparison.adapter.loss if comparison else None,
        base_eval_loss=comparison.base.loss if comparison else None,
        eval_tokens=comparison.adapter.tokens if comparison else 0,
        best_step=best.step if best else None,
        best_eval_loss=best.result.loss if best else None,
        steps=state.step,
        stopped_early=state.stopped_early,
        stopped_by=state.stopped_by or patience,
        tokens=state.tokens,
        tokens_per_second=state.tokens / state.seconds,
        train_seconds=state.seconds,
        trainable_parameters=state.num_trainable,
        peak_memory_bytes=peak_memory_bytes(state.base.device),
        adapter_sha256=sha256(state.folder / "adapter" / peft_folder.WEIGHTS),
        predicted_peak_bytes=state.predicted_peak_bytes,
        tokens_per_microbatch=state.tokens_per_microbatch,
        shrinks=state.shrinks,
        eval_losses=comparison.adapter.losses if comparison else {},
        base_eval_losses=comparison.base.losses if comparison else {},
        best_metric=metric,
        best_value=best.value(metric) if best else None,
        metrics=(comparison.adapter.metrics if comparison else {}) | (classes[1].metrics if classes else {}),
        base_metrics=(comparison.base.metrics if comparison else {})
        | (classes[0].metrics if classes and classes[0] else {}),
        classification=classes[1] if classes else None,
        eval_rows_sha256=_sha256(state.eval_prompts) if state.eval_prompts else None,
        **gpu_memory(state.base.device),
    )


def _print(
    state: TrainingState,
    base: Base,
    comparison: Comparison | None,
    result: Result,
    classes: Classes,
) -> None:
    reserved, predicted = result.peak_reserved_bytes, result.predicted_peak_bytes
    facts = {
        "trainable parameters": f"{result.trainable_parameters:,}",
        "speed": f"{result.tokens_per_second:.0f} tokens/s ({result.tokens:,} tokens in {result.train_seconds:.0f} s)",
        "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB"
        + (f" allocated, {reserved / 1e9:.2f} GB reserved" if reserved else "")
        + (f", {predicted / 1e9:.2f} GB predicted" if predicted else ""),
        "adapter": str(state.folder / "adapter"),
    }
    console = Console()
    of_answers = metric_table.of(Source.answers, state.task.names) if classes else state.task.names
    scores = {name: (result.base_metrics[name], result.metrics[name]) for name in of_answers} if comparison else {}
    console.print(render(comparison, facts, scores, classes))
    # Lines to copy: not inside a table, and never wrapped.
    lines = provenance.loading_lines(state.folder / "adapter", base, state.cfg)
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)
