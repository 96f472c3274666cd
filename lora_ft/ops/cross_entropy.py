"""The loss of a language model's head: plain, and chunked with its gradient computed in the forward.

Both return the SUM of the token losses, so that the caller divides once by the tokens of a whole
optimizer step (the mean of micro-batch means weights tokens unequally: transformers PR 34191).

    logits [N, V] for N = 2,000 positions and V = 49,152 words are 393 MB in fp32, and autograd keeps
    several such; a chunk of 256 rows is 50 MB, used once and overwritten by its own gradient.

Shapes: N positions, E width of the hidden state, V words.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

CHUNK_ROWS = 256


def linear_cross_entropy_plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of cross-entropies; hidden [N, E], weight [V, E], targets [N] int64. Half precision is summed in fp32."""
    logits = linear(hidden, weight, bias)
    return cross_entropy(_at_least_float32(logits), targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The same value and gradient for `hidden`, in chunks; the head is frozen and gets no gradient.

    Raises ValueError when the head is being trained: use the plain form then.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the chunked loss computes no gradient for the head")
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)
    return total


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Two products with the head a chunk (logits, gradient of hidden); the backward only scales."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        total = torch.zeros((), dtype=_at_least_float32(hidden[:0]).dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = _at_least_float32(linear(hidden[rows], weight, bias))
            of_target = targets[rows, None]
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (log_normalizer - logits.gather(1, of_target)).sum()
            if gradient is not None:
                # d loss / d logits = softmax(logits) - one_hot(target), written over the logits
                logits.sub_(log_normalizer).exp_()
                logits.scatter_add_(1, of_target, -torch.ones_like(log_normalizer))
                gradient[rows] = logits.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Not in place: a second backward over the same graph must see the same gradient.
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None
