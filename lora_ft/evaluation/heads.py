"""The classes of eval rows by a classifier's head, and the yardstick that stands for its base.

                  majority   adapter
eval loss           0.6931    0.2154   nats per row
accuracy            0.5000    0.9200

A base has no head, so it predicts nothing. The yardstick gives each row the same probabilities: how often the classes
occur among the training rows.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft import metric_table
from lora_ft.classes import Classes
from lora_ft.data.examples import lengths_of
from lora_ft.data.packing import micro_batches
from lora_ft.data.rows import Example
from lora_ft.errors import DataError, NonFiniteError
from lora_ft.evaluation.class_set import ClassSet
from lora_ft.evaluation.classification import Floats, Predictions
from lora_ft.evaluation.comparison import Comparison
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.metric_table import Source
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.class_logits import class_logits
from lora_ft.ops.dropout import evaluating
from lora_ft.ops.token_loss import Paths

LossOf = Callable[[Tensor, Batch], LossSum]  # `Classification.loss_of`

BASE_IS = "the class frequencies of the training rows, given to every row: the base has no head"
_YARDSTICK_TOKENS = 1 << 16  # of a batch whose logits are known


def head_set(classes: Classes, examples: Sequence[Example], paths: Paths, tokens_per_batch: int) -> ClassSet:
    """Return eval rows with their classes; a forward pass has at most `tokens_per_batch` tokens, or one row."""

    def probabilities(model: PreTrainedModel) -> Floats:
        return predict(model, classes, examples, paths, tokens_per_batch)

    return ClassSet(classes.names, references(examples, classes), probabilities)


@torch.no_grad()
def predict(
    model: PreTrainedModel, classes: Classes, examples: Sequence[Example], paths: Paths, tokens_per_batch: int
) -> Floats:
    """Return the probabilities [rows, classes] of examples, without dropout; the model's mode is restored.

    They sum to 1, or are independent where a row may have several classes. Raises NonFiniteError for NaN or infinity.
    """
    logits = torch.zeros((len(examples), len(classes.names)), dtype=torch.float64)
    with evaluating(model):
        for rows, batch in _batches(examples, tokens_per_batch, paths.share_a_pass):
            logits[rows] = class_logits(model, batch.to(model.device), paths).double().cpu()
    if not logits.isfinite().all():
        raise NonFiniteError("logits are not finite: weights of the base or the adapter are not finite, or too large")
    return _probabilities(logits, classes)


def majority(
    loss_of: LossOf, classes: Classes, examples: Sequence[Example], sources: Mapping[str, range] | None = None
) -> Comparison:
    """Return the yardstick as the base of a comparison; each class counts once more than it occurs.

    sources: the indices of the examples of each source, if there are several.
    """
    counts = np.array(classes.counts or [0] * len(classes.names), dtype=np.float64) + 1
    rest = classes.rows + 2 - counts
    logits = torch.from_numpy(np.log(counts / rest) if classes.is_multi else np.log(counts / counts.sum()))

    def mean(some: Sequence[Example]) -> EvalLoss:
        batches = _batches(some, _YARDSTICK_TOKENS, True)
        return _mean([loss_of(logits.expand(len(rows), -1), batch) for rows, batch in batches], len(some))

    everywhere = np.repeat(_probabilities(logits[None], classes), len(examples), axis=0)
    parts = {name: mean(examples[part.start : part.stop]) for name, part in (sources or {}).items()}
    loss = replace(mean(examples), sources=parts)
    return Comparison(loss, loss, [], Predictions(classes.names, everywhere, references(examples, classes)))


def references(examples: Sequence[Example], classes: Classes) -> NDArray[np.int64] | NDArray[np.bool_]:
    """Return the class of each example, [rows]; True for each of its classes, [rows, classes], if it may have several.

    The number after the last class stands for no class.
    """
    found = np.zeros((len(examples), len(classes.names) + 1), dtype=np.bool_)
    for row, example in enumerate(examples):
        found[row, example.ids[example.supervised]] = True
    return found[:, :-1] if classes.is_multi else found.argmax(axis=1)


def check(names: Sequence[str], examples: Sequence[Example], classes: Classes, key: str) -> None:
    """Raise DataError for metrics `names` of the setting `key` that a classifier cannot have on these rows."""
    if of_answers := metric_table.of(Source.answers, names):
        raise DataError(f"{key}: {of_answers[0]} needs generated answers, and a classifier writes none")
    if "auroc" not in names:
        return
    if classes.is_multi or len(classes.names) != 2:
        what = "any number of classes a row" if classes.is_multi else f"{len(classes.names)} classes"
        raise DataError(f"{key}: auroc needs two classes, and this classifier has {what}")
    if len(examples) and len(np.unique(references(examples, classes))) != 2:
        raise DataError(f"{key}: auroc needs rows of two classes, and all eval rows have the same")


def _probabilities(logits: Tensor, classes: Classes) -> Floats:
    found: Floats = (logits.sigmoid() if classes.is_multi else logits.softmax(dim=1)).numpy()
    return found


def _batches(examples: Sequence[Example], capacity: int, packing: bool) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of examples of similar length, each with the indices of its examples in its order."""
    lengths = lengths_of(examples)
    for chunk in _chunks(lengths, max(capacity, int(lengths.max(initial=0))), packing):
        (batch,) = micro_batches([examples[i] for i in chunk], None, True)  # packing takes the longest first as well
        yield chunk, batch


def _chunks(lengths: NDArray[np.int64], capacity: int, packing: bool) -> Iterator[list[int]]:
    """Cut the indices of lengths, the longest first, into chunks of at most `capacity`, or of one without packing."""
    chunk: list[int] = []
    tokens = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if chunk and (not packing or tokens + lengths[index] > capacity):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(index)
        tokens += int(lengths[index])
    if chunk:
        yield chunk


def _mean(losses: Sequence[LossSum], rows: int) -> EvalLoss:
    weight = math.fsum(loss.weight for loss in losses)
    metrics: Counter[str] = Counter()
    for loss in losses:
        metrics.update({name: value.item() for name, value in loss.metrics.items()})
    total = math.fsum(loss.sum.item() for loss in losses) / weight
    return EvalLoss(total, rows, rows, {name: value / weight for name, value in metrics.items()})
