"""Keep weights in the form in which the files hold them, with the numbers of dequantized ones, bit for bit.

    fp8      linear layers    ScaledLinear: codes of 8 bits, scales of blocks (ops/weights.py)
    mxfp4    experts          ExpertCodes: codes of 4 bits, a power of two for 32 values (ops/expert_codes.py)

    apart(tensors, model)     codes and scales as tensors of their own
    model_class(...)          a class whose models have these layers before transformers reads tensors into them
    settle(model, dtype)      after loading
    keep_meta(model, files)   the same for a model without values, as far as config.json tells; predicts memory

Weights under names that transformers changes while it loads, and the head, are dequantized.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_ft.models import heads
from lora_ft.models.dequantized_files import FLOAT8, Experts, Lazy, Scaled
from lora_ft.models.quantize_experts import read_as_dequantized
from lora_ft.models.stored import Stored
from lora_ft.ops.expert_codes import MX_BLOCK, expert_codes
from lora_ft.ops.experts import is_experts, parameter_names
from lora_ft.ops.weights import ScaledLinear

_FP8_BLOCKS = (128, 128)  # of files whose config does not name them
_EXPONENTS = "_exponents"  # after the name of a parameter of experts: their buffer while they are loaded


def apart(tensors: dict[str, Any], plain: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of files with codes and scales apart, and those that keep their form, by name.

    `plain` is the model without values that the tensors belong to.
    """
    layers, experts = _linear_layers(plain), set(_experts(plain))
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (isinstance(tensor, Scaled) and name.removesuffix(".weight") in layers)
        or (isinstance(tensor, Experts) and name in experts)
    }
    made = {name: tensor for name, tensor in tensors.items() if name not in kept}
    for name, tensor in kept.items():
        if isinstance(tensor, Experts):
            made |= {name: tensor.blocks, f"{name}{_EXPONENTS}": tensor.exponents}
        else:
            layer = name.removesuffix(".weight")
            made |= {f"{layer}.codes": Lazy(tensor.read_codes), f"{layer}.scales": Lazy(tensor.read_scales)}
    return made, kept


def model_class(plain: type, kept: dict[str, Any]) -> type:
    """Return a class of transformers whose models have these weights in the form of the files from the start.

    transformers makes a model without values, then loads it: there is no other moment to replace layers.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
        for name, tensor in kept.items():
            if isinstance(tensor, Experts):
                _replace_experts(self, name, tensor.blocks.get_shape())
            else:
                _replace_linear(self, name.removesuffix(".weight"), tensor.float8, tensor.grid, tensor.blocks)

    return type(plain.__name__, (plain,), {"__init__": init, "__module__": plain.__module__})


def settle(model: Any, dtype: torch.dtype) -> None:
    """Give experts in MXFP4 the form of quantized experts, which compute in `dtype`."""
    for module in model.modules():
        for name in [name for name in module._parameters if f"{name}{_EXPONENTS}" in module._buffers]:
            exponents = module._buffers.pop(f"{name}{_EXPONENTS}")
            codes = module._parameters[name].data
            module._parameters[name] = expert_codes(codes, exponents=exponents, compute_dtype=dtype)
    read_as_dequantized(model)


def keep_meta(network: Any, files: Stored) -> None:
    """Give a model on the meta device the layers that loading its files would give it, as far as config.json tells."""
    settings = files.settings
    skipped = list(settings.get("modules_to_not_convert") or settings.get("ignored_layers") or [])
    if files.method == "mxfp4":
        for name in filter(lambda name: should_convert_module(name, skipped), _experts(network)):
            count, inputs, outputs = network.get_parameter(name).shape
            _replace_experts(network, name, (count, outputs, inputs // MX_BLOCK, MX_BLOCK // 2))
        settle(network, network.dtype)
    elif files.is_fp8:
        for name, layer in _linear_layers(network).items():
            if should_convert_module(name, skipped):
                size = (layer.out_features, layer.in_features)
                named = tuple(settings.get("weight_block_size") or _FP8_BLOCKS)
                blocks = (1, size[1]) if files.method == "fbgemm_fp8" else named
                grid = tuple(-(-length // block) for length, block in zip(size, blocks, strict=True))
                _replace_linear(network, name, FLOAT8["F8_E4M3"], grid, blocks)


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    head = heads.head(model)
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}


def _experts(model: Any) -> list[str]:
    """Return the names of the parameters [E, in, out] of experts, the layout that the files of MXFP4 stand for."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if is_experts(module) and module.is_transposed
        for name in parameter_names(module)
    ]


def _replace_linear(model: Any, name: str, float8: torch.dtype, grid: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    layer = ScaledLinear(model.get_submodule(name), float8, grid, (blocks[0], blocks[1]))
    layer._is_hf_initialized = True  # transformers draws no values for it
    model.set_submodule(name, layer)


def _replace_experts(model: Any, name: str, blocks: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    device = module._parameters[leaf].device
    codes = torch.empty(tuple(blocks), dtype=torch.uint8, device=device)
    module._parameters[leaf] = nn.Parameter(codes, requires_grad=False)
    module.register_buffer(f"{leaf}{_EXPONENTS}", torch.empty(tuple(blocks)[:-1], dtype=torch.uint8, device=device))
