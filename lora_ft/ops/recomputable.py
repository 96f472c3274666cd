"""Attach a recipe to a tensor, so that a backward can compute the tensor again and need not keep it.

    x -- rms_norm --> y -- q_proj, k_proj, v_proj       y is the input of three LoRA layers, which would keep it.
                      |                                 Its recipe is (x, 1 / rms, weight), which the norm keeps
                      '- recipe: y = f(x, rstd, w)      anyway: three references instead of a tensor of y's size.

The recipe is an attribute of this one Python tensor. A view, a cast or a copy has no recipe and is kept as usual.
Both attaching a recipe and using it are optional.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ATTRIBUTE = "_lora_ft_recipe"


class Recipe(NamedTuple):
    """A way to compute a tensor again: `function(*tensors)`, under `torch.no_grad()`, gives it bit for bit."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def with_recipe(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Attach a recipe to `y`, which equals `function(*tensors)`, and return `y`."""
    setattr(y, _ATTRIBUTE, (Recipe(function, tensors), _versions(y, tensors)))
    return y


def recomputable(
    forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor
) -> Tensor:
    """Return `forward(*tensors)` with its recipe; autograd keeps only the tensors.

    `backward(dy, *tensors)` returns their gradients, None for a constant. Both functions run without gradients, so
    that the recipe runs the same kernels as the forward: a compiled function is another graph if it is differentiated.
    """
    y: Tensor = _Recomputable.apply(forward, backward, *tensors)
    return with_recipe(y, forward, *tensors)


def recipe_of(x: Tensor) -> Recipe | None:
    """Return the recipe of `x`; None if it has none, or if `x` or an input of the recipe was modified in place."""
    recipe, versions = getattr(x, _ATTRIBUTE, (None, ()))
    return recipe if recipe is not None and _versions(x, recipe.tensors) == versions else None


def _versions(y: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in (y, *tensors) if tensor is not None)


class _Recomputable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], backward: Callable[..., Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradients = backward
        return forward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grads[0], *ctx.saved_tensors)
