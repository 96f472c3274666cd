"""Write an adapter as the folder that mlx-lm loads with --adapter-path.

    adapters.safetensors    model.layers.0.self_attn.q_proj.lora_a [in, r], .lora_b [r, out], DoRA's .m [out]
    adapter_config.json     {"fine_tune_type": "lora", "num_layers": 30, "lora_parameters": {"rank": 16, "scale": 2.0,
                             "dropout": 0.0, "keys": ["mlp.down_proj", "self_attn.q_proj", ...]}}

mlx-lm has one rank and one scale for all layers. A layer of a lower rank is filled up with zeros, and another scale
goes into its B: both compute the same. Format: mlx-lm 0.32.2, tuner/utils.py.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.errors import ConfigError, MismatchError
from lora_ft.exports import gguf_names, pairs
from lora_ft.exports.pairs import WAY_OUT
from lora_ft.io import durable

# In mlx-lm these models' layers have transformers' names, but for GPT-2's.
_PREFIXES = {kind: "" for kind in ("llama", "mistral", "qwen2", "qwen3")} | {"gpt2": "model."}
_LAYER = re.compile(r"(model\.layers|model\.h)\.\d+\.(?P<key>.+)")


def write(adapter: Path, base_config: dict[str, Any], folder: Path) -> None:
    """Write the PEFT adapter in folder `adapter` for mlx-lm; `base_config` is the base's config.json.

    Raises MismatchError for what mlx-lm does not compute, ConfigError for an architecture not known here.
    """
    kind = base_config.get("model_type")
    if kind not in _PREFIXES:
        raise ConfigError(f"MLX adapters are written for models of type {', '.join(_PREFIXES)}, got {kind}")
    base = gguf_names.read_config(base_config)
    found = pairs.read(adapter)
    for pair in found.pairs:
        _check(adapter, pair, base, dora=found.config.use_dora)
    rank = max((pair.rank for pair in found.pairs), default=found.config.r)
    scale = found.pairs[0].scale if found.pairs else 1.0
    arrays: dict[str, np.ndarray] = {}
    for pair in found.pairs:
        name = _name(kind, pair.module)
        arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = _matrices(pair, rank, scale)
        if pair.magnitude is not None:
            arrays[f"{name}.m"] = pair.magnitude
    described = {
        "fine_tune_type": "dora" if found.config.use_dora else "lora",
        "num_layers": base.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": _keys([_name(kind, pair.module) for pair in found.pairs], base.num_hidden_layers),
        },
    }
    specs = [durable.TensorSpec(name, "F32", array.shape, array.nbytes) for name, array in arrays.items()]
    with durable.staged_folder(folder) as staging:
        buffers = (np.ascontiguousarray(array).data.cast("B") for array in arrays.values())
        durable.write_tensors(staging / "adapters.safetensors", specs, buffers, {"format": "mlx"})
        durable.write_json(staging / "adapter_config.json", described)


def _name(kind: str, module: str) -> str:
    return _PREFIXES[kind] + (module.removeprefix("transformer.") if kind == "gpt2" else module)


def _check(adapter: Path, pair: pairs.Pair, base: Any, *, dora: bool) -> None:
    if _LAYER.fullmatch(_name(base.model_type, pair.module)):
        return
    if base.tie_word_embeddings or base.model_type == "gpt2":
        raise MismatchError(
            f"{adapter}: {pair.module} is both ends of the model for mlx-lm, one for the adapter; {WAY_OUT}"
        )
    if pair.embedding and dora:
        raise MismatchError(
            f"{adapter}: {pair.module}: DoRA of an embedding is another thing in mlx-lm than in PEFT; {WAY_OUT}"
        )


def _matrices(pair: pairs.Pair, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """lora_a [in, rank] and lora_b [rank, out] with which mlx-lm's one scale gives what PEFT computes."""
    b = pair.b if pair.scale == scale else (pair.b.astype(np.float64) * (pair.scale / scale)).astype(np.float32)
    zeros = ((0, 0), (0, rank - pair.rank))
    return np.pad(pair.a.T, zeros), np.pad(b, zeros).T


def _keys(names: list[str], layers: int) -> list[str]:
    """Names within a layer where all layers are adapted alike, which is what others read too; else names in full."""
    inside = [match["key"] for name in names if (match := _LAYER.fullmatch(name))]
    outside = [name for name in names if not _LAYER.fullmatch(name)]
    alike = len(inside) == layers * len(set(inside))
    return sorted({*inside, *outside}) if alike else sorted(names)
