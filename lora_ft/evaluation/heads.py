"""Predict the classes of eval rows with a classifier, and compare it with the class frequencies of the training rows.

                  majority   adapter
eval loss           0.6931    0.2154   nats per row
accuracy            0.5000    0.9200   50 rows

A base has no head, so it predicts nothing. The yardstick in its place gives each row the same probabilities: how often
the classes occur among the training rows.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.classes import Classes
from lora_ft.data.packing import longest_group, micro_batches
from lora_ft.data.rows import Example
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation.classification import Predictions
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.class_logits import class_logits
from lora_ft.ops.token_loss import Paths

LossOf = Callable[[Tensor, Batch], LossSum]  # `Classification.loss_of`

MAJORITY = "majority"
BASE_IS = "the class frequencies of the training rows, given to every row: the base has no head"


@dataclass(frozen=True)
class HeadPredictions:
    """Logits [rows, classes] of eval rows in their order, their targets [rows, classes], and their mean loss."""

    classes: Classes
    logits: NDArray[np.float64]
    targets: NDArray[np.bool_]
    loss: EvalLoss

    @property
    def with_probabilities(self) -> Predictions:
        """The same with probabilities: they sum to 1, or are independent where a row may have several classes."""
        logits, is_multi = torch.from_numpy(self.logits), self.classes.is_multi
        probabilities = logits.sigmoid() if is_multi else logits.softmax(dim=1)
        references = self.targets if is_multi else self.targets.argmax(axis=1)
        return Predictions(list(self.classes.names), probabilities.numpy(), references)


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    loss_of: LossOf,
    classes: Classes,
    examples: Sequence[Example],
    paths: Paths,
    tokens_per_microbatch: int,
) -> HeadPredictions:
    """Predict examples without dropout. The model's mode is restored. Raises NonFiniteError for NaN or infinity.

    A forward pass has at most `tokens_per_microbatch` tokens, or as many as the longest example.
    """
    was_training = model.training
    model.eval()
    logits = np.zeros((len(examples), len(classes.names)))
    losses = []
    for rows, batch in _batches(examples, tokens_per_microbatch, paths.share_a_pass):
        batch = batch.to(model.device)
        found = class_logits(model, batch, paths)
        losses.append(loss_of(found, batch))
        logits[rows] = found.double().cpu().numpy()
    model.train(was_training)
    if not np.isfinite(logits).all():
        raise NonFiniteError("logits are not finite: weights of the base or the adapter are not finite, or too large")
    return HeadPredictions(classes, logits, targets_of(examples, classes), _mean(losses, len(examples)))


def majority(loss_of: LossOf, classes: Classes, examples: Sequence[Example]) -> HeadPredictions:
    """Predict for each example the class frequencies of the training rows; each class counts once more."""
    counts = np.array(classes.counts or [0] * len(classes.names), dtype=np.float64) + 1
    rest = classes.rows + 2 - counts
    logits = np.log(counts / rest) if classes.is_multi else np.log(counts / counts.sum())
    losses = [
        loss_of(torch.from_numpy(logits).expand(len(batch.counts), -1), batch)
        for _, batch in _batches(examples, 1 << 16, packing=True)
    ]
    everywhere = np.tile(logits, (len(examples), 1))
    return HeadPredictions(classes, everywhere, targets_of(examples, classes), _mean(losses, len(examples)))


def targets_of(examples: Sequence[Example], classes: Classes) -> NDArray[np.bool_]:
    """Return True for each class of each example, [rows, classes]."""
    found = np.zeros((len(examples), len(classes.names) + 1), dtype=np.bool_)
    for row, example in enumerate(examples):
        found[row, example.ids[example.supervised]] = True
    return found[:, :-1]


def _batches(examples: Sequence[Example], capacity: int, packing: bool) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of examples of similar length, each with the indices of its examples in its order."""
    for chunk in _chunks([len(example.ids) for example in examples], max(capacity, longest_group(examples)), packing):
        (batch,) = micro_batches([examples[i] for i in chunk], None, True)  # packing takes the longest first as well
        yield chunk, batch


def _chunks(lengths: list[int], capacity: int, packing: bool) -> Iterator[list[int]]:
    """Cut the indices of lengths, the longest first, into chunks of at most `capacity`, or of one without packing."""
    chunk: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunk and (not packing or tokens + lengths[index] > capacity):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(index)
        tokens += lengths[index]
    if chunk:
        yield chunk


def _mean(losses: Sequence[LossSum], rows: int) -> EvalLoss:
    weight = math.fsum(loss.weight for loss in losses)
    metrics: Counter[str] = Counter()
    for loss in losses:
        metrics.update({name: value.item() for name, value in loss.metrics.items()})
    total = math.fsum(loss.sum.item() for loss in losses) / weight
    return EvalLoss(total, rows, rows, {name: value / weight for name, value in metrics.items()})
