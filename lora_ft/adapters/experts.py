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
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.ops.expert_codes import shape_of


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters that hold a matrix for each expert, quantized or not, by name, in the model's order."""
    counts = _expert_counts(model)
    return {
        f"{prefix}.{key}" if prefix else key: parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if len(shape := shape_of(parameter)) == 3 and shape[0] in counts
    }


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """Return the values of settings such as num_local_experts and moe_num_experts."""
    settings = vars(model.config.get_text_config())
    return {
        value
        for key, value in settings.items()
        if "expert" in key and "_per_" not in key and "shared" not in key and type(value) is int and value > 1
    }


def hindrance(adapter: config.Adapter) -> str:
    """Return the setting with which PEFT adapts no parameter, and the reason; "" if there is none."""
    if adapter.lora_dropout:
        return f"adapter.lora_dropout={adapter.lora_dropout:g} has no place where PEFT adds the update to the weights"
    return "PEFT has no DoRA for parameters (adapter.use_dora=true)" if adapter.use_dora else ""


def update(wrapper: Any, name: str) -> Tensor:
    """Return s B A of adapter `name`, laid out as the parameter, in the precision of A and B."""
    a, b = wrapper.lora_A[name].weight.detach(), wrapper.lora_B[name].weight.detach()
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, wrapper.num_experts).permute(2, 0, 1)
    product: Tensor = b @ a * wrapper.scaling[name]
    parameter = wrapper.get_param()
    if parameter.dim() == 2:
        return product[0]
    return product if wrapper._did_swap_in_out_features else product.transpose(1, 2)


def wrapper_of(module: Any, parameter: str, name: str) -> Any:
    """Return the wrapper by which adapter `name` changes a parameter of a module; None if it does not."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter and name in module.scaling:
            return module
        module = module.base_layer
    return None


def remember_order(model: nn.Module) -> None:
    """Let wrappers remember the order of their module's parameters, which PEFT's forward changes.

    PEFT wraps the parameters of a module in this order, and the names in its files depend on it.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            vars(wrapper)["parameter_order"] = tuple(wrapper.get_base_layer()._parameters)


def restore_order(wrapper: Any) -> None:
    """Put the parameters of a wrapper's module into the order that they had when it was attached."""
    held = wrapper.get_base_layer()._parameters
    for name in vars(wrapper).get("parameter_order", ()):
        held[name] = held.pop(name)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Let PEFT's forward of a parameter run on the meta device, for which torch.autocast cannot be switched off."""
    folded = peft_layers._LoraFactorsProxy.forward

    def fold(proxy: Any, weight: Tensor) -> Tensor:
        if not weight.is_meta:
            return folded(proxy, weight)
        return torch.baddbmm(weight, proxy.lhs, proxy.rhs, alpha=proxy.scaling)

    peft_layers._LoraFactorsProxy.forward = fold
    try:
        yield
    finally:
        peft_layers._LoraFactorsProxy.forward = folded
