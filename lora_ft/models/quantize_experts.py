"""Quantize the parameters of experts, of which a mixture mostly consists, while transformers loads them.

    with while_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=...)
    model.model.layers[0].mlp.experts._parameters["down_proj"]    codes, uint8 or int8 (ops/expert_codes.py)
    model.model.layers[0].mlp.experts.down_proj                   dequantized at each access: [E, out, in]
    model.model.layers[0].mlp.experts(x, index, scores)           dequantizes one expert at a time (ops/experts.py)

transformers quantizes linear layers only. Here its quantizer for bitsandbytes also takes each 3-D parameter of a module
of experts, as soon as it is read and put together from its parts; one expert after the other is quantized.

transformers' own forward of experts would dequantize all of a layer, and autograd would keep them until the backward,
for every layer. So the forward of ops/experts.py belongs to quantized experts, wherever they are used. It is compared
with the class's own one on a small copy while loading; a class that differs keeps its own, and a warning says so.

bitsandbytes 0.50 has a parametrization for this (nn/parametrize.py), which is not used: PEFT 0.21 takes its modules for
layers by their names, such as down_proj, and leaves its own update in the weight after each forward.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_ft.ops import expert_codes
from lora_ft.ops.experts import is_experts, module_experts, parameter_names

log = logging.getLogger("lora_ft")

_NESTED_BLOCK = 256  # scales that share a scale, as in bitsandbytes


def planned_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of experts that quantization must change, in order."""
    return [f"{prefix}.{name}" for prefix, module in model.named_modules() for name in _planned(module)]


def _planned(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that are to be quantized; [] for one that is not of experts.

    Blocks of values that share a scale must not cross the border between two experts.
    """
    names = parameter_names(module) if is_experts(module) else ()
    return [n for n in names if expert_codes.shape_of(module._parameters[n])[1:].numel() % expert_codes.BLOCK == 0]


def quantized_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of experts that are quantized, in order."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if is_experts(module)
        for name in parameter_names(module)
        if expert_codes.is_quantized(module._parameters[name])
    ]


@contextlib.contextmanager
def while_loading() -> Iterator[None]:
    """Let transformers' quantizers for bitsandbytes quantize experts as well until the block ends."""
    from transformers.quantizers import auto

    table, names = auto.AUTO_QUANTIZER_MAPPING, ("bitsandbytes_4bit", "bitsandbytes_8bit")
    before = {name: table[name] for name in names}
    table.update({name: _with_experts(quantizer) for name, quantizer in before.items()})
    try:
        yield
    finally:
        table.update(before)


def quantize(model: nn.Module, settings: Any) -> None:
    """Quantize the experts of a model, also of one without values; `settings` is transformers' BitsAndBytesConfig."""
    for module in model.modules():
        for name in _planned(module):
            setattr(module, name, quantized(module._parameters[name], settings, _is_transposed(module)))
    read_as_dequantized(model)


@functools.cache
def _with_experts(quantizer: Any) -> Any:
    """Return a subclass of one of transformers' quantizers that also quantizes experts."""

    def needs(self: Any, model: Any, param_name: str, **options: Any) -> bool:
        return _is_planned(model, param_name) or quantizer.param_needs_quantization(self, model, param_name, **options)

    def operation(self: Any) -> "_Quantize":
        return _Quantize(self.quantization_config, quantizer.get_quantize_ops(self))

    def after(self: Any, model: Any, **options: Any) -> Any:
        read_as_dequantized(model)
        return quantizer._process_model_after_weight_loading(self, model, **options)

    methods = {
        "param_needs_quantization": needs,
        "get_quantize_ops": operation,
        "_process_model_after_weight_loading": after,
    }
    return type(quantizer.__name__, (quantizer,), methods)


def _is_planned(model: Any, parameter: str) -> bool:
    owner, _, name = parameter.rpartition(".")
    return name in _planned(model.get_submodule(owner))


class _Quantize:
    """An operation of transformers' loading: quantize parameters of experts, and give others to `linear`."""

    def __init__(self, settings: Any, linear: Any) -> None:
        self.settings, self.linear = settings, linear

    def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, Tensor]:
        """Return the quantized parameters by name."""
        made: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            if not _is_planned(model, name):
                made |= self.linear.convert({name: value}, model=model, **options)
                continue
            whole = value[0] if isinstance(value, list) else value
            made[name] = quantized(whole, self.settings, _is_transposed(model.get_submodule(name.rpartition(".")[0])))
        return made


def _is_transposed(module: Any) -> bool:
    return bool(module.is_transposed)


@torch.no_grad()
def quantized(value: Any, settings: Any, transposed: bool) -> expert_codes.ExpertCodes:
    """Return the codes of a parameter [E, ..]; transposed: an expert's matrix is [in, out] instead of [out, in]."""
    return _in_8_bits(value, transposed) if settings.load_in_8bit else _in_4_bits(value, settings)


def _in_4_bits(value: Tensor, settings: Any) -> expert_codes.ExpertCodes:
    from bitsandbytes import functional

    kind, block = settings.bnb_4bit_quant_type, expert_codes.BLOCK
    made = torch.empty(value.numel() // 2, 1, dtype=torch.uint8, device=value.device)
    scales = torch.empty(value.numel() // block, dtype=torch.float32, device=value.device)
    for matrix, codes, absmax in zip(value, made.chunk(len(value)), scales.chunk(len(value)), strict=True):
        part, state = functional.quantize_4bit(matrix.contiguous(), blocksize=block, quant_type=kind)
        codes.copy_(part)
        absmax.copy_(state.absmax)
        del part, state  # before those of the next expert are made
    state = functional.QuantState(
        absmax=scales, shape=value.shape, dtype=value.dtype, blocksize=block, quant_type=kind,
        code=functional.get_4bit_type(kind, device=value.device),
    )  # fmt: skip
    if settings.bnb_4bit_use_double_quant:
        state.offset = scales.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=_NESTED_BLOCK)
        state.nested = True
    return expert_codes.expert_codes(made, quant_state=state)


def _in_8_bits(value: Tensor, transposed: bool) -> expert_codes.ExpertCodes:
    from bitsandbytes import functional

    outputs = value.shape[2 if transposed else 1]
    made = torch.empty(value.shape, dtype=torch.int8, device=value.device)
    scales = torch.empty(len(value), outputs, dtype=torch.float32, device=value.device)
    for matrix, codes, scale in zip(value, made, scales, strict=True):
        rows = matrix.T if transposed else matrix
        part, found, _ = functional.int8_vectorwise_quant(rows.to(torch.float16, memory_format=torch.contiguous_format))
        codes.copy_(part.T if transposed else part)
        scale.copy_(found)
        del part  # before that of the next expert is made
    return expert_codes.expert_codes(
        made, SCB=scales[:, None, :] if transposed else scales[:, :, None], compute_dtype=value.dtype
    )


def read_as_dequantized(model: nn.Module) -> None:
    """Let code that reads a quantized parameter of experts get its dequantized values, and let experts be computed so.

    Of a model without values the forwards are not compared.
    """
    # Here: it imports model code of transformers, which asks for kernels of the hub unless io/process.py forbids it.
    from lora_ft.models.accelerated_experts import computes_as_its_class

    equal: dict[type, bool] = {}
    for module in filter(is_experts, model.modules()):
        names = tuple(n for n in parameter_names(module) if expert_codes.is_quantized(module._parameters[n]))
        if names:
            experts_class: Any = type(module)
            module.__class__ = _reading(experts_class, names, computes_as_its_class(module, equal))
    for each in (experts_class for experts_class, is_equal in equal.items() if not is_equal):
        log.warning(
            "quantized experts of %s compute as transformers does, with all of a layer dequantized at once: one at a "
            "time, they would compute something else",
            each.__name__,
        )


@functools.cache
def _reading(experts_class: Any, names: tuple[str, ...], one_at_a_time: bool) -> Any:
    """Return a subclass whose attributes `names` are dequantized at each access.

    It has the class's name, by which other code recognizes experts.
    """

    def attribute(name: str) -> property:
        return property(lambda module: expert_codes.dequantize(module._parameters[name]))

    members: dict[str, Any] = {name: attribute(name) for name in names}
    return type(
        experts_class.__name__, (experts_class,), members | ({"forward": module_experts} if one_at_a_time else {})
    )
