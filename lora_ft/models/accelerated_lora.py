"""Make forwards that compute a LoRA layer as one function; all other calls use PEFT's own forward.

layer.forward(x)    one active adapter: plain LoRA, with dropout or DoRA; x in the adapter's dtype or in 16 bits
                        -> ops.lora_linear, ops.dora: same value and gradients, fewer passes over memory
experts.forward     one active adapter: plain LoRA of their parameters
                        -> ops.experts: one expert at a time, its update never added to its weights
                    anything else (adapter off, merged, several active, DoRA with dropout ...)
                        -> PEFT's forward, so that PEFT's switches keep working

A head with LoRA also gets a chunked loss, the attribute `token_loss_sum` that `ops.token_loss` looks for. Its logits
never exist for all positions at once, not in evaluation either.

This module only makes forwards. models/acceleration.py installs them.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ft.models.accelerated_experts import computes_as_its_class
from lora_ft.ops.cross_entropy import linear_cross_entropy
from lora_ft.ops.dora import row_norms, scaled_rows
from lora_ft.ops.experts import ExpertLora, expert_lora, is_experts, module_experts
from lora_ft.ops.logits import HeadLora, LogitMap
from lora_ft.ops.lora_linear import lora_linear
from lora_ft.ops.weights import FrozenWeight, frozen_weight, is_4bit, why_no_weight

if TYPE_CHECKING:
    from peft import PeftModel

Forward = Callable[..., Tensor]

# In generation, bitsandbytes multiplies a few rows by 4-bit codes; dequantizing the weight reads nine times as much.
_FEW_ROWS = 64


class LoraForwards(NamedTuple):
    """New forwards by module, losses of adapted heads by module, log lines, and the dtype of computation."""

    forwards: dict[nn.Module, Forward]
    head_losses: dict[nn.Module, Forward]
    reasons: list[str]
    dtype: torch.dtype


def fast_forwards(model: "PeftModel", name: str) -> LoraForwards:
    """Return the new forwards for adapter `name`; the log lines count the layers that stay plain."""
    from peft.tuners.lora import LoraLayer

    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    found, reasons = LoraForwards({}, {}, [], dtype), Counter[str]()
    equal: dict[type, bool] = {}
    inner: set[nn.Module] = set()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r or layer in inner:
            continue
        if _is_of_experts(layer):
            inner.update(_chain(layer)[1:])
            if reason := _why_plain(layer, name, dtype) or _why_plain_experts(layer.get_base_layer(), equal):
                reasons[reason] += 1
            else:
                found.forwards[layer] = functools.partial(_forward_of_experts, layer, layer.forward)
            continue
        if reason := _why_plain(layer, name, dtype) or why_no_weight(layer.get_base_layer(), dtype):
            reasons[reason] += 1
        found.forwards[layer] = functools.partial(_forward, layer, layer.forward)
        found.head_losses[layer] = functools.partial(_head_loss, layer)
    found.reasons.extend(f"{count} LoRA layers compute as PEFT does: {reason}" for reason, count in reasons.items())
    return found


def matrices_by_layer(model: "PeftModel", name: str) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the decoder layers with the matrices A and B of adapter `name` in each."""
    from peft.tuners.lora import LoraLayer

    found = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            adapted = [m for m in layer.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
            found.append((layer, [matrix[name].weight for m in adapted for matrix in (m.lora_A, m.lora_B)]))
    return found


def _why_plain(layer: Any, name: str, dtype: torch.dtype) -> str:
    """Return why an adapter's layer has no fast form for inputs of `dtype`, for any base; "" if it has one."""
    if name not in layer.lora_A:
        return "embeddings"
    variant = layer.lora_variant.get(name)
    if variant is not None and not layer.use_dora.get(name):
        return type(variant).__name__
    if variant is not None and not isinstance(layer.lora_dropout[name], nn.Identity):
        return "DoRA with adapter.lora_dropout"
    if layer.lora_B[name].bias is not None:
        return "lora_bias"
    adapter = layer.lora_A[name].weight.dtype
    if dtype != adapter and not (adapter is torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        return f"the adapter is in {_named(adapter)}, but the base computes in {_named(dtype)}"
    return ""


def _is_of_experts(layer: Any) -> bool:
    """Return True for PEFT's wrapper of a parameter of experts; it may hold the wrapper of another parameter."""
    return hasattr(layer, "parameter_name") and layer.num_experts > 1


def _why_plain_experts(module: nn.Module, equal: dict[type, bool]) -> str:
    """Return why a module of experts has no fast form, "" if it has one; `equal` holds the checked classes."""
    if not is_experts(module):
        return "experts of another form"
    return "" if computes_as_its_class(module, equal) else f"{type(module).__name__} computes otherwise"


def _chain(wrapper: Any) -> list[Any]:
    """Return the wrappers of the parameters of one module of experts, from the outermost."""
    found = []
    while _is_of_experts(wrapper):
        found.append(wrapper)
        wrapper = wrapper.base_layer
    return found


def _forward_of_experts(wrapper: Any, plain: Callable[..., Tensor], x: Tensor, *given: Any, **options: Any) -> Tensor:
    loras: dict[str, ExpertLora] = {}
    for layer in _chain(wrapper):
        active = [name for name in layer.active_adapters if name in layer.r]
        if options or len(given) != 2 or layer.disable_adapters or layer.merged or len(active) != 1:
            return plain(x, *given, **options)
        if _why_plain(layer, active[0], x.dtype):
            return plain(x, *given, **options)
        a, b, scaling = (values[active[0]] for values in (layer.lora_A, layer.lora_B, layer.scaling))
        loras[layer.parameter_name] = expert_lora(a.weight, b.weight, scaling, layer.num_experts, x.dtype)
    index, scores = given
    return module_experts(wrapper.get_base_layer(), x, index, scores, loras)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fast(layer: Any, x: Tensor) -> tuple[str, FrozenWeight] | None:
    """Return the active adapter and the base's weight if the fast form applies to this input; else None."""
    active = [name for name in layer.active_adapters if name in layer.r]
    if layer.disable_adapters or layer.merged or len(active) != 1 or _why_plain(layer, active[0], x.dtype):
        return None
    base = layer.get_base_layer()
    if not torch.is_grad_enabled() and x.numel() < _FEW_ROWS * x.shape[-1] and is_4bit(base):
        return None
    weight = frozen_weight(base, x.dtype)
    return None if weight is None else (active[0], weight)


def _forward(layer: Any, plain: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    chosen = None if arguments or options else _fast(layer, x)
    if chosen is None:
        return plain(x, *arguments, **options)
    name, weight = chosen
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    bias, dropout = layer.get_base_layer().bias, _dropout(layer, name)
    if name not in layer.lora_variant:
        return lora_linear(x, weight, bias, a, b, scaling, dropout)
    magnitude = layer.lora_magnitude_vector[name].weight
    norms = row_norms(weight(), a, b, scaling)
    return scaled_rows(lora_linear(x, weight, None, a, b, scaling), magnitude, norms, bias)


def _dropout(layer: Any, name: str) -> float:
    """Return the probability with which an adapter drops inputs now; 0 in eval mode."""
    dropout = layer.lora_dropout[name]
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def _head_loss(
    layer: Any, hidden: Tensor, targets: Tensor, logit_map: LogitMap, weights: Tensor | None = None
) -> Tensor | None:
    """Return the weighted sum of cross-entropies of a head with LoRA, in chunks; None if it needs its own logits."""
    chosen = _fast(layer, hidden)
    if chosen is None or chosen[0] in layer.lora_variant or _dropout(layer, chosen[0]):
        return None
    name, weight = chosen
    lora = HeadLora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return linear_cross_entropy(hidden, weight(), layer.get_base_layer().bias, targets, lora, logit_map, weights)
