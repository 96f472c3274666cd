"""Activations of an MLP that keep only the projections for the backward, and give their product a recipe.

    gate, up = x G', x U'            autograd keeps gate, act(gate) and up, and the down projection's LoRA
    y = act(gate) * up               keeps y: [T, F] four times. Here only gate and up are kept.

    dup = dy * act(gate)             dgate = dy * up * act'(gate)

act is SiLU ("silu": Llama and most others), GELU ("gelu") or its approximation by tanh ("gelu_tanh": Gemma).
GELU without a gate is torch's own, which keeps only its input; transformers' NewGELUActivation takes eight operations.

Shapes: all [.., F], of one dtype.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lora_ft.ops.recomputable import recomputable, with_recipe

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def gated_plain(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up: the definition."""
    return _activated(gate, activation) * up


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up with a recipe; the same value and gradients as `gated_plain`."""
    form, gradients = (partial(function, activation=activation) for function in (_product, _gradients))
    return recomputable(form, gradients, gate, up)


def gelu(x: Tensor, activation: str) -> Tensor:
    """GELU with a recipe; `activation` is "gelu" for the exact form (erf), or "gelu_tanh"."""
    form = partial(functional.gelu, approximate=_APPROXIMATE[activation])
    return with_recipe(form(x), form, x)


def activation_gradient(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """Return dy * act'(x)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return torch.ops.aten.gelu_backward(dy, x, approximate=_APPROXIMATE[activation])


def _activated(x: Tensor, activation: str) -> Tensor:
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate=_APPROXIMATE[activation])


def _product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    # In place: with three large tensors at the same offset within their pages, this takes twice the time of two.
    return _activated(gate, activation).mul_(up)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    # The gradients overwrite gate and up, which nothing reads after this: at the peak of an 8B step, two tensors
    # [T, F] less. A second backward over the same graph raises torch's error about tensors modified in place.
    gate, up = overwritable(gate), overwritable(up)
    dgate = up.mul_(dy)
    # Computing act(gate) again costs less than keeping a tensor [T, F] from the forward.
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, functional.silu(gate, inplace=True).mul_(dy)
    approximate = _APPROXIMATE[activation]
    torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate=approximate, grad_input=dgate)
    return dgate, torch.ops.aten.gelu_(gate, approximate=approximate).mul_(dy)


def overwritable(x: Tensor) -> Tensor:
    """Return a tensor for a backward to write to: `x` itself, or a copy of a leaf, which belongs to the caller."""
    return x.clone() if x.is_leaf else x.detach()
