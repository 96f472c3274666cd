"""Write an adapter as the GGUF file that llama.cpp loads with --lora.

    general.type "adapter"   general.architecture "llama"   adapter.type "lora"   adapter.lora.alpha 32.0
    blk.0.attn_q.weight.lora_a  F32 [r, in]      blk.0.attn_q.weight.lora_b  F32 [out, r]
    blk.0.ffn_up_exps.weight.lora_a  F32 [experts, r, in]      ...lora_b  F32 [experts, out, r]

llama.cpp adds (alpha / r) B A, with one alpha per file and r from each B. PEFT's other scales are expressed in these:
alpha * sqrt(r) for rsLoRA, and a factor in B if the layers' scales differ. B has the rows of W, so B of llama's q and k
is reordered like W. Only W of GPT-2's Conv1D is transposed, not A and B. Gate and up of experts are one parameter of
transformers, but two tensors, which get the same A. Format: llama.cpp b11549, src/llama-adapter.cpp.
"""

from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from lora_ft.errors import MismatchError
from lora_ft.export import lora_weights
from lora_ft.export.gguf import writer
from lora_ft.export.gguf.layout import Layout, layout_of
from lora_ft.export.gguf.writer import Kind, PlannedTensor, Value
from lora_ft.export.lora_weights import REMEDY, LayerWeights
from lora_ft.io import untrusted


def write(adapter: Path, base_config: dict[str, Any], out: Path) -> None:
    """Write the PEFT adapter in folder `adapter` to the GGUF file `out`; `base_config` is the base's config.json.

    Raises MismatchError for an adapter that the format cannot express, ConfigError for an unknown architecture.
    """
    layout = layout_of(base_config)
    found = lora_weights.read(adapter, _experts(layout))
    if found.config.use_dora:
        raise MismatchError(f"{adapter}: llama.cpp does not support DoRA; {REMEDY}")
    # With equal scales alpha is PEFT's own (times sqrt(r) for rsLoRA), and no B is changed.
    alpha = found.layers[0].scale * found.layers[0].rank if found.layers else float(found.config.lora_alpha)
    arrays: dict[str, np.ndarray] = {}
    for layer in found.layers:
        names = _tensor_names(adapter, layout, layer)
        a, b = _matrices(layout, layer, alpha)
        for name, part in zip(names, np.split(b, len(names), axis=-2), strict=True):
            arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = a, part
    tensors = [PlannedTensor(name, array.shape, Kind.F32) for name, array in arrays.items()]
    writer.write(out, _metadata(layout, found.config, alpha), tensors, arrays.values())


def _experts(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a base's experts and their shapes."""
    if not layout.family.has_experts:
        return {}
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(layout.config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim == 3}


def _tensor_names(adapter: Path, layout: Layout, layer: LayerWeights) -> tuple[str, ...]:
    parameter = layer.module if layer.a.ndim == 3 else f"{layer.module}.weight"
    names = layout.family.tensor_names(parameter, layout.config.num_hidden_layers)
    if names is None:
        raise MismatchError(
            f"{adapter}: a GGUF file of architecture {layout.family.architecture} has no tensor for {layer.module}; "
            f"{REMEDY}"
        )
    if names[0] in ("token_embd.weight", "output.weight") and layout.config.tie_word_embeddings:
        raise MismatchError(
            f"{adapter}: llama.cpp would apply the adapter of {layer.module} to embedding and head, which share one "
            f"matrix; {REMEDY}"
        )
    return names


def _matrices(layout: Layout, layer: LayerWeights, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    # llama.cpp looks up rows of an embedding's A, which it expects as [tokens, r]
    a = layer.a.T if layer.embedding else layer.a
    return a, layout.rows(layer.module, layer.rescaled_b(alpha / layer.rank))


def _metadata(layout: Layout, saved: LoraConfig, alpha: float) -> dict[str, Value]:
    base = str(saved.base_model_name_or_path or "")
    metadata: dict[str, Value] = {"general.architecture": layout.family.architecture, "general.type": "adapter"}
    if untrusted.is_public_id(base):  # a local path is useless to others and may be private
        owner, _, name = base.rpartition("/")
        metadata |= {
            "general.name": f"{name} LoRA",
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
            **({"general.base_model.0.organization": owner} if owner else {}),
        }
    return metadata | {
        "general.file_type": 0,
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
