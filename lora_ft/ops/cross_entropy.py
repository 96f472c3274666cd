"""The loss of a language model's head: plain, and chunked with the gradient computed in the forward.

Both return the SUM of the token losses, so that the caller divides once by the tokens of a whole
optimizer step (the mean of micro-batch means weights tokens unequally: transformers PR 34191).

    logits [N, V] for N = 2,000 positions and V = 49,152 words are 393 MB in fp32, and autograd keeps
    several such tensors; here CHUNK_ROWS positions at a time share one buffer of 50 MB:

      rows of the head     logits' = W h'  [V, n]     exp(logits' - largest)
        0 ..  2,047      +------------------------+
        2,048 .. 4,095   |  computed and read     |   gradient of h = W' (exp / sum - one_hot)
        ...              |  one block at a time   |
                         +------------------------+

The logits are transposed, words by positions. W is then the left operand of the product, which MKL multiplies
at 175 to 190 GFLOP/s, against 120 to 150 in the usual layout, and a block of words stays in the cache between
the passes over it. Only the small gradient is divided by the sums, not the logits.

Shapes: N positions, E width of the hidden state, V words, r rank of a LoRA on the head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

CHUNK_ROWS = 256
_BLOCK_WORDS = 2048


class HeadLora(NamedTuple):
    """A LoRA on the head: a [r, E], b [V, r], and the factor of b @ a."""

    a: Tensor
    b: Tensor
    scaling: float


def linear_cross_entropy_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lora: HeadLora | None = None
) -> Tensor:
    """Return the sum of cross-entropies: the definition. Half precision is summed in fp32.

    hidden [N, E], weight [V, E], targets [N] int64.
    """
    logits = linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + linear(linear(hidden, lora.a), lora.b) * lora.scaling
    return cross_entropy(at_least_float32(logits), targets, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lora: HeadLora | None = None
) -> Tensor:
    """Return the sum of cross-entropies in chunks, with the same gradients for `hidden` and the LoRA.

    The head is frozen and gets no gradient. Raises ValueError if it requires one: use the plain form then.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the chunked loss computes no gradient for the head: use linear_cross_entropy_plain")
    a, b, scaling = lora or (None, None, 0.0)
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, a, b, weight, bias, targets, scaling)
    return total


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half precision as float32, and other tensors unchanged: losses are summed in at least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Two products with the head per chunk (logits, gradient of hidden); the backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: float,
    ) -> Tensor:
        gradients = [torch.zeros_like(t) if t is not None and t.requires_grad else None for t in (hidden, a, b)]
        dtype = at_least_float32(hidden[:0]).dtype
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        buffer = hidden.new_empty((weight.shape[0], min(CHUNK_ROWS, hidden.shape[0])), dtype=dtype)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            h, target = hidden[rows], targets[rows]
            lora = None if a is None or b is None else (h @ a.T * scaling, b)
            logits = buffer[:, : len(h)]
            loss, sums = _exponentials(logits, h, weight, bias, lora, target)
            total += loss
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = exp / sums - one_hot(target), here times sums
            logits[target, torch.arange(len(target), device=target.device)] -= sums
            if logits.dtype != weight.dtype:  # a half-precision product of undivided rows could overflow
                logits, sums = (logits / sums).to(weight.dtype), torch.ones_like(sums)
            parts = _gradients(logits, sums, h, weight, a, lora, scaling)
            for gradient, part, where in zip(gradients, parts, (rows, slice(None), slice(None)), strict=True):
                if gradient is not None:
                    gradient[where] += part
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: a second backward over the same graph must find the same gradients.
        scaled = [None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _gradients(
    of_logits: Tensor,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    a: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return one chunk's gradients for hidden, a and b; `of_logits` [V, n] is the logits' gradient times `sums` [n]."""
    of_hidden = (weight.T @ of_logits).T / sums[:, None]
    if a is None or lora is None:
        return of_hidden, None, None
    through_a, b = lora
    through_b = ((b.T @ of_logits).T * (scaling / sums)[:, None]).to(hidden.dtype)  # [n, r]
    of_b = of_logits @ (through_a / sums[:, None]).to(of_logits.dtype)
    return of_hidden + through_b @ a, through_b.T @ hidden, of_b


def _exponentials(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill `logits` [V, n] with exp(logit - largest of its position); return the sum of losses and the sums [n]."""
    largest = logits.new_full((logits.shape[1],), -torch.inf)
    for start in range(0, len(logits), _BLOCK_WORDS):
        words = slice(start, start + _BLOCK_WORDS)
        block = logits[words]
        if block.dtype == weight.dtype:
            torch.mm(weight[words], hidden.T, out=block)
        else:
            block.copy_(weight[words] @ hidden.T)
        if bias is not None:
            block += bias[words, None]
        if lora is not None:
            through_a, b = lora
            block += b[words] @ through_a.T
        torch.maximum(largest, block.amax(dim=0), out=largest)
    of_target = logits[targets, torch.arange(len(targets), device=targets.device)]
    sums = torch.zeros_like(largest)
    for start in range(0, len(logits), _BLOCK_WORDS):
        sums += logits[start : start + _BLOCK_WORDS].sub_(largest).exp_().sum(dim=0)
    return (largest + sums.log() - of_target).sum(), sums
