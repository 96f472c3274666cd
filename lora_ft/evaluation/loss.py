"""Eval loss: the mean over the supervised tokens of the eval rows, independent of how they are batched.

    loss = sum of token losses / supervised tokens        perplexity = exp(loss)

A mean of batch means would depend on the batch size (A25); here only rounding does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lora_ft.data.packing import MicroBatch, micro_batches
from lora_ft.data.rows import TokenRow
from lora_ft.ops.token_loss import Batch, Paths, token_loss_sum


@dataclass(frozen=True)
class EvalLoss:
    """Token-weighted loss in nats, over `tokens` supervised tokens of `rows` rows."""

    loss: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def to_batch(packed: MicroBatch, device: torch.device) -> Batch:
    """The tensors of a packed micro-batch on `device`."""
    return Batch(
        ids=torch.from_numpy(packed.ids).to(device),
        positions=torch.from_numpy(packed.positions).to(device),
        targets=torch.from_numpy(packed.targets).to(device),
        starts=packed.starts.tolist(),
    )


@torch.no_grad()
def eval_loss(model: PreTrainedModel, rows: Sequence[TokenRow], paths: Paths, tokens_per_microbatch: int) -> EvalLoss:
    """Evaluate rows without dropout and without touching any random state; the model's mode is restored.

    `tokens_per_microbatch` bounds a forward pass; a row longer than that is a pass of its own.
    """
    capacity = max([tokens_per_microbatch, *(len(row.ids) for row in rows)])
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for packed in micro_batches(rows, capacity, paths.packs):
        batch = to_batch(packed, model.device)
        total += token_loss_sum(model, batch, paths).item()
        tokens += int((batch.targets >= 0).sum())
    model.train(was_training)
    return EvalLoss(total / tokens, tokens, len(rows))
