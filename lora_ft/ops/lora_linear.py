"""A linear layer with its LoRA as one function: fewer passes over memory, one saved input.

    y = W x + b + s B (A x)             PEFT's forward makes three more tensors of y's size, and autograd keeps
    dx = W' dy + s A' (B' dy)           A x besides x. Here there is one tensor of y's size, and the backward
    dB = s dy' (A x)                    computes A x again: a product with r columns instead of one more saved
    dA = s (B' dy)' x                   tensor per layer.

    16 bits    A and B are float32      and are multiplied as copies in the dtype of x (ops/compute_copies.py). The
                                        gradients of A and B are float32. PEFT instead makes a
                                        float32 copy of x per layer, and three float32 tensors of y's size.
    merged     y = (W + s B A) x        one product in the forward if that is less work, as with many tokens.
                                        The backward needs B' dy anyway, and adding A' times it costs less than a
                                        second merged weight.
    rebuilt    quantized weights        are dequantized in the forward and again in the backward; only codes are kept
               an x with a recipe       (ops/recomputable.py: a norm's output, SwiGLU's product) is computed again
                                        in the backward from the inputs of its recipe, and is not kept
    dropout    y = W x + b + s B A d(x) keeps the mask, one byte per value, and not d(x)

Shapes: T tokens, I inputs, O outputs, r rank; x [.., I], W [O, I], A [r, I], B [O, r], y [.., O].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import linear

from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.device import target
from lora_ft.ops.recomputable import Recipe, recipe_of
from lora_ft.ops.weights import FrozenWeight


def lora_linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Return W x + b + s B (A d(x)) as PEFT computes it: the definition. d is dropout with probability `dropout`."""
    dropped = functional.dropout(x, dropout) if dropout else x
    return linear(x, weight, bias) + linear(linear(dropped, a), b) * scaling


def lora_linear(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Return W x + b + s B (A d(x)); the same value and gradients for x, A and B as `lora_linear_plain`.

    `weight()` returns the frozen W [O, I] in the dtype of x. A and B have the dtype of x, or are float32.
    """
    low_a, low_b = compute_copy(a, x.dtype), compute_copy(b, x.dtype)
    dropped, mask = torch.native_dropout(x.detach(), dropout, True) if dropout else (None, None)
    kept = _Kept(recipe_of(x) or Recipe(_itself, (x,)), weight, low_a, low_b, scaling, mask, 1 - dropout)
    placeholder = _Inputs.apply(x, a, b, kept)
    rows: Tensor = _Product.apply(placeholder, x.detach(), dropped, weight, bias, low_a, low_b, scaling)
    # A view made here, and not in the function, can be changed in place, as Gemma 3n does.
    return rows.view(*x.shape[:-1], len(b))


def merging_pays(tokens: int, weight: Tensor) -> bool:
    """Return True if W + s B A costs fewer operations than s B (A x): T (I + O) > I O, for any rank.

    Half precision never merges: an update of less than 1/256 of a weight would be rounded away.
    """
    outputs, inputs = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and tokens * (inputs + outputs) > inputs * outputs


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right in `dtype`. GPUs write the float32 sums of a 16-bit product without rounding them."""
    if left.dtype == dtype:
        return left @ right
    if target(left.device).kind != "cuda":  # has no such kernel
        return (left @ right).to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def _scaled_product(left: Tensor, right: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Return s left @ right + bias, rounded once."""
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=scaling)
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)


def _itself(x: Tensor) -> Tensor:
    return x


class _Kept(NamedTuple):
    """Operands of a layer's backward; `keep` is the probability with which dropout keeps a value."""

    recipe: Recipe
    weight: FrozenWeight
    a: Tensor
    b: Tensor
    scaling: float
    mask: Tensor | None
    keep: float


class _Inputs(torch.autograd.Function):
    """Keep a layer's inputs for its backward, before its product is computed.

    Returns a placeholder [T, O] of y without memory of its own, which `_Product` turns into y. In a recomputed layer,
    torch.utils.checkpoint stops at the last tensor that is kept. If that is an input of the layer's last product, as in
    most decoder layers, it stops here, and the product is not computed again: 8 % of the operations of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, kept: _Kept) -> Tensor:
        ctx.save_for_backward(kept.a, kept.b, kept.mask, *kept.recipe.tensors)
        ctx.make_x, ctx.shape, ctx.dtype = kept.recipe.function, x.shape, a.dtype
        ctx.weight, ctx.scaling, ctx.keep = kept.weight, kept.scaling, kept.keep
        return x.new_empty(1).expand(x.shape[:-1].numel(), len(b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, mask, *kept = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        through_b = _scaled_product(dy, b, ctx.scaling)  # [T, r]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = through_b @ a
            dx = (dx if mask is None else _dropped(dx, mask, ctx.keep)).addmm_(dy, ctx.weight()).view(ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = ctx.make_x(*kept)
            rows = (x if mask is None else _dropped(x, mask, ctx.keep)).reshape(-1, ctx.shape[-1])
            da = product(through_b.T, rows, ctx.dtype)
            db = product(dy.T, _scaled_product(rows, a.T, ctx.scaling), ctx.dtype)
        return dx, da, db, None


class _Product(torch.autograd.Function):
    """Compute y in place of a placeholder, whose gradient is that of y."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: Tensor,
        x: Tensor,
        dropped: Tensor | None,
        weight: FrozenWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows, w = x.reshape(-1, x.shape[-1]), weight()
        if dropped is None and merging_pays(len(rows), w):
            merged = w.addmm_(b, a, alpha=scaling) if weight.fresh else torch.addmm(w, b, a, alpha=scaling)
            return linear(rows, merged, bias)
        through_a = (rows if dropped is None else dropped.reshape(rows.shape)) @ a.T
        # The large product is added to the small one, so that their sum is rounded once.
        return _scaled_product(through_a, b.T, scaling, bias).addmm_(rows, w.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * 7


def _dropped(x: Tensor, mask: Tensor, keep: float) -> Tensor:
    return torch.ops.aten.native_dropout_backward(x, mask.view(x.shape), 1 / keep)
