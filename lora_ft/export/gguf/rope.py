"""Describe rotary positions in a GGUF file: metadata, and tensors of divisors for the scalings that have them.

    default   rope.freq_base                       linear    rope.scaling.type, rope.scaling.factor
    llama3    rope_freqs.weight [n / 2]            longrope  rope_factors_short.weight, rope_factors_long.weight

llama.cpp takes LongRoPE's long divisors for contexts longer than rope.scaling.original_context_length. Gemma 3 has
other positions in its layers with a sliding window: rope.freq_base_swa, never scaled.
"""

from typing import Any

import numpy as np

from lora_ft.errors import ConfigError
from lora_ft.export.gguf.layout import Layout
from lora_ft.export.gguf.writer import Value
from lora_ft.models.gguf.rope import llama3_divisors


def described(layout: Layout, head: int) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """Return the metadata, without the architecture, and the tensors for heads of this size; raises ConfigError."""
    if not layout.family.is_rotary:
        return {}, {}
    settings = dict(layout.config.rope_parameters)
    local = settings.get("sliding_attention", {})
    settings = settings.get("full_attention", settings)
    values: dict[str, Value] = {
        "rope.dimension_count": _rotated(layout, settings, head),
        "rope.freq_base": float(settings.get("rope_theta", 10000.0)),
    }
    if local:
        if (kind := local.get("rope_type", "default")) != "default":
            raise ConfigError(f"llama.cpp does not scale rotary positions in sliding windows, got type {kind}")
        values["rope.freq_base_swa"] = float(local["rope_theta"])
    match kind := settings.get("rope_type", "default"):
        case "default":
            return values, {}
        case "linear":
            return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}, {}
        case "llama3" if layout.family.interleaved:
            return values, {"rope_freqs.weight": llama3_divisors(layout.config)}
        case "longrope" if layout.family.has_longrope:
            return values | _longrope(layout), _longrope_tensors(settings)
    raise ConfigError(
        f"rotary positions of type {kind} cannot be written to GGUF for {layout.family.model_type}, only default and "
        "linear, llama3 for families like llama, and longrope for phi3"
    )


def _rotated(layout: Layout, settings: dict[str, Any], head: int) -> int:
    part = settings.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not layout.family.is_partial:
        raise ConfigError(f"llama.cpp rotates the whole head of {layout.family.model_type}, but "
                          f"partial_rotary_factor={part}")  # fmt: skip
    return int(head * part)


def _longrope(layout: Layout) -> dict[str, Value]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, factor = ROPE_INIT_FUNCTIONS["longrope"](layout.config, torch.device("cpu"))
    original = layout.config.rope_parameters["original_max_position_embeddings"]
    return {"rope.scaling.original_context_length": int(original), "rope.scaling.attn_factor": float(factor)}


def _longrope_tensors(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    return {f"rope_factors_{name}.weight": np.asarray(settings[f"{name}_factor"], np.float32)
            for name in ("long", "short")}  # fmt: skip
