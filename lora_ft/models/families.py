"""Describe the model families that can be read from GGUF files and written to them, one row each. Imports no torch.

    family("mistral").architecture                                   "llama"
    family("llama").gguf_name("model.layers.0.self_attn.q_proj", 32)   "blk.0.attn_q"

To support another family, add a row to `FAMILIES`. The gguf package has the names of the tensors; metadata keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; graphs: llama.cpp b10605, src/models.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
}  # fmt: skip
_LLAMA_SIZES = _SIZES | {
    "feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
_GPT2_SIZES = _SIZES | {"feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"}

_SILU = {"hidden_act": ("silu",)}
_GPT2_LIMITS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The metadata and layouts of one model family, in transformers and in GGUF.

    sizes: GGUF's metadata key, without the architecture, to the attribute of the config.
    limits: the values of config attributes that llama.cpp computes; a model with other values cannot be exported.
    body: the module of the transformers model that holds the embedding and the layers.
    is_rotary: positions are rotary; otherwise the model has a matrix of positions.
    interleaved: llama.cpp stores the rotary halves of each head of q and k as pairs (0, n/2, 1, n/2 + 1, ...).
    transposed: endings of modules whose weight transformers stores as [in, out] (Conv1D).
    """

    model_type: str
    architecture: str
    sizes: Mapping[str, str]
    limits: Mapping[str, tuple[Any, ...]]
    body: str = "model"
    is_rotary: bool = True
    interleaved: bool = False
    transposed: tuple[str, ...] = ()

    def gguf_name(self, module: str, num_layers: int) -> str | None:
        """Return GGUF's name of a transformers module; None for a module that a model of `num_layers` layers lacks."""
        name: str | None = _name_table(self.architecture, num_layers).get_name(module)
        return name

    def is_transposed(self, module: str) -> bool:
        """Return True if transformers stores the module's weight as [in, out], where GGUF has [out, in]."""
        return module.endswith(self.transposed)

    def rotary_heads(self, module: str, config: Any) -> int | None:
        """Return the number of heads whose rows GGUF interleaves in this module; None for every other module."""
        attribute = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
        return getattr(config, attribute) if attribute and self.interleaved else None


@functools.cache
def _name_table(architecture: str, num_layers: int) -> Any:
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(next(k for k, name in MODEL_ARCH_NAMES.items() if name == architecture), num_layers)


FAMILIES = (
    Family("llama", "llama", _LLAMA_SIZES, _SILU, interleaved=True),
    Family("mistral", "llama", _LLAMA_SIZES, _SILU, interleaved=True),
    Family("qwen2", "qwen2", _LLAMA_SIZES, _SILU),
    Family("qwen3", "qwen3", _LLAMA_SIZES, _SILU),
    Family("gpt2", "gpt2", _GPT2_SIZES, _GPT2_LIMITS, body="transformer", is_rotary=False,
           transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)  # fmt: skip


def family(model_type: str | None) -> Family | None:
    """Return the row of a model type, as config.json names it."""
    return next((row for row in FAMILIES if row.model_type == model_type), None)


def family_of_gguf(architecture: str | None) -> Family | None:
    """Return the first row of a GGUF architecture: a llama file may hold a mistral model, which computes the same."""
    return next((row for row in FAMILIES if row.architecture == architecture), None)


def interleave(rows: Any, heads: int) -> Any:
    """Reorder rows [heads * n, ...] from transformers' order, rotary halves, to GGUF's order, pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: Any, heads: int) -> Any:
    """Undo `interleave`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
