"""Compute the eval loss: the mean over all supervised tokens of the eval set, however its examples are batched.

    loss = sum of token losses / supervised tokens        perplexity = exp(loss)

Weights of messages count as in training: the loss of a token times its weight, divided by the sum of the weights.
A mean of batch means would depend on the batch size; here only rounding does. Examples of several sources are batched
source by source, so that one pass gives the sum of each source and of all.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_ft.data.packing import longest_group, packed
from lora_ft.data.rows import Example
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.dropout import evaluating
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.ops.token_loss import Paths

Loss = Callable[[PreTrainedModel, Batch, Paths], LossSum]  # `Objective.loss`


@dataclass(frozen=True)
class EvalLoss:
    """Weighted mean of the loss over `rows` examples with `tokens` supervised tokens; for sft in nats per token.

    metrics: further means of the objective, by name. sources: of each source of `data.sources` alone.
    """

    loss: float
    tokens: int
    rows: int
    metrics: dict[str, float] = field(default_factory=dict)
    sources: dict[str, "EvalLoss"] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def losses(self) -> dict[str, float]:
        """Loss of each source."""
        return {name: source.loss for name, source in self.sources.items()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "EvalLoss":
        """Rebuild an eval loss from the result of `dataclasses.asdict`."""
        sources = {name: cls.from_plain(source) for name, source in plain.get("sources", {}).items()}
        return cls(**{**plain, "sources": sources})


@torch.no_grad()
def eval_loss(
    model: PreTrainedModel,
    loss: Loss,
    examples: Sequence[Example],
    paths: Paths,
    tokens_per_microbatch: int,
    sources: Mapping[str, range] | None = None,
    ranks: Ranks = ALONE,
) -> EvalLoss:
    """Evaluate examples without dropout and without random numbers. The model's mode is restored.

    A forward pass has at most `tokens_per_microbatch` tokens, or as many as the longest group of examples.
    sources: the indices of the examples of each source, in order; by default all examples are of one. ranks: the
    processes that share the work; each of them gets the result.
    """
    capacity = max(tokens_per_microbatch, longest_group(examples))
    with evaluating(model):
        parts = {
            name: _sums(model, loss, examples[part.start : part.stop], paths, capacity, ranks)
            for name, part in (sources or {"": range(len(examples))}).items()
        }
    whole = _Sums()
    for part in parts.values():
        whole.add(part)
    return whole.mean({name: part.mean() for name, part in parts.items()} if sources else {})


@dataclass
class _Sums:
    """Sums over examples: of the loss, of its weight, of tokens and rows, and of further metrics."""

    total: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    rows: int = 0
    metrics: Counter[str] = field(default_factory=Counter)

    def add(self, other: "_Sums") -> None:
        self.total += other.total
        self.weight += other.weight
        self.tokens += other.tokens
        self.rows += other.rows
        self.metrics.update(other.metrics)

    def mean(self, sources: dict[str, EvalLoss] | None = None) -> EvalLoss:
        metrics = {name: value / self.weight for name, value in self.metrics.items()}
        return EvalLoss(self.total / self.weight, self.tokens, self.rows, metrics, sources or {})


def _sums(
    model: PreTrainedModel, loss: Loss, examples: Sequence[Example], paths: Paths, capacity: int, ranks: Ranks
) -> _Sums:
    own = _Sums()
    for batch, counts in ranks.turns(packed(examples, capacity, paths.share_a_pass)):
        found = loss(model, batch.to(model.device), paths)
        if counts:
            metrics = Counter({name: value.item() for name, value in found.metrics.items()})
            own.add(_Sums(found.sum.item(), found.weight, sum(batch.counts), metrics=metrics))
    sums = _Sums(rows=len(examples))
    for part in ranks.gathered(vars(own)):
        sums.add(_Sums(**part))
    return sums
