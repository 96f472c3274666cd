"""The end of a run: save the adapter, compare it with the bare base, write and print the result.

state -> adapter/  ->  base against adapter on the eval set  ->  result.json
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from lora_ft import runs
from lora_ft.adapters import files, provenance
from lora_ft.data.dataset import Dataset
from lora_ft.evaluation.comparison import Comparison, EvalSet, compare, compare_classifier, render
from lora_ft.io import durable
from lora_ft.io.hashing import sha256
from lora_ft.models.load import Base
from lora_ft.objectives.classification import Classification
from lora_ft.training.metrics import gpu_memory, peak_memory_bytes
from lora_ft.training.state import NAME, TrainingState, overfitting

log = logging.getLogger("lora_ft")

_SAMPLE_TOKENS = 48  # of each sample answer


@dataclass(frozen=True)
class Result:
    """Content of result.json: the outcome of one run; losses in nats per token, None without an eval set.

    Those of a classifier are in nats per row; base_eval_loss is that of the class frequencies of the training rows.

    peak_memory_bytes: of the process, which in a sweep trains several jobs; on a GPU what torch allocated for this job.
    peak_reserved_bytes, device_used_bytes: of the GPU, see `metrics.gpu_memory`; None for other devices.
    predicted_peak_bytes: the same as predicted by memory/forecast.py; None if the run was too short to trace it.
    tokens_per_microbatch: at the end of the run, None for the whole step. shrinks: how often it was halved because
    memory ran out. stopped_by: why a run ended early. classification: metrics of a classifier on the eval set, with
    intervals, classes and confusion (evaluation/classification.py).
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
    classification: dict[str, Any] | None = None


def finish(state: TrainingState, base: Base, dataset: Dataset, comparisons: dict[object, Comparison]) -> Result:
    """Save the adapter, compare it with the base, write and print the result.

    `comparisons` caches comparisons, so that jobs on one base evaluate the base once.
    """
    adapter = state.folder / "adapter"
    state.take_kept_state()
    source = provenance.Provenance(base.identity, state.cfg.quant, dataset.report.sha256, classes=dataset.classes)
    files.save(state.model, NAME, adapter, base.tokenizer, source)
    for sentence in overfitting(state):
        log.info(sentence)
    comparison = _compared(state, base, comparisons) if state.eval_examples else None
    result = _result(state, comparison)
    durable.write_json(state.folder / runs.RESULT, asdict(result))
    _print(state, base, comparison, result)
    return result


def _compared(state: TrainingState, base: Base, comparisons: dict[object, Comparison]) -> Comparison:
    train = state.cfg.train
    log.info("comparing base and adapter on the eval set: %d examples", len(state.eval_examples))
    capacity = state.tokens_per_microbatch or train.tokens_per_step
    if isinstance(state.objective, Classification) and state.objective.classes:
        loss_of, classes = state.objective.loss_of, state.objective.classes
        return compare_classifier(state.model, loss_of, classes, state.eval_examples, state.paths, capacity)
    key = (len(state.eval_examples), capacity, train.samples)
    eval_set = EvalSet(
        state.eval_examples, state.eval_prompts[: train.samples], capacity, _SAMPLE_TOKENS, state.objective.loss
    )
    comparisons[key] = compare(state.model, base.tokenizer, eval_set, state.paths, comparisons.get(key), state.measured)
    return comparisons[key]


def _result(state: TrainingState, comparison: Comparison | None) -> Result:
    patience = f"train.patience={state.cfg.train.patience}" if state.stopped_early else None
    return Result(
        eval_loss=comparison.adapter.loss if comparison else None,
        base_eval_loss=comparison.base.loss if comparison else None,
        eval_tokens=comparison.adapter.tokens if comparison else 0,
        best_step=state.best.step if state.best else None,
        best_eval_loss=state.best.result.loss if state.best else None,
        steps=state.step,
        stopped_early=state.stopped_early,
        stopped_by=state.stopped_by or patience,
        tokens=state.tokens,
        tokens_per_second=state.tokens / state.seconds,
        train_seconds=state.seconds,
        trainable_parameters=state.num_trainable,
        peak_memory_bytes=peak_memory_bytes(state.base.device),
        adapter_sha256=sha256(state.folder / "adapter" / files.WEIGHTS),
        predicted_peak_bytes=state.predicted_peak_bytes,
        tokens_per_microbatch=state.tokens_per_microbatch,
        shrinks=state.shrinks,
        classification=asdict(found[1]) if (found := comparison and comparison.classifications) else None,
        **gpu_memory(state.base.device),
    )


def _print(state: TrainingState, base: Base, comparison: Comparison | None, result: Result) -> None:
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
    console.print(render(comparison, facts))
    # Lines to copy: not inside a table, and never wrapped.
    lines = provenance.loading_lines(state.folder / "adapter", base, state.cfg)
    console.print(Text("\n" + "\n".join(lines)), soft_wrap=True)
