"""Activations of an MLP that keep its projections for the backward, and give their product as a recipe.

    gate, up = x G', x U'            autograd keeps gate, silu(gate) and up, and the down projection's LoRA
    y = silu(gate) * up              keeps y: [T, F] four times. Here gate and up are all.

    dup = dy * silu(gate)            dgate = dy * up * silu'(gate)

GELU is torch's own, which keeps its input only; transformers' NewGELUActivation is eight operations.

Shapes: all [.., F], of one dtype.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_ft.ops.recomputable import with_recipe


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return functional.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The same value and gradients; tagged with its recipe."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return with_recipe(y, _product, gate, up)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, `approximate` being none (by erf) or tanh; tagged with its recipe."""
    form = partial(functional.gelu, approximate=approximate)
    return with_recipe(form(x), form, x)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    # In place: three large tensors that begin at equal places in their pages take twice the time of two.
    return functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        # silu(gate) costs its exponentials a second time: less than a tensor [T, F] kept from the forward.
        dup = functional.silu(gate).mul_(dy)
        dgate = dy * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, dup
