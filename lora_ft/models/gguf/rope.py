"""Read the rotary positions of a GGUF file: the inverse of `export/gguf/rope.py`, which has the list of scalings."""

from typing import Any

import numpy as np

from lora_ft.errors import ConfigError
from lora_ft.models.families import Family
from lora_ft.models.gguf import reader

# The tensors that became settings.
TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# The scaling of Llama 3.1 and 3.2, the only published one; its factor is the largest divisor in the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def settings(source: reader.GgufFile, family: Family, head: int) -> dict[str, Any]:
    """Return rope_parameters for heads of this size, and the length from which LongRoPE is long, for the config.

    For Llama 3's scaling the file has only the divisors, which the caller verifies. Raises ConfigError.
    """
    prefix = f"{family.architecture}.rope"
    theta = source.metadata.get(f"{prefix}.freq_base", 10000.0)
    kind = source.metadata.get(f"{prefix}.scaling.type", "none")
    divisors, long = source.tensors.get("rope_freqs.weight"), source.tensors.get("rope_factors_long.weight")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if family.is_partial:
        found["partial_rotary_factor"] = source.metadata.get(f"{prefix}.dimension_count", head) / head
    if long is not None and family.has_longrope:
        factors = {"long_factor": long, "short_factor": source.tensors["rope_factors_short.weight"]}
        found |= {"rope_type": "longrope", **{name: reader.values(t).tolist() for name, t in factors.items()}}
        original = source.metadata[f"{prefix}.scaling.original_context_length"]
        return {"rope_parameters": found, "original_max_position_embeddings": original}
    if kind == "linear" and divisors is None:
        found |= {"rope_type": "linear", "factor": source.metadata[f"{prefix}.scaling.factor"]}
    elif kind != "none":
        raise ConfigError(f"{source.path}: rotary scaling of type {kind} is not supported: use the safetensors model")
    elif divisors is not None:
        found |= {"rope_type": "llama3", "factor": float(reader.values(divisors).max()), **_LLAMA3}
    if family.architecture != "gemma3":
        return {"rope_parameters": found}
    local = source.metadata.get(f"{prefix}.freq_base_swa", 10000.0)
    local_settings = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": found, "sliding_attention": local_settings}}


def llama3_divisors(config: Any) -> np.ndarray[Any, Any]:
    """Return the divisors of the rotary frequencies in transformers' Llama 3 scaling, in float32."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    divisors: np.ndarray[Any, Any] = (plain / scaled.double()).float().numpy()
    return divisors
