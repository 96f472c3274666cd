"""Write an adapter as the folder that mlx-lm loads with --adapter-path.

    adapters.safetensors    model.layers.0.self_attn.q_proj.lora_a [in, r], .lora_b [r, out], DoRA's .m [out]
    adapter_config.json     {"fine_tune_type": "lora", "num_layers": 30, "lora_parameters": {"rank": 16, "scale": 2.0,
                             "dropout": 0.0, "keys": ["mlp.down_proj", "self_attn.q_proj", ...]}}

mlx-lm has one rank and one scale for all layers. A layer of lower rank is padded with zeros, and a different scale is
multiplied into its B; the product stays the same. Format: mlx-lm 0.32.2, tuner/utils.py.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.errors import MismatchError
from lora_ft.export import lora_weights
from lora_ft.export.gguf.layout import family_and_config
from lora_ft.export.lora_weights import REMEDY, LayerWeights
from lora_ft.io import durable
from lora_ft.models.families import MLX, Family

_LAYER = re.compile(r"model\.(layers|h)\.\d+\.(?P<key>.+)")


def write(adapter: Path, base_config: dict[str, Any], folder: Path) -> None:
    """Write the PEFT adapter in folder `adapter` for mlx-lm; `base_config` is the base's config.json.

    Raises MismatchError for an adapter that mlx-lm computes differently, ConfigError for an unknown architecture.
    """
    family, base = family_and_config(base_config, "MLX adapters", MLX)
    found = lora_weights.read(adapter)
    for layer in found.layers:
        _check(adapter, family, layer, base, dora=found.config.use_dora)
    rank = max((layer.rank for layer in found.layers), default=found.config.r)
    scale = found.layers[0].scale if found.layers else 1.0
    arrays: dict[str, np.ndarray] = {}
    for layer in found.layers:
        name = _name(family, layer.module)
        arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = _matrices(layer, rank, scale)
        if layer.magnitude is not None:
            arrays[f"{name}.m"] = layer.magnitude
    described = {
        "fine_tune_type": "dora" if found.config.use_dora else "lora",
        "num_layers": base.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": _keys([_name(family, layer.module) for layer in found.layers], base.num_hidden_layers),
        },
    }
    specs = [durable.TensorSpec(name, "F32", array.shape, array.nbytes) for name, array in arrays.items()]
    with durable.staged_folder(folder) as staging:
        buffers = (np.ascontiguousarray(array).data.cast("B") for array in arrays.values())
        durable.write_tensors(staging / "adapters.safetensors", specs, buffers, {"format": "mlx"})
        durable.write_json(staging / "adapter_config.json", described)


def _name(family: Family, module: str) -> str:
    """Return mlx-lm's name: its models have transformers' names, the root of all layers called `model`."""
    return f"model.{module.removeprefix(f'{family.body}.')}" if module.startswith(f"{family.body}.") else module


def _check(adapter: Path, family: Family, layer: LayerWeights, base: Any, *, dora: bool) -> None:
    if _LAYER.fullmatch(_name(family, layer.module)):
        return
    if base.tie_word_embeddings or family.model_type == "gpt2":  # mlx-lm's GPT-2 has no head of its own
        raise MismatchError(
            f"{adapter}: mlx-lm would apply the adapter of {layer.module} to embedding and head, which share one "
            f"matrix; {REMEDY}"
        )
    if layer.embedding and dora:
        raise MismatchError(
            f"{adapter}: {layer.module}: mlx-lm computes DoRA of an embedding differently from PEFT; {REMEDY}"
        )


def _matrices(layer: LayerWeights, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return lora_a [in, rank] and lora_b [rank, out], whose product times `scale` is the layer's update."""
    zeros = ((0, 0), (0, rank - layer.rank))
    return np.pad(layer.a.T, zeros), np.pad(layer.rescaled_b(scale), zeros).T


def _keys(names: list[str], layers: int) -> list[str]:
    """Return names within a layer if every layer has the same ones, as other readers expect; else full names."""
    inside = [match["key"] for name in names if (match := _LAYER.fullmatch(name))]
    outside = [name for name in names if not _LAYER.fullmatch(name)]
    is_uniform = len(inside) == layers * len(set(inside))
    return sorted({*inside, *outside}) if is_uniform else sorted(names)
