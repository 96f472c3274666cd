"""Types shared by packing, objectives and the trainer: a batch of packed documents, and the loss sum of a batch.

Two documents, `2+2? =4.` and `Hi Ho.`, whose answers `4.` and `Ho.` are supervised:

    ids        2+2?   =     4     .    | Hi    Ho    .
    positions  0      1     2     3    | 0     1     2      restart at each document
    targets    -100   4     .    -100  | Ho    .    -100    next token of the same document
    starts     0                         4                7
    supervised        1     2            4     5            counts [2, 2]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_ft.ops.device import copied, target

IGNORED = -100  # torch's cross-entropy ignores this target by default


# A GPU's allocator keeps blocks of every size that a step asked for: fewer sizes leave fewer gaps.
_PADDED_TO = 64


@dataclass(frozen=True)
class Batch:
    """Concatenated documents. ids, positions, targets: int64 [tokens]; starts: cumulative document boundaries.

    weights: float32 [tokens], of the targets; None if each weighs 1. Tokens after the last boundary are padding: a
    model computes them as a document of their own, without targets.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    starts: list[int]
    weights: Tensor | None = None

    @property
    def all_starts(self) -> list[int]:
        """Document boundaries, with the padding as a last document."""
        return self.starts if self.starts[-1] == len(self.ids) else [*self.starts, len(self.ids)]

    @cached_property
    def supervised(self) -> Tensor:
        """Indices of the positions with a target."""
        return (self.targets != IGNORED).nonzero()[:, 0]

    @cached_property
    def counts(self) -> list[int]:
        """Number of supervised positions of each document."""
        boundaries = torch.tensor(self.starts, device=self.supervised.device)
        counts: list[int] = torch.searchsorted(self.supervised, boundaries).diff().tolist()
        return counts

    @cached_property
    def weight(self) -> float:
        """Sum of the weights of the supervised positions: their number if each weighs 1."""
        if self.weights is None:
            return sum(self.counts)
        return float(self.weights[self.supervised].double().sum())

    @property
    def supervised_weights(self) -> Tensor | None:
        """Weights of the supervised positions; None if each weighs 1."""
        return None if self.weights is None else self.weights[self.supervised]

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, with indices and counts of the supervised positions, computed on the host.

        For a GPU it is padded.
        """
        batch = self.padded(_PADDED_TO) if target(device).kind == "cuda" else self

        ids, positions, targets = (copied(each, device) for each in (batch.ids, batch.positions, batch.targets))
        weights = None if batch.weights is None else copied(batch.weights, device)
        moved = Batch(ids, positions, targets, self.starts, weights)
        vars(moved).update(counts=self.counts, supervised=copied(self.supervised, device), weight=self.weight)
        return moved

    def padded(self, multiple: int) -> "Batch":
        """Return the batch with padding up to a multiple of tokens."""
        missing = -len(self.ids) % multiple
        if not missing:
            return self
        positions = torch.cat([self.positions, torch.arange(missing, device=self.positions.device)])
        ids, targets = pad(self.ids, (0, missing)), pad(self.targets, (0, missing), value=IGNORED)
        weights = None if self.weights is None else pad(self.weights, (0, missing))
        return Batch(ids, positions, targets, self.starts, weights)

    def documents(self) -> list["Batch"]:
        """Split the batch into batches of one document; nothing is read from the device."""
        documents = []
        parts = zip(pairwise(self.starts), self.counts, self.supervised.split(self.counts), strict=True)
        for (start, end), count, supervised in parts:
            weights = None if self.weights is None else self.weights[start:end]
            document = Batch(
                self.ids[start:end], self.positions[start:end], self.targets[start:end], [0, end - start], weights
            )
            vars(document).update(counts=[count], supervised=supervised - start)
            documents.append(document)
        return documents


@dataclass(frozen=True)
class LossSum:
    """The loss of a batch before the division.

    sum: scalar with its graph. weight: this batch's part of the divisor; the trainer divides the sum over a step by
    the weights over that step. metrics: further sums by name, divided in the same way and written to metrics.jsonl.
    """

    sum: Tensor
    weight: float
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def detach(self) -> "LossSum":
        """Return the same values without the graph."""
        return LossSum(self.sum.detach(), self.weight, {name: value.detach() for name, value in self.metrics.items()})
