"""A linear layer with its LoRA as one autograd function: fewer passes over memory, one saved input.

    y = W x + b + s B (A x)             PEFT's own forward makes three more tensors of y's size on the way,
    dx = W' dy + s A' (B' dy)           and autograd keeps A x besides x. Here y is added to in place,
    dB = s dy' (A x)                    and the backward computes A x again: r columns of work for one
    dA = s (B' dy)' x                   tensor less per layer.

Quantized weights are rebuilt in the forward and again in the backward; only their codes stay in between.

Shapes: T tokens, I inputs, O outputs, r rank; x [.., I], W [O, I], A [r, I], B [O, r], y [.., O].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Weight = Callable[[], Tensor]


def lora_linear_plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The definition, as PEFT computes it."""
    return linear(x, weight, bias) + linear(linear(x, a), b) * scaling


def lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The same value and gradients for x, A and B; `weight()` gives the frozen W [O, I] in x's dtype each time."""
    result: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.scaling = weight, scaling
        rows = x.reshape(-1, x.shape[-1])
        y = linear(rows, weight(), bias)
        y.addmm_(rows @ a.T, b.T, alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, a, b = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        through_b = dy @ b  # [T, r]
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weight()
            dx.addmm_(through_b, a, alpha=ctx.scaling)
            dx = dx.view_as(x)
        if ctx.needs_input_grad[3]:
            da = (through_b.T @ rows).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            db = (dy.T @ (rows @ a.T)).mul_(ctx.scaling)
        return dx, None, None, da, db, None
