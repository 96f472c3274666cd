"""Let LoRA layers compute with one function while they train; everything else stays PEFT's own forward.

layer.forward(x)    gradients wanted, one plain LoRA active, no dropout, x in the adapter's dtype
                        -> ops.lora_linear: same value and gradients, fewer passes over memory
                    anything else (adapter off, merged, several active, DoRA, evaluation, bfloat16 ...)
                        -> PEFT's forward, so that its switches mean what they meant
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.models.quantize import import_bitsandbytes
from lora_ft.ops.lora_linear import lora_linear


def use_fast_forwards(model: PeftModel, name: str) -> list[str]:
    """Replace the forward of every LoRA layer that can be; says how many stay plain for adapter `name`, and why."""
    reasons: Counter[str] = Counter()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r:
            continue
        reason = _why_plain(layer, name)
        if not reason and _weight(layer.get_base_layer(), layer.lora_A[name].weight.dtype) is None:
            reason = "the base computes in another dtype, or in int8"
        if reason:
            reasons[reason] += 1
        if "forward" not in vars(layer):
            layer.forward = functools.partial(_forward, layer, layer.forward)
    return [f"{count} LoRA layers compute as PEFT does: {reason}" for reason, count in reasons.items()]


def _why_plain(layer: Any, name: str) -> str:
    """What of an adapter keeps its layer from the fast form, whatever the base; empty where nothing does."""
    if name not in layer.lora_A:
        return "embeddings"
    if name in layer.lora_variant:
        return "DoRA"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "adapter.dropout"
    return ""


def _weight(base: Any, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """How to get a base layer's weight [out, in] in `dtype`, or None where it does not multiply with that."""
    bitsandbytes = import_bitsandbytes()
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        state = base.weight.quant_state
        if base.compute_dtype != dtype or state.dtype != dtype:
            return None
        return lambda: bitsandbytes.functional.dequantize_4bit(base.weight.data, state)
    if base.weight.dtype != dtype:
        return None
    return (lambda: base.weight.T) if isinstance(base, Conv1D) else (lambda: base.weight)


def _forward(layer: Any, plain: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    active = [name for name in layer.active_adapters if name in layer.r]
    if arguments or options or layer.disable_adapters or layer.merged or len(active) != 1:
        return plain(x, *arguments, **options)
    (name,) = active
    if not torch.is_grad_enabled() or _why_plain(layer, name) or x.dtype != layer.lora_A[name].weight.dtype:
        return plain(x)
    base = layer.get_base_layer()
    weight = _weight(base, x.dtype)
    if weight is None:
        return plain(x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, weight, base.bias, a, b, layer.scaling[name])
