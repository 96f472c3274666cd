"""Copy a loaded model to the meta device: the same modules, forwards and dtypes, without a value.

A trace of the copy takes the paths that the loaded model takes, which the self-check of its weights has chosen.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def on_meta(model: nn.Module) -> Any:
    """Return a copy of a model whose tensors are on the meta device; costs no memory.

    Tensors that a model on another device keeps on the CPU stay there, and are shared.
    """
    main = next(p.device for p in reversed(list(model.parameters())))
    memo: dict[int, Any] = {}
    with _TensorsOnMeta(main):
        for parameter in model.parameters():
            if _moves(parameter, main):
                _parameter_on_meta(parameter, memo)
            else:
                memo[id(parameter)] = parameter
        return copy.deepcopy(model, memo)


def _moves(tensor: Tensor, main: torch.device) -> bool:
    return main.type == "cpu" or tensor.device.type != "cpu"


def _parameter_on_meta(parameter: nn.Parameter, memo: dict[int, Any]) -> None:
    """Add a parameter's copy to `memo`. bitsandbytes' parameters have a class and attributes of their own."""
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    made = torch.Tensor._make_subclass(type(parameter), empty, parameter.requires_grad)
    memo[id(parameter)] = made  # before its attributes are copied: one of them may be the layer that holds it
    vars(made).update(copy.deepcopy(vars(parameter), memo))


class _TensorsOnMeta(TorchFunctionMode):
    """Copies a tensor to the meta device where `copy.deepcopy` would copy its values."""

    def __init__(self, main: torch.device) -> None:
        super().__init__()
        self.main = main

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            moves = _moves(tensor, self.main)
            memo[id(tensor)] = (
                torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                if moves
                else tensor
            )
        return memo[id(tensor)]
