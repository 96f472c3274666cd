"""Make forwards that compute a LoRA layer as one function in training; all other calls use PEFT's own forward.

layer.forward(x)    training, one plain LoRA active, no dropout, x in the adapter's dtype
                        -> ops.lora_linear: same value and gradients, fewer passes over memory
                    anything else (adapter off, merged, several active, DoRA, evaluation, bfloat16 ...)
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

from lora_ft.ops.cross_entropy import HeadLora, linear_cross_entropy
from lora_ft.ops.lora_linear import lora_linear
from lora_ft.ops.weights import FrozenWeight, frozen_weight, why_no_weight

if TYPE_CHECKING:
    from peft import PeftModel

Forward = Callable[..., Tensor]


class LoraForwards(NamedTuple):
    """New forwards by module, losses of adapted heads by module, and log lines."""

    forwards: dict[nn.Module, Forward]
    head_losses: dict[nn.Module, Forward]
    reasons: list[str]


def fast_forwards(model: "PeftModel", name: str) -> LoraForwards:
    """Return the new forwards for adapter `name`; the log lines count the layers that stay plain."""
    from peft.tuners.lora import LoraLayer

    found = LoraForwards({}, {}, [])
    reasons: Counter[str] = Counter()
    computed = model.get_base_model().get_input_embeddings().weight.dtype
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r:
            continue
        reason = _why_plain(layer, name) or why_no_weight(layer.get_base_layer(), layer.lora_A[name].weight.dtype)
        if not reason and computed != layer.lora_A[name].weight.dtype:
            reason = f"the base computes in {str(computed).removeprefix('torch.')}"
        if reason:
            reasons[reason] += 1
        found.forwards[layer] = functools.partial(_forward, layer, layer.forward)
        found.head_losses[layer] = functools.partial(_head_loss, layer)
    found.reasons.extend(f"{count} LoRA layers compute as PEFT does: {reason}" for reason, count in reasons.items())
    return found


def _why_plain(layer: Any, name: str) -> str:
    """Return the property of an adapter that excludes the fast form, for any base, or ""."""
    if name not in layer.lora_A:
        return "embeddings"
    if name in layer.lora_variant:
        return "DoRA"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "adapter.lora_dropout"
    return ""


def _fast(layer: Any, x: Tensor) -> tuple[str, FrozenWeight] | None:
    """Return the active adapter and the base's weight if the fast form applies to this input; else None."""
    active = [name for name in layer.active_adapters if name in layer.r]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    if _why_plain(layer, name) or x.dtype != layer.lora_A[name].weight.dtype:
        return None
    weight = frozen_weight(layer.get_base_layer(), x.dtype)
    return None if weight is None else (name, weight)


def _forward(layer: Any, plain: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    trains = layer.training and torch.is_grad_enabled() and not (arguments or options)
    chosen = _fast(layer, x) if trains else None
    if chosen is None:
        return plain(x, *arguments, **options)
    name, weight = chosen
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, weight, layer.get_base_layer().bias, a, b, layer.scaling[name])


def _head_loss(layer: Any, hidden: Tensor, targets: Tensor) -> Tensor | None:
    """Return the sum of cross-entropies of a head with LoRA, in chunks; None if it needs the layer's own logits."""
    chosen = _fast(layer, hidden)
    if chosen is None:
        return None
    name, weight = chosen
    lora = HeadLora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return linear_cross_entropy(hidden, weight(), layer.get_base_layer().bias, targets, lora)
