"""Activation checkpointing: recompute a layer in the backward instead of keeping what it computed.

    every_1   all layers: least memory, one more forward pass     every_2   every second layer     off

Non-reentrant, so gradients reach the adapters although the frozen embedding's output needs none; the
reentrant form trained nothing in silence (peft issue 137, transformers issue 42489).
"""

from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ft.errors import ConfigError


def recompute_layers(model: PreTrainedModel, setting: str) -> int:
    """Set `train.checkpoint` (off or every_k) on the decoder layers; returns how many are recomputed."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    every = 0 if setting == "off" else int(setting.removeprefix("every_"))
    chosen = layers[::every] if every else []
    if every and not chosen:
        raise ConfigError(f"train.checkpoint={setting}: {model.config.model_type} has no layers that can be recomputed")
    for layer in layers:
        layer.gradient_checkpointing = layer in chosen
        # preserve_rng_state (the default) replays dropout as it was in the forward.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return len(chosen)
