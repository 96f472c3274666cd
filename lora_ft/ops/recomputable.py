"""Attach a recipe to a tensor, so that a backward can compute the tensor again and need not keep it.

    x -- rms_norm --> y -- q_proj, k_proj, v_proj       y is the input of three LoRA layers, which would keep it.
                      |                                 Its recipe is (x, 1 / rms, weight), which the norm keeps
                      '- recipe: y = f(x, rstd, w)      anyway: three references instead of a tensor of y's size.

The recipe is an attribute of this one Python tensor. A view, a cast or a copy has no recipe and is kept as usual.
Both attaching a recipe and using it are optional.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_ATTRIBUTE = "_lora_ft_recipe"


class Recipe(NamedTuple):
    """A way to compute a tensor again: `function(*tensors)`, under `torch.no_grad()`, gives it bit for bit."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def with_recipe(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Attach a recipe to `y`, which equals `function(*tensors)`, and return `y`."""
    setattr(y, _ATTRIBUTE, (Recipe(function, tensors), _versions(y, tensors)))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """Return the recipe of `x`; None if it has none, or if `x` or an input of the recipe was modified in place."""
    recipe, versions = getattr(x, _ATTRIBUTE, (None, ()))
    return recipe if recipe is not None and _versions(x, recipe.tensors) == versions else None


def _versions(y: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in (y, *tensors) if tensor is not None)
