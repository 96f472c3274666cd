"""Write an adapter as the GGUF file that llama.cpp loads with --lora.

    general.type "adapter"   general.architecture "llama"   adapter.type "lora"   adapter.lora.alpha 32.0
    blk.0.attn_q.weight.lora_a  F32 [r, in]      blk.0.attn_q.weight.lora_b  F32 [out, r]

llama.cpp adds (alpha / r) B A, with one alpha in the file and r from each B. What PEFT scales otherwise is put into
these: alpha * sqrt(r) for rsLoRA, and a factor in B where the layers' scales differ. Rows of B follow the rows of W,
so llama's q and k are permuted as their weights are; A stays, and so do GPT-2's pairs, whose layers alone are
transposed. Format: llama.cpp b10605, src/llama-adapter.cpp.
"""

from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from lora_ft.errors import MismatchError
from lora_ft.exports import gguf_names, pairs
from lora_ft.exports.gguf_file import Kind, Planned, Value
from lora_ft.exports.gguf_file import write as write_file
from lora_ft.exports.pairs import WAY_OUT
from lora_ft.io import untrusted


def write(adapter: Path, base_config: dict[str, Any], out: Path) -> None:
    """Write the PEFT adapter in folder `adapter` to the GGUF file `out`; `base_config` is the base's config.json.

    Raises MismatchError for what a GGUF adapter cannot hold, ConfigError for an architecture not known here.
    """
    layout = gguf_names.layout(base_config)
    found = pairs.read(adapter)
    if found.config.use_dora:
        raise MismatchError(f"{adapter}: llama.cpp reads no DoRA; {WAY_OUT}")
    # Kept exact where all layers agree: then no B is touched, and alpha is PEFT's own, or times sqrt(r).
    alpha = found.pairs[0].scale * found.pairs[0].rank if found.pairs else float(found.config.lora_alpha)
    arrays: dict[str, np.ndarray] = {}
    for pair in found.pairs:
        a, b = _matrices(layout, pair, alpha)
        name = _tensor_name(adapter, layout, pair)
        arrays |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    planned = [Planned(name, array.shape, Kind.F32) for name, array in arrays.items()]
    write_file(out, _metadata(layout, found.config, alpha), planned, arrays.values())


def _tensor_name(adapter: Path, layout: gguf_names.Layout, pair: pairs.Pair) -> str:
    name = layout.name(pair.module)
    if name is None:
        raise MismatchError(f"{adapter}: {pair.module} has no place in a {layout.architecture} GGUF file; {WAY_OUT}")
    if name in ("token_embd", "output") and layout.config.tie_word_embeddings:
        raise MismatchError(
            f"{adapter}: {pair.module} shares its weight with the other end of the model, and llama.cpp would apply "
            f"its adapter to both; {WAY_OUT}"
        )
    return name


def _matrices(layout: gguf_names.Layout, pair: pairs.Pair, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    factor = pair.scale * pair.rank / alpha
    b = pair.b if factor == 1 else (pair.b.astype(np.float64) * factor).astype(np.float32)
    # llama.cpp looks up rows of an embedding's A, and so keeps it [tokens, r]
    return (pair.a.T if pair.embedding else pair.a), layout.rows(pair.module, b)


def _metadata(layout: gguf_names.Layout, saved: LoraConfig, alpha: float) -> dict[str, Value]:
    base = str(saved.base_model_name_or_path or "")
    metadata: dict[str, Value] = {"general.architecture": layout.architecture, "general.type": "adapter"}
    if untrusted.is_public_id(base):  # a path says nothing elsewhere, and too much
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
