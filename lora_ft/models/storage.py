"""Change how a loaded base is stored in memory; no computed number changes, not by a bit.

    exact_bfloat16        float32 weights that bfloat16 holds exactly (a bfloat16 checkpoint, computed in float32)
                          -> half the bytes, cast to float32 again by each product
    copy_mapped_weights   weights that are still parts of the mapped file
                          -> copies, so that the file's other pages leave the process
    dequantized_forwards  weights in 4 or 8 bits or bfloat16, during generation on a CPU
                          -> dequantized once, not once per token

The embedding, the head and the norms keep their storage: code outside of their forward reads them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.models import heads
from lora_ft.ops import expert_codes
from lora_ft.ops.experts import is_experts, module_experts, parameter_names
from lora_ft.ops.weights import FrozenWeight, ScaledLinear, frozen_linear, frozen_weight

_MOST_DEQUANTIZED_BYTES = 2 << 30  # half a billion float32 weights; larger models generate from their small weights


def exact_bfloat16(model: PreTrainedModel, modules_to_save: Collection[str] = ()) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield the frozen linear layers whose weights bfloat16 holds exactly, each with its bfloat16 weight.

    Skips the layers of an attached adapter and those that PEFT adapts as parameters, and all layers that
    `modules_to_save` names or contains, which will be one or the other. The caller replaces one weight at a time, so
    that only one copy exists beside the model.
    """
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    head = heads.head(model)
    in_head = set(head.modules()) if head is not None else set()  # with an adapter, the head is a part of its layer
    as_parameters = {module.base_layer for module in model.modules() if type(module).__name__ == "ParamWrapper"}
    for name, module in list(model.named_modules()):
        layer: Any = module
        if type(layer) not in (nn.Linear, Conv1D) or layer in in_head or layer in as_parameters:
            continue
        if any(part.startswith(("lora_", "modules_to_save")) for part in name.split(".")):
            continue
        shared = holders[id(layer.weight)] > 1
        if shared or layer.weight.requires_grad or any(f".{part}." in f".{name}." for part in modules_to_save):
            continue
        narrow = _narrow(layer.weight.detach())
        if narrow is not None:
            yield layer, narrow


def _narrow(weight: Tensor) -> Tensor | None:
    """Return the weight in bfloat16, or None if that would lose a bit. One without values is taken to lose none."""
    if weight.dtype != torch.float32:
        return None
    if weight.is_meta:
        return weight.to(torch.bfloat16)
    # Most bases are stored in bfloat16 either throughout or not at all: the first row decides nearly always.
    for part in (weight[:1], weight):
        narrow = part.to(torch.bfloat16)
        if not torch.equal(narrow.float().view(torch.int32), part.view(torch.int32)):
            return None
    return narrow


def stored_forward(layer: Any, inputs: Tensor) -> Tensor:
    """Multiply by the weight cast to `layer.compute_dtype`."""
    weight = frozen_weight(layer, layer.compute_dtype)
    assert weight is not None  # frozen_weight returns None only for another dtype than compute_dtype
    return frozen_linear(inputs, weight, layer.bias)


def copy_mapped_weights(model: PreTrainedModel) -> None:
    """Copy the weights that a quantized model on the CPU still reads from the mapped file: embedding and norms.

    They keep the whole file mapped, with all pages that were read for quantization in the process: 538 MB for
    SmolLM2-135M, where the copy takes 114 MB. Do not call it for an unquantized model, which needs the whole file.
    """
    for parameter in model.parameters():
        if parameter.is_cpu and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def dequantized_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Return forwards that multiply by weights dequantized once, for layers on the CPU in 4 or 8 bits or in bfloat16.

    A training step dequantizes each weight once per thousand tokens, generation once per token and spends most of its
    time there. The numbers are the same to the bit. Costs one copy of the linear weights in the compute dtype; returns
    no forwards if that is over 2 GiB, and none of experts if that is over 2 GiB with their weights. Leaves out layers
    that were quantized from another dtype than they compute in.
    """
    layers: list[Any] = [module for module in model.modules() if _is_stored_small(module)]
    size = sum(_dequantized_bytes(layer) for layer in layers)
    if size > _MOST_DEQUANTIZED_BYTES:
        return {}
    weights = {layer: cast(FrozenWeight, frozen_weight(layer, layer.compute_dtype)) for layer in layers}
    forwards: dict[nn.Module, Callable[..., Tensor]] = {
        layer: functools.partial(_dequantized_forward, weight(), layer.bias) for layer, weight in weights.items()
    }
    experts = {module: codes for module in model.modules() if (codes := _quantized_on_cpu(module))}
    size += sum(expert_codes.dequantized_bytes(each) for codes in experts.values() for each in codes.values())
    if size <= _MOST_DEQUANTIZED_BYTES:
        for module, codes in experts.items():
            whole = {name: expert_codes.dequantize(each) for name, each in codes.items()}
            forwards[module] = functools.partial(module_experts, module, weights=functools.partial(_of_whole, whole))
    return forwards


def _quantized_on_cpu(module: Any) -> dict[str, Any]:
    """Return the parameters of codes of a module of experts on the CPU, by name; {} for another module."""
    names = parameter_names(module) if is_experts(module) else ()
    found = {name: module._parameters.get(name) for name in names}
    return found if all(expert_codes.is_quantized(each) and each.is_cpu for each in found.values()) else {}


def _of_whole(whole: dict[str, Tensor], module: Any, name: str, start: int, stop: int) -> Tensor:
    matrices = whole[name][start:stop]
    return matrices.mT if module.is_transposed else matrices


def _is_stored_small(module: Any) -> bool:
    # Layers stored in another dtype than they compute in have this attribute.
    compute = getattr(module, "compute_dtype", None)
    return isinstance(compute, torch.dtype) and _stored(module).is_cpu and frozen_weight(module, compute) is not None


def _stored(layer: Any) -> Any:
    """Return the weight as it is stored; to ask a layer in FP8 for its weight would make it."""
    return layer.codes if isinstance(layer, ScaledLinear) else layer.weight


def _dequantized_bytes(layer: Any) -> int:
    state = getattr(_stored(layer), "quant_state", None)
    elements: int = (_stored(layer) if state is None else state).shape.numel()
    return elements * int(layer.compute_dtype.itemsize)


def _dequantized_forward(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return frozen_linear(inputs, lambda: weight, bias)
