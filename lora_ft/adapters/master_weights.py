"""Train modules in full over a half-precision base: float32 parameters that read as the base's dtype.

    parameter        float32: the optimizer updates it, and the adapter's file holds it
    module.weight    its cast to bfloat16 or float16, made again at each use; the gradient passes the cast into float32

In bfloat16 an update of less than 1 part in 256 of a weight would be lost. PEFT copies the modules of `modules_to_save`
in the base's dtype, so it computes the same from the saved float32 tensors as the trained model. The rows of added
tokens need no such treatment: PEFT itself keeps them in float32 and casts them.
"""

from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def keep_in_float32(module: nn.Module) -> None:
    """Convert the half-precision parameters of a module to float32; as attributes they still have their old dtype.

    Each part of the module gets a subclass of its class, in which these attributes are properties that cast. So every
    forward, also one that is recomputed or replaced, computes as before, and names in the state dict stay the same.
    """
    halves = [
        (part, {name: p.dtype for name, p in part._parameters.items() if p is not None and p.dtype in _HALF})
        for part in module.modules()
    ]
    for part, dtypes in halves:
        if dtypes:
            casts = {name: _cast(name, dtype) for name, dtype in dtypes.items()}
            part.__class__ = type(type(part).__name__, (type(part),), casts)
    for parameter in module.parameters():
        if parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def _cast(name: str, dtype: torch.dtype) -> property:
    def read(part: Any) -> Tensor:
        parameter: Tensor = part._parameters[name]
        return parameter.to(dtype)

    return property(read)
