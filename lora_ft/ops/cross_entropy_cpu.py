"""The chunked loss of a language model's head for a CPU; ops/cross_entropy.py has the definition and other devices.

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

Shapes: N positions, n of them in a chunk, E width of the hidden state, V words, r rank of a LoRA on the head.
"""

import torch
from torch import Tensor

from lora_ft.ops.logits import PRODUCT, LogitMap, at_least_float32

CHUNK_ROWS = 256
_BLOCK_WORDS = 2048


def blocked(
    hidden: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scaling: float,
    logit_map: LogitMap,
    weights: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the weighted sum of losses, and the gradients of hidden, a and b that are needed."""
    gradients = [
        None if t is None or not needed else torch.zeros_like(t)
        for t, needed in zip((hidden, a, b), needs, strict=True)
    ]
    dtype = at_least_float32(hidden[:0]).dtype
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    buffer = hidden.new_empty((weight.shape[0], min(CHUNK_ROWS, hidden.shape[0])), dtype=dtype)
    slopes = torch.empty_like(buffer) if logit_map.cap is not None and any(needs) else None
    narrow_a, narrow_b = (None if t is None else t.to(weight.dtype) for t in (a, b))
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        h, target = hidden[rows], targets[rows]
        lora = None if narrow_a is None or narrow_b is None else (h @ narrow_a.T * scaling, narrow_b)
        logits = buffer[:, : len(h)]
        slope = None if slopes is None else slopes[:, : len(h)]
        losses, sums = _exponentials(logits, h, weight, bias, lora, target, logit_map, slope)
        factor = None if weights is None else weights[rows].to(dtype)
        total += losses.sum() if factor is None else (losses * factor).sum()
        if not any(needs):
            continue
        # d loss / d logits = exp / sums - one_hot(target), here times sums
        logits[target, torch.arange(len(target), device=target.device)] -= sums
        if slope is not None:
            logits *= slope
        elif logit_map.scale != 1:
            logits *= logit_map.scale
        if logits.dtype != weight.dtype:  # a half-precision product of undivided rows could overflow
            logits, sums = (logits / sums).to(weight.dtype), torch.ones_like(sums)
        if factor is not None:  # d loss / d logits = factor * (exp / sums - one_hot(target))
            sums = sums / factor
        parts = _gradients(logits, sums, h, weight, narrow_a, lora, scaling)
        for gradient, part, where in zip(gradients, parts, (rows, slice(None), slice(None)), strict=True):
            if gradient is not None:
                gradient[where] += part
    return total, gradients


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
    logit_map: LogitMap,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fill `logits` [V, n] with exp(logit - largest of its position); return the losses [n] and the sums [n].

    Fills `slope` [V, n], if given, with d logits / d product.
    """
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
        if logit_map != PRODUCT:
            logit_map.apply_(block, None if slope is None else slope[words])
        torch.maximum(largest, block.amax(dim=0), out=largest)
    of_target = logits[targets, torch.arange(len(targets), device=targets.device)]
    sums = torch.zeros_like(largest)
    for start in range(0, len(logits), _BLOCK_WORDS):
        sums += logits[start : start + _BLOCK_WORDS].sub_(largest).exp_().sum(dim=0)
    return largest + sums.log() - of_target, sums
