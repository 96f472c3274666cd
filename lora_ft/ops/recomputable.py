"""A tensor that can be computed again says from what, so that whoever needs it in the backward keeps that instead.

    x -- rms_norm --> y -- q_proj, k_proj, v_proj       y is an input of three LoRA layers, and was kept for them.
                      |                                 Its recipe is (x, 1 / rms, weight), which the norm keeps
                      '- recipe: y = f(x, rstd, w)      anyway: three references, and one tensor of y's size less.

The recipe is an attribute of the Python tensor and of nothing else: a view, a cast or a copy has none, and
is kept as ever. Taking it is a choice, and so is giving one.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_ATTRIBUTE = "_lora_ft_recipe"


class Recipe(NamedTuple):
    """`function(*tensors)` is the tensor it belongs to, bit for bit; call it under `torch.no_grad()`."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def with_recipe(y: Tensor, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Tag `y`, which is `function(*tensors)`, and return it."""
    setattr(y, _ATTRIBUTE, (Recipe(function, tensors), _versions(y, tensors)))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """How to compute `x` again; None where nobody said, or where it or what it is made of was written to since."""
    recipe, versions = getattr(x, _ATTRIBUTE, (None, ()))
    return recipe if recipe is not None and _versions(x, recipe.tensors) == versions else None


def _versions(y: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in (y, *tensors) if tensor is not None)
