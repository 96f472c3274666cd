"""Read an adapter folder as one A, B and scale per layer, for formats that hold nothing else.

read(Path("my_run/adapter")).layers[0]
# LayerWeights("model.layers.0.mlp.down_proj", a [16, 1536], b [576, 16], scale 2.0)
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.errors import MismatchError

REMEDY = "write a merged model instead: lora-ft merge, for llama.cpp with gguf=f16"

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)(\.weight)?"
)


@dataclass(frozen=True)
class LayerWeights:
    """A layer's A [r, in] and B [out, r] in float32, and the scale of their product.

    For an embedding `in` is the number of tokens. For a parameter of experts, `module` ends with its name, and A and B
    are [experts, r, in] and [experts, out, r]. `magnitude` [out] is DoRA's, None without DoRA.
    """

    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    embedding: bool
    magnitude: np.ndarray | None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    def rescaled_b(self, scale: float) -> np.ndarray:
        """Return the B whose product with A, times `scale`, is the same update; B itself for its own scale."""
        if scale == self.scale:
            return self.b
        return (self.b.astype(np.float64) * (self.scale / scale)).astype(np.float32)


@dataclass(frozen=True)
class AdapterWeights:
    """PEFT's config and the layers' weights, in the order of the layers."""

    config: LoraConfig
    layers: list[LayerWeights]


def read(folder: Path, experts: Mapping[str, tuple[int, ...]] | None = None) -> AdapterWeights:
    """Read an adapter; raises MismatchError if it has other parts than A, B, a scale and DoRA's magnitudes.

    `experts` are the parameters [experts, out, in] of the base that an adapter may have; by default it may have none.
    """
    saved = peft_folder.read_config(folder)
    provenance.check_keeps_base(folder, saved)
    allowed = peft_folder.PLAIN | ({"target_parameters"} if experts else set())
    peft_folder.check_settings(folder, saved, allowed, f"; {REMEDY}")
    found: dict[str, dict[str, np.ndarray]] = {}
    embeddings = set()
    for key, tensor in files.read_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if not match:
            raise MismatchError(f"the adapter in {folder} holds {key}, which is not A or B of a LoRA layer; {REMEDY}")
        found.setdefault(match["module"], {})[match["part"]] = tensor.float().numpy()
        if match["embedding"]:
            embeddings.add(match["module"])
    stacked = _experts(experts or {}, found)
    layers = [
        _layer(folder, saved, name, parts, name in embeddings, stacked.get(name, 0))
        for name, parts in sorted(found.items(), key=_order)
    ]
    return AdapterWeights(saved, layers)


def _experts(experts: Mapping[str, tuple[int, ...]], found: dict[str, dict[str, np.ndarray]]) -> dict[str, int]:
    """Rename the layers of experts to their parameters, and return the number of experts of each.

    PEFT names them by their module, one wrapped in the other (.base_layer), so their shapes tell which is which.
    """
    stacked = {}
    for name in [name for name, parts in found.items() if parts.keys() == {"A", "B"}]:
        module, sizes = name.replace(".base_layer", ""), (found[name]["A"].shape[-1], found[name]["B"].shape[0])
        for parameter, shape in experts.items():
            if parameter.rpartition(".")[0] == module and (shape[-1], shape[-2]) == sizes and parameter not in found:
                found[parameter] = found.pop(name)
                stacked[parameter] = shape[0]
                break
    return stacked


def _order(item: tuple[str, dict[str, np.ndarray]]) -> list[str]:
    """Sort model.layers.10 after model.layers.9."""
    return [part.rjust(6, "0") if part.isdecimal() else part for part in item[0].split(".")]


def _layer(
    folder: Path, saved: LoraConfig, module: str, parts: dict[str, np.ndarray], embedding: bool, experts: int
) -> LayerWeights:
    a, b, magnitude = parts.get("A"), parts.get("B"), parts.get("magnitude_vector")
    parameters = saved.target_parameters or ()
    is_parameter = any(f".{module}.weight".endswith(f".{name}") for name in parameters)
    adapted = f"{module}.weight" if is_parameter else module  # the name that PEFT looks up in patterns
    rank = _value(folder, saved.rank_pattern, adapted, saved.r)
    rows = rank * max(experts, 1)
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rows, rows):
        shapes = ", ".join(f"{name} {value.shape}" for name, value in parts.items())
        raise MismatchError(f"the adapter in {folder}: {module} needs A [{rows}, in] and B [out, {rows}], got {shapes}")
    if experts:  # the columns of B are in the order of the ranks, the rows of A in that of the experts
        a = a.reshape(experts, rank, -1)
        b = np.ascontiguousarray(b.reshape(len(b), rank, experts).transpose(2, 0, 1))
    alpha = _value(folder, saved.alpha_pattern, adapted, saved.lora_alpha)
    if not alpha:
        raise MismatchError(f"the adapter in {folder}: {module} has lora_alpha=0, which has no effect")
    scale = alpha / (math.sqrt(rank) if saved.use_rslora else rank)
    return LayerWeights(module, a, b, scale, embedding, None if magnitude is None else magnitude.reshape(-1))


def _value(folder: Path, pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the rank or alpha that a pattern gives a layer by PEFT's rule, or the default."""
    try:
        return (pattern or {}).get(get_pattern_key(list(pattern or {}), module), default)
    except re.error as error:
        raise MismatchError(f"the adapter in {folder} has an invalid pattern: {error}") from None
