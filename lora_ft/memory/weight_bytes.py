"""The bytes of a frozen base by how its weights are stored: {"nf4": 3600875520, "bfloat16": 2101878784, ...}."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from lora_ft import config
from lora_ft.memory.meter import Meter
from lora_ft.ops.weights import ScaledLinear


def bytes_by_storage(meter: Meter, model: Any, quant: config.Quant) -> dict[str, int]:
    """Return the bytes of the base by the quantization or the dtype of its tensors."""
    kinds = {tensor.untyped_storage()._cdata: kind for tensor, kind in _quantized(model, quant)}
    found: Counter[str] = Counter()
    for key, storage in meter.live_storages("base"):
        dtype = str(storage.dtype).removeprefix("torch.")
        found[kinds.get(key, dtype)] += storage.bytes
    return dict(found)


def _quantized(model: Any, quant: config.Quant) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield codes and scales of a model with the kind of their quantization."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            yield from ((tensor, "fp8") for tensor in (module.codes, module.scales))
        for parameter in module._parameters.values():
            if hasattr(parameter, "exponents"):
                yield from ((tensor, "mxfp4") for tensor in (parameter, parameter.exponents))
            yield from ((tensor, quant.kind.value) for tensor in _quantized_tensors(parameter))


def _quantized_tensors(weight: Any) -> list[torch.Tensor]:
    """Return the codes and scales of a weight of bitsandbytes; [] for another weight."""
    state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    values = [weight, scales]
    while state is not None:
        values += vars(state).values()
        state = state.state2
    found = [value for value in values if isinstance(value, torch.Tensor)]
    return found if len(found) > 1 else []
