"""Generation on a CPU from weights that are stored small: unpack them once, not for every token.

A layer in 4 bits, or in bfloat16 but computing in float32, makes its weight at each call. A training step pays
for that once in a thousand tokens; an answer pays for every single one, and spends most of its time there. The
numbers are the same to the bit. (int8 stays as it is: outside of training it rounds activations as well.)
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ft.ops.weights import FrozenWeight, frozen_linear, frozen_weight

_MOST_BYTES = 2 << 30  # a billion weights' worth of half of a small machine; larger models generate as they are


@contextlib.contextmanager
def unpacked_weights(model: nn.Module) -> Iterator[None]:
    """Let layers on the CPU that store their weights small multiply with unpacked ones until the block ends.

    Costs one copy of the linear weights in the dtype of computation; where that is over 2 GiB, or the
    weights were quantized from another dtype than they are multiplied in, nothing changes.
    """
    layers = [module for module in model.modules() if _is_unpackable(module)]
    if sum(_unpacked_bytes(layer) for layer in layers) > _MOST_BYTES:
        layers = []
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            weight = cast(FrozenWeight, frozen_weight(layer, layer.compute_dtype))
            layer.forward = functools.partial(_forward, weight(), layer.bias)
        yield
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _is_unpackable(module: Any) -> bool:
    # Layers that compute in another dtype than the one they are stored in say in which; int8 does not.
    compute = getattr(module, "compute_dtype", None)
    return isinstance(compute, torch.dtype) and module.weight.is_cpu and frozen_weight(module, compute) is not None


def _unpacked_bytes(layer: Any) -> int:
    state = getattr(layer.weight, "quant_state", None)
    elements: int = (layer.weight if state is None else state).shape.numel()
    return elements * int(layer.compute_dtype.itemsize)


def _forward(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return frozen_linear(inputs, lambda: weight, bias)
