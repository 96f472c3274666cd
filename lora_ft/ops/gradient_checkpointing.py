"""Gradient checkpointing: recompute some layers in the backward instead of keeping their activations.

    off       no layer: fastest       every_2   every second layer
    every_1   all layers: least memory, one more forward pass
    auto      the fewest layers with which the largest micro-batch fits into the memory that is free now

Checkpoints are non-reentrant, so that gradients reach the adapters although the frozen embedding's output requires
none. With the reentrant form, adapters silently train nothing (peft issue 137, transformers issue 42489).

memory/auto.py resolves `auto` to one of the other settings.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ft.errors import ConfigError
from lora_ft.ops.compute_copies import copies_of

_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


def recompute_layers(model: PreTrainedModel, setting: str) -> int:
    """Apply off or every_k to the decoder layers; return how many are recomputed. auto is not one of them."""
    layers = recomputable_layers(model)
    every = 0 if setting == "off" else int(setting.removeprefix("every_"))
    chosen = layers[::every] if every else []
    if every and not chosen:
        raise ConfigError(
            f"train.gradient_checkpointing={setting}: {model.config.model_type} has no layers that can be recomputed: "
            "set train.gradient_checkpointing=off"
        )
    for layer in layers:
        layer.gradient_checkpointing = layer in chosen
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
        layer._gradient_checkpointing_func = partial(_checkpointed, layer, drops)
    return len(chosen)


def _checkpointed(layer: nn.Module, drops: bool, forward: Callable[..., Any], *arguments: Any) -> Any:
    def with_copies(*given: Any) -> Any:
        with copies_of(layer):
            return forward(*given)

    # The generator's state, which repeats the dropout masks of the forward, costs several calls per layer.
    return checkpoint(with_copies, *arguments, use_reentrant=False, preserve_rng_state=drops)


@contextlib.contextmanager
def recomputed_layers(model: PreTrainedModel, setting: str) -> Iterator[None]:
    """Recompute layers by `setting` until the block ends, then restore the layers' own setting."""
    layers = recomputable_layers(model)
    before = [{name: value for name, value in vars(layer).items() if name in _ATTRIBUTES} for layer in layers]
    recompute_layers(model, setting)
    try:
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in _ATTRIBUTES:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)


def recomputable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
