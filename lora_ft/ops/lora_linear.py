"""A linear layer with its LoRA as one autograd function: fewer passes over memory, one saved input.

    y = W x + b + s B (A x)             PEFT's forward makes three more tensors of y's size, and autograd keeps
    dx = W' dy + s A' (B' dy)           A x besides x. Here there is one tensor of y's size, and the backward
    dB = s dy' (A x)                    computes A x again: a product with r columns instead of one more saved
    dA = s (B' dy)' x                   tensor per layer.

    16 bits    A and B are float32      and are multiplied as copies in the dtype of x (ops/compute_copies.py), so all
                                        products run in it. The gradients of A and B are float32. PEFT instead makes a
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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import linear

from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.device import target_of
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
    recipe = recipe_of(x) or Recipe(_itself, (x,))
    result: Tensor = _LoraLinear.apply(x, recipe, weight, bias, a, b, scaling, dropout)
    return result


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
    if target_of(left.device).kind == "cpu":  # has no such kernel
        return (left @ right).to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def _low_rank(left: Tensor, right: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Return s left @ right + bias. The large product is added to this small one, so their sum is rounded once."""
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=scaling)
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)


def _itself(x: Tensor) -> Tensor:
    return x


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe,
        weight: FrozenWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        rows, w, mask = x.reshape(-1, x.shape[-1]), weight(), None
        low_a, low_b = compute_copy(a, x.dtype), compute_copy(b, x.dtype)
        if dropout == 0 and merging_pays(len(rows), w):
            merged = (
                w.addmm_(low_b, low_a, alpha=scaling) if weight.fresh else torch.addmm(w, low_b, low_a, alpha=scaling)
            )
            y = linear(rows, merged, bias)
        else:
            dropped = rows
            if dropout:
                dropped, mask = torch.native_dropout(rows, dropout, True)
            y = _low_rank(dropped @ low_a.T, low_b.T, scaling, bias).addmm_(rows, w.T)
        ctx.save_for_backward(low_a, low_b, mask, *recipe.tensors)
        ctx.make_x, ctx.shape, ctx.weight, ctx.scaling, ctx.keep = (
            recipe.function,
            x.shape,
            weight,
            scaling,
            1 - dropout,
        )
        ctx.dtype = a.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, mask, *kept = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        through_b = dy @ b  # [T, r]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = _low_rank(through_b, a, ctx.scaling)
            dx = (dx if mask is None else _dropped(dx, mask, ctx.keep)).addmm_(dy, ctx.weight())
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            rows = ctx.make_x(*kept).reshape(-1, ctx.shape[-1])
            rows = rows if mask is None else _dropped(rows, mask, ctx.keep)
            da = product(through_b.T, rows, ctx.dtype).mul_(ctx.scaling)
            db = product(dy.T, rows @ a.T, ctx.dtype).mul_(ctx.scaling)
        return dx, None, None, None, da, db, None, None


def _dropped(x: Tensor, mask: Tensor, keep: float) -> Tensor:
    return torch.ops.aten.native_dropout_backward(x, mask, 1 / keep)
