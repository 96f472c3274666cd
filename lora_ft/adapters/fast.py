"""Let LoRA layers compute with one function while they train; everything else stays PEFT's own forward.

layer.forward(x)    training, one plain LoRA active, no dropout, x in the adapter's dtype
                        -> ops.lora_linear: same value and gradients, fewer passes over memory
                    anything else (adapter off, merged, several active, DoRA, evaluation, bfloat16 ...)
                        -> PEFT's forward, so that its switches mean what they meant

A LoRA on the head also brings its own form of the loss (`ops.token_loss` asks for it), so that its logits are
never made for all positions at once, not in evaluation either. An int8 layer without a LoRA of this form keeps
no input.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_ft import config
from lora_ft.ops.cross_entropy import HeadLora, linear_cross_entropy
from lora_ft.ops.lora_linear import lora_linear
from lora_ft.ops.weights import FrozenWeight, frozen_linear, frozen_weight, why_no_weight


@contextlib.contextmanager
def accelerated_lora(model: PeftModel, name: str, fast: config.Fast) -> Iterator[list[str]]:
    """Replace the forward of every LoRA layer that can be, until the block ends; yields which stay plain, and why."""
    replaced: list[nn.Module] = []
    try:
        yield _replace_all(model, name, replaced) if fast.lora else ["plain lora: fast.lora=false"]
    finally:
        for layer in replaced:
            vars(layer).pop("token_loss_sum", None)
            plain = layer.forward.args[1]
            del layer.forward
            if not isinstance(plain, MethodType):  # of the class: nothing to give back to the instance
                layer.forward = plain


def _replace_all(model: PeftModel, name: str, replaced: list[nn.Module]) -> list[str]:
    reasons: Counter[str] = Counter()
    computed = model.get_base_model().get_input_embeddings().weight.dtype
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            if getattr(getattr(layer, "weight", None), "dtype", None) is torch.int8:
                _replace_forward(layer, _int8_forward, replaced)
            continue
        if name not in layer.r:
            continue
        reason = _why_plain(layer, name) or why_no_weight(layer.get_base_layer(), layer.lora_A[name].weight.dtype)
        if not reason and computed != layer.lora_A[name].weight.dtype:
            reason = f"the base computes in {str(computed).removeprefix('torch.')}"
        if reason:
            reasons[reason] += 1
        _replace_forward(layer, _forward, replaced)
        layer.token_loss_sum = functools.partial(_head_loss, layer)
    return [f"{count} LoRA layers compute as PEFT does: {reason}" for reason, count in reasons.items()]


def _replace_forward(layer: Any, forward: Callable[..., Tensor], replaced: list[nn.Module]) -> None:
    layer.forward = functools.partial(forward, layer, layer.forward)
    replaced.append(layer)


def _why_plain(layer: Any, name: str) -> str:
    """What of an adapter keeps its layer from the fast form, whatever the base; empty where nothing does."""
    if name not in layer.lora_A:
        return "embeddings"
    if name in layer.lora_variant:
        return "DoRA"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "adapter.dropout"
    return ""


def _fast(layer: Any, x: Tensor) -> tuple[str, FrozenWeight] | None:
    """The one adapter that takes the fast form for this input, and how to get the base's weight; else None."""
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
    """Sum of cross-entropies of a head with this LoRA, in chunks; None where the layer's own logits are needed."""
    chosen = _fast(layer, hidden)
    if chosen is None:
        return None
    name, weight = chosen
    lora = HeadLora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return linear_cross_entropy(hidden, weight(), layer.get_base_layer().bias, targets, lora)


def _int8_forward(layer: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    weight = frozen_weight(layer, x.dtype) if layer.training and torch.is_grad_enabled() else None
    return plain(x) if weight is None else frozen_linear(x, weight, layer.bias)
