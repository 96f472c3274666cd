"""Activations of an MLP that keep only the projections for the backward, and give their product a recipe.

    gate, up = x G', x U'            autograd keeps gate, silu(gate) and up, and the down projection's LoRA
    y = silu(gate) * up              keeps y: [T, F] four times. Here only gate and up are kept.

    dup = dy * silu(gate)            dgate = dy * up * silu'(gate)

GELU is torch's own, which keeps only its input; transformers' NewGELUActivation takes eight operations.

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
    """Return silu(gate) * up: the definition."""
    return functional.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up with a recipe; the same value and gradients as `swiglu_plain`."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return with_recipe(y, _product, gate, up)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU with a recipe; `approximate` is "none" for the exact form (erf), or "tanh"."""
    form = partial(functional.gelu, approximate=approximate)
    return with_recipe(form(x), form, x)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    # In place: with three large tensors at the same offset within their pages, this takes twice the time of two.
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
        # The gradients overwrite gate and up, which nothing reads after this: at the peak of an 8B step, two tensors
        # [T, F] less. A second backward over the same graph raises torch's error about tensors modified in place.
        gate, up = (x.clone() if x.is_leaf else x.detach() for x in ctx.saved_tensors)
        dgate = up.mul_(dy)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        # Computing silu(gate) again costs less than keeping a tensor [T, F] from the forward.
        dup = functional.silu(gate, inplace=True).mul_(dy)
        return dgate, dup
