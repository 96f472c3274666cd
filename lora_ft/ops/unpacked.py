"""Generation from a 4-bit model on a CPU: unpack its weights once, not for every token.

bitsandbytes rebuilds each weight at each call. A training step pays for that once in a thousand tokens;
an answer pays for every single one, and spends most of its time there. The numbers are the same to the bit.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_MOST_BYTES = 2 << 30  # a billion weights' worth of half of a small machine; larger models generate as they are


@contextlib.contextmanager
def unpacked_weights(model: nn.Module) -> Iterator[None]:
    """Let 4-bit layers on the CPU multiply with unpacked weights until the block ends.

    Costs one copy of the linear weights in the dtype of computation; where that is over 2 GiB, or the
    weights were quantized from another dtype than they are multiplied in, nothing changes.
    """
    layers = [module for module in model.modules() if _is_4bit_on_cpu(module)]
    if sum(layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize for layer in layers) > _MOST_BYTES:
        layers = []
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in layers:
        weight = sys.modules["bitsandbytes"].functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layer.forward = functools.partial(_forward, layer, weight)
    try:
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _is_4bit_on_cpu(module: Any) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")  # not imported: no layer of its kind exists
    if bitsandbytes is None or not isinstance(module, bitsandbytes.nn.Linear4bit):
        return False
    state = module.weight.quant_state
    return module.weight.device.type == "cpu" and state is not None and state.dtype == module.compute_dtype


def _forward(layer: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    """Linear4bit's forward, but for where the weight comes from."""
    compute: torch.dtype = layer.compute_dtype
    bias = None if layer.bias is None else layer.bias.to(compute)
    return linear(inputs.to(compute), weight, bias).to(inputs.dtype)
