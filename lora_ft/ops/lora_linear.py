"""A linear layer with its LoRA as one autograd function: fewer passes over memory, one saved input.

    y = W x + b + s B (A x)             PEFT's forward makes three more tensors of y's size, and autograd keeps
    dx = W' dy + s A' (B' dy)           A x besides x. Here there is one tensor of y's size, and the backward
    dB = s dy' (A x)                    computes A x again: a product with r columns instead of one more saved
    dA = s (B' dy)' x                   tensor per layer.

    merged     y = (W + s B A) x        one product in the forward if that is less work, as with many tokens.
                                        The backward needs B' dy anyway, and adding A' times it costs less than a
                                        second merged weight.
    rebuilt    quantized weights        are dequantized in the forward and again in the backward; only codes are kept
               an x with a recipe       (ops/recomputable.py: a norm's output, SwiGLU's product) is computed again
                                        in the backward from the inputs of its recipe, and is not kept

Shapes: T tokens, I inputs, O outputs, r rank; x [.., I], W [O, I], A [r, I], B [O, r], y [.., O].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lora_ft.ops.recomputable import Recipe, recipe_of
from lora_ft.ops.weights import FrozenWeight


def lora_linear_plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W x + b + s B (A x) as PEFT computes it: the definition."""
    return linear(x, weight, bias) + linear(linear(x, a), b) * scaling


def lora_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W x + b + s B (A x); the same value and gradients for x, A and B as `lora_linear_plain`.

    `weight()` returns the frozen W [O, I] in the dtype of x.
    """
    recipe = recipe_of(x) or Recipe(_itself, (x,))
    result: Tensor = _LoraLinear.apply(x, recipe, weight, bias, a, b, scaling)
    return result


def merging_pays(tokens: int, weight: Tensor) -> bool:
    """Return True if W + s B A costs fewer operations than s B (A x): T (I + O) > I O, for any rank.

    Half precision never merges: an update of less than 1/256 of a weight would be rounded away.
    """
    outputs, inputs = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and tokens * (inputs + outputs) > inputs * outputs


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
    ) -> Tensor:
        ctx.save_for_backward(a, b, *recipe.tensors)
        ctx.make_x, ctx.shape, ctx.weight, ctx.scaling = recipe.function, x.shape, weight, scaling
        rows, w = x.reshape(-1, x.shape[-1]), weight()
        if merging_pays(len(rows), w):
            merged = w.addmm_(b, a, alpha=scaling) if weight.fresh else torch.addmm(w, b, a, alpha=scaling)
            y = linear(rows, merged, bias)
        else:
            y = linear(rows, w, bias).addmm_(rows @ a.T, b.T, alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *kept = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        through_b = dy @ b  # [T, r]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ ctx.weight()).addmm_(through_b, a, alpha=ctx.scaling).view(ctx.shape)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            rows = ctx.make_x(*kept).reshape(-1, ctx.shape[-1])
            da = (through_b.T @ rows).mul_(ctx.scaling)
            db = (dy.T @ (rows @ a.T)).mul_(ctx.scaling)
        return dx, None, None, None, da, db, None
