"""Dequantized weights for generation on a CPU: made once, not for every token.

A layer in 4 bits, or in bfloat16 but computing in float32, makes its weight at each call. A training step pays
for that once in a thousand tokens; an answer pays for every single one, and spends most of its time there. The
numbers are the same to the bit. (int8 layers are left alone: outside of training they round activations as well.)
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ft.ops.weights import FrozenWeight, frozen_linear, frozen_weight

_MOST_BYTES = 2 << 30  # a billion weights' worth of half of a small machine; larger models generate as they are


def dequantized_forwards(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return forwards that multiply with dequantized weights, for layers on the CPU that store theirs small.

    Costs one copy of the linear weights in the dtype of computation. Returns none if that is over 2 GiB; a layer
    whose weight was quantized from another dtype than it is multiplied in has none.
    """
    layers: list[Any] = [module for module in model.modules() if _is_stored_small(module)]
    if sum(_dequantized_bytes(layer) for layer in layers) > _MOST_BYTES:
        return {}
    weights = {layer: cast(FrozenWeight, frozen_weight(layer, layer.compute_dtype)) for layer in layers}
    return {layer: functools.partial(_forward, weight(), layer.bias) for layer, weight in weights.items()}


def _is_stored_small(module: Any) -> bool:
    # Layers that compute in another dtype than the one they are stored in say in which; int8 does not.
    compute = getattr(module, "compute_dtype", None)
    return isinstance(compute, torch.dtype) and module.weight.is_cpu and frozen_weight(module, compute) is not None


def _dequantized_bytes(layer: Any) -> int:
    state = getattr(layer.weight, "quant_state", None)
    elements: int = (layer.weight if state is None else state).shape.numel()
    return elements * int(layer.compute_dtype.itemsize)


def _forward(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return frozen_linear(inputs, lambda: weight, bias)
