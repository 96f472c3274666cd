"""Compute the eval loss: the mean over all supervised tokens of the eval set, however its examples are batched.

    loss = sum of token losses / supervised tokens        perplexity = exp(loss)

A mean of batch means would depend on the batch size; here only rounding does.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lora_ft.data.packing import longest_group, packed
from lora_ft.data.rows import Example
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths

Loss = Callable[[PreTrainedModel, Batch, Paths], LossSum]  # `Objective.loss`


@dataclass(frozen=True)
class EvalLoss:
    """Weighted mean of the loss over `rows` examples with `tokens` supervised tokens; for sft in nats per token.

    metrics: further means of the objective, by name.
    """

    loss: float
    tokens: int
    rows: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def eval_loss(
    model: PreTrainedModel, loss: Loss, examples: Sequence[Example], paths: Paths, tokens_per_microbatch: int
) -> EvalLoss:
    """Evaluate examples without dropout and without random numbers. The model's mode is restored.

    A forward pass has at most `tokens_per_microbatch` tokens, or as many as the longest group of examples.
    """
    capacity = max(tokens_per_microbatch, longest_group(examples))
    was_training = model.training
    model.eval()
    total, weight, tokens = 0.0, 0.0, 0
    metrics: Counter[str] = Counter()
    for batch in packed(examples, capacity, paths.share_a_pass):
        found = loss(model, batch.to(model.device), paths)
        total += found.sum.item()
        weight += found.weight
        tokens += sum(batch.counts)
        metrics.update({name: value.item() for name, value in found.metrics.items()})
    model.train(was_training)
    return EvalLoss(total / weight, tokens, len(examples), {name: value / weight for name, value in metrics.items()})
