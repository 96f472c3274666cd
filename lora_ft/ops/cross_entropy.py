"""The loss of a language model's head: plain, and chunked with the gradient computed in the forward.

Both return the SUM of the token losses, so that the caller divides once by the tokens of a whole
optimizer step (the mean of micro-batch means weights tokens unequally: transformers PR 34191).

    logits [N, V] for N = 4,096 positions and V = 128,256 words are 2.1 GB in fp32, and autograd keeps several such
    tensors. The chunked loss has two forms, which compute the same and never hold all logits:

    on a CPU          ops/cross_entropy_cpu.py: 256 positions, in blocks of words that stay in the processor's cache
    anywhere else     here: as many positions as CHUNK_BYTES of fp32 logits allow, all words at once, so that a chunk
                      is two large products with the head and about eight launches

    h [n, E] --- W ---> product [n, V] --- fp32, logit map ---> logits, log-probabilities, probabilities, in place
    gradient of h  <--- W' ---  (probabilities - one_hot) * slope, in the dtype of W  <---'

Precision: a half-precision product accumulates in fp32 and is rounded once to the dtype of W, as in transformers.
Soft cap, scale and softmax are computed in fp32 (transformers caps and scales in half precision), and the gradient of
the product is rounded once more before it is multiplied by W. There is no fp32 copy of W.

Shapes: N positions, E width of the hidden state, V words, r rank of a LoRA on the head.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from lora_ft.ops.batch import IGNORED
from lora_ft.ops.cross_entropy_cpu import blocked
from lora_ft.ops.device import target
from lora_ft.ops.logits import PRODUCT, HeadLora, LogitMap, at_least_float32

CHUNK_BYTES = 192 * 2**20  # of fp32 logits; half precision adds half as much, and a soft cap in fp32 as much again


def summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of the cross-entropies of logits [N, V], each times its weight; weights [N], None for 1 each."""
    if weights is None:
        return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return (cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none") * weights).sum()


def linear_cross_entropy_plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lora: HeadLora | None = None,
    logit_map: LogitMap = PRODUCT,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of cross-entropies: the definition. Half precision is summed in fp32.

    hidden [N, E], weight [V, E], targets [N] int64, weights [N], None for 1 each. The matrices
    of a LoRA are used in the dtype of `hidden`.
    """
    product = linear(hidden, weight, bias)
    if lora is not None:
        through_a = linear(hidden, lora.a.to(hidden.dtype)) * lora.scaling
        product = product + linear(through_a, lora.b.to(hidden.dtype))
    return summed_cross_entropy(logit_map(at_least_float32(product)), targets, weights)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lora: HeadLora | None = None,
    logit_map: LogitMap = PRODUCT,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of cross-entropies in chunks, with the same gradients for `hidden` and the LoRA.

    The head is frozen and gets no gradient. Raises ValueError if it requires one: use the plain form then.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the chunked loss computes no gradient for the head: use linear_cross_entropy_plain")
    a, b, scaling = lora or (None, None, 0.0)
    total: Tensor = _CrossEntropy.apply(hidden, a, b, weight, bias, targets, scaling, logit_map, weights)
    return total


def fits_processor_cache(device: torch.device) -> bool:
    """Return True if the loss is cut into blocks for the cache of a CPU; on other devices launches cost more."""
    return target(device).kind == "cpu"


class _CrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward; the backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a: Tensor | None, b: Tensor | None, *more: Any) -> Tensor:
        form: Callable[..., Any] = blocked if fits_processor_cache(hidden.device) else chunked
        total, gradients = form(hidden, a, b, *more, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: a second backward over the same graph must find the same gradients.
        scaled = [None if g is None else g * grad_outputs[0] for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None)


def chunked(
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
    of_hidden = torch.empty_like(hidden) if needs[0] else None
    of_a, of_b = (
        torch.zeros_like(t) if t is not None and needed else None for t, needed in zip((a, b), needs[1:], strict=True)
    )
    lora = None if a is None or b is None else HeadLora(a.to(weight.dtype), b.to(weight.dtype), scaling)
    size = _rows_per_chunk(hidden, weight)
    minus_one = hidden.new_full((size, 1), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    found = []
    of_parts = itertools.repeat(None) if of_hidden is None else of_hidden.split(size)
    factors = itertools.repeat(None) if weights is None else weights[:, None].split(size)
    parts = zip(hidden.split(size), targets[:, None].split(size), of_parts, factors, strict=False)
    for rows, words, of_rows, factor in parts:
        gradients = (of_rows, of_a, of_b) if any(needs) else None
        found.append(_chunk(rows, weight, bias, lora, logit_map, words, factor, minus_one, gradients))
    return -torch.cat(found).sum(), [of_hidden, of_a, of_b]


def _rows_per_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Return the rows of chunks that are as equal as possible and have at most CHUNK_BYTES of logits."""
    most = max(1, CHUNK_BYTES // (len(weight) * torch.promote_types(hidden.dtype, torch.float32).itemsize))
    chunks = max(1, math.ceil(len(hidden) / most))
    return max(1, math.ceil(len(hidden) / chunks))


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: HeadLora | None,
    logit_map: LogitMap,
    targets: Tensor,
    factor: Tensor | None,
    minus_one: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
) -> Tensor:
    """Return the log-probabilities [n, 1] of the targets [n, 1]; fill or add to the `gradients` of hidden, a and b.

    factor: weights [n, 1]; they multiply what is small, or the gradient of the logits where it is rounded.

    A function of its own, so that the tensors of one chunk are freed before the next chunk makes its own.
    """
    product = linear(hidden, weight, bias)
    through_a = None if lora is None else linear(hidden, lora.a).mul_(lora.scaling)
    if lora is not None:
        product.addmm_(through_a, lora.b.T)
    logits = at_least_float32(product)
    slope = None
    if logit_map.cap is not None and gradients is not None:
        slope = torch.empty_like(logits) if product is logits else product
    if logit_map != PRODUCT:
        logit_map.apply_(logits, slope)
    # In place: each row is reduced before it is written. models/self_check.py compares the result on every device.
    torch.log_softmax(logits, dim=1, out=logits)
    of_targets = logits.gather(1, targets)
    if factor is not None:
        of_targets = of_targets * factor
    if gradients is None:
        return of_targets
    of_product = logits.exp_().scatter_add_(1, targets, minus_one)
    if slope is not None:
        of_product = torch.mul(of_product, slope, out=product)
    elif factor is not None and product is not logits:  # rounded once, with the factor
        of_product, factor = torch.mul(of_product, factor * logit_map.scale, out=product), None
    elif logit_map.scale != 1:
        of_product = torch.mul(of_product, logit_map.scale, out=product)
    elif product is not logits:
        of_product = product.copy_(of_product)
    of_hidden, of_a, of_b = gradients
    if of_hidden is not None:
        torch.mm(of_product, weight, out=of_hidden)
        if factor is not None:
            of_hidden *= factor
    if lora is not None:
        through_b = (of_product @ lora.b).mul_(lora.scaling)
        if factor is not None:
            through_b *= factor
            through_a *= factor
        if of_hidden is not None:
            of_hidden.addmm_(through_b, lora.a)
        if of_a is not None:
            of_a += through_b.T @ hidden
        if of_b is not None:
            of_b += of_product.T @ through_a
    return of_targets
