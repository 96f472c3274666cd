"""Find the matrices of experts that LoRA can train, and read what PEFT attaches to them.

transformers keeps the experts of a layer as parameters of one module, which multiplies by them itself:

    model.layers.0.mlp.experts.gate_up_proj    [experts, out, in]; [experts, in, out] in gpt_oss and llama4
    model.layers.0.mlp.experts.down_proj

PEFT adapts a parameter (LoraConfig.target_parameters) through a wrapper of its module, the next parameter through a
wrapper of that wrapper, and adds s B A to the weights before each forward:

    experts.base_layer.lora_A.weight    gate_up_proj, the inner wrapper    A [experts * r, in], by expert, then by rank
    experts.lora_B.weight               down_proj, the outer wrapper       B [out, r * experts], by rank, then by expert

It has neither dropout nor DoRA for parameters.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models.acceleration import replaced_forwards
from lora_ft.ops.expert_codes import dtype_of, is_quantized, shape_of
from lora_ft.ops.experts import module_experts


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters that hold a matrix for each expert, quantized or not, by name, in the model's order."""
    counts = expert_counts(model.config)
    return {
        f"{prefix}.{key}" if prefix else key: parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if len(shape := shape_of(parameter)) == 3 and shape[0] in counts
    }


def expert_counts(model_config: Any) -> set[int]:
    """Return the values of settings such as num_local_experts and moe_num_experts; none for a model without experts."""
    settings = vars(model_config.get_text_config())
    return {
        value
        for key, value in settings.items()
        if "expert" in key and "_per_" not in key and "shared" not in key and type(value) is int and value > 1
    }


def hindrance(adapter: config.Adapter) -> str:
    """Return the setting that keeps PEFT from adapting parameters, and the reason; "" if PEFT adapts them."""
    if adapter.lora_dropout:
        return f"adapter.lora_dropout={adapter.lora_dropout:g} has no place where PEFT adds the update to the weights"
    return "PEFT has no DoRA for parameters (adapter.use_dora=true)" if adapter.use_dora else ""


def update(wrapper: Any, name: str) -> Tensor:
    """Return s B A of adapter `name`, laid out as the parameter, in the precision of A and B."""
    left, right, scaling = _factors(wrapper, name)
    product: Tensor = left.detach() @ right.detach() * scaling
    return product[0] if wrapper.num_experts == 1 else product


def _factors(wrapper: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Return L, R and s of adapter `name`: its update of the parameter [experts, ..] is s L R."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, wrapper.num_experts).permute(2, 0, 1)
    is_turned = wrapper.num_experts > 1 and not wrapper._did_swap_in_out_features
    return (*((a.mT, b.mT) if is_turned else (b, a)), wrapper.scaling[name])


def wrapper_of(module: Any, parameter: str, name: str) -> Any:
    """Return the wrapper by which adapter `name` changes a parameter of a module; None if it does not."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter and name in module.scaling:
            return module
        module = module.base_layer
    return None


def use_wrappers_that_keep_the_base(model: nn.Module) -> None:
    """Let PEFT's wrappers of parameters add their updates where the parameter is read, with the same numbers.

    PEFT's own forward takes the parameter out of its module and puts it back. This changes the order of the module's
    parameters, by which PEFT names the matrices of the next adapter, and replaces quantized experts by dequantized
    ones. It does not run on the meta device either, for which torch.autocast cannot be switched off.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            wrapper.__class__ = _KeepingParamWrapper


class _KeepingParamWrapper(ParamWrapper):
    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base, key = self.get_base_layer(), self.parameter_name
        factors = [_factors(self, name) for name in active_adapters if name in self.lora_A]
        before = type(base)
        read = functools.partial(_read, before, key)

        def updated(module: Any) -> Tensor:
            weight: Tensor = read(module)
            for left, right, scaling in factors:
                weight = _added(weight, left.to(weight.dtype), right.to(weight.dtype), scaling)
            return weight

        # A forward that was set on the experts may read their parameters otherwise than as attributes.
        own = {base: functools.partial(_own_forward(before), base)} if self.num_experts > 1 else {}
        base.__class__ = type(before.__name__, (before,), {key: property(updated), "forward": _own_forward(before)})
        try:
            with replaced_forwards(own):
                yield
        finally:
            base.__class__ = before


# PEFT finds the wrappers of an adapter by this name when it adds another one.
_KeepingParamWrapper.__name__ = ParamWrapper.__name__


def _read(owner: type, key: str, module: nn.Module) -> Any:
    """Return a parameter as code that uses the module gets it: quantized experts are dequantized by a property."""
    found = getattr(owner, key, None)
    return found.fget(module) if isinstance(found, property) and found.fget else module._parameters[key]


def _own_forward(owner: type) -> Any:
    """Return the forward that transformers or torch has given to a class of modules."""
    own: list[Any] = [vars(each)["forward"] for each in owner.__mro__ if "forward" in vars(each)]
    return next(forward for forward in own if forward is not module_experts)


def _added(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    if weight.dim() == 2:
        return weight + (left @ right * scaling)[0]
    return torch.baddbmm(weight, left, right, alpha=scaling)


@contextlib.contextmanager
def shapes_only(model: nn.Module) -> Iterator[None]:
    """Let quantized experts be read as tensors without values until the block ends: PEFT asks for shape and dtype."""
    before = {}
    for module in model.modules():
        codes = {key: p for key, p in module._parameters.items() if is_quantized(p)}
        if codes:
            before[module] = owner = type(module)
            empty = {key: property(functools.partial(_empty, key)) for key in codes}
            module.__class__ = type(owner.__name__, (owner,), empty)
    try:
        yield
    finally:
        for module, owner in before.items():
            module.__class__ = owner


def _empty(key: str, module: Any) -> Tensor:
    codes = module._parameters[key]
    return torch.empty((), dtype=dtype_of(codes), device=codes.device).expand(shape_of(codes))
