"""One row for each model family that can be read from GGUF files and written to them. Imports no torch.

    family("mistral").architecture                             "llama"
    family("llama").gguf_name("model.layers.0.self_attn.q_proj")   "blk.0.attn_q"
    family("llama").module_name("blk.0.attn_q")                    "model.layers.0.self_attn.q_proj"

To support another family, add a row to `FAMILIES`. GGUF's names: gguf.constants.TENSOR_NAMES; its metadata keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; graphs: llama.cpp b10605, src/models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "blk": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_QWEN3_NAMES = _LLAMA_NAMES | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "blk": "transformer.h", "attn_norm": "ln_1", "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip

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
    """The names and layouts of one model family, in transformers and in GGUF.

    names: GGUF's name of a tensor to the module in a transformers model; "blk" to the prefix of the layers.
    sizes: GGUF's metadata key, after the architecture, to the attribute of the config.
    limits: the values of config attributes that llama.cpp computes; a model with others cannot be exported.
    interleaved: llama.cpp keeps the rotary halves of each head of q and k as pairs (0, n/2, 1, n/2 + 1, ...).
    transposed: modules of a layer whose weight transformers keeps as [in, out] (Conv1D).
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    sizes: Mapping[str, str]
    limits: Mapping[str, tuple[Any, ...]]
    interleaved: bool = False
    transposed: tuple[str, ...] = ()
    _gguf_names: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_gguf_names", {module: name for name, module in self.names.items()})

    def module_name(self, gguf_name: str) -> str | None:
        """Return the module for a GGUF tensor's name without .weight or .bias; None if the family has none."""
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)", gguf_name)
        if not match or match[2] == "blk" or match[2] not in self.names:
            return None
        return f"{self.names['blk']}.{match[1]}.{self.names[match[2]]}" if match[1] else self.names[match[2]]

    def gguf_name(self, module: str, num_layers: int) -> str | None:
        """Return the inverse of `module_name`; None for a module that a model of `num_layers` layers lacks."""
        match = re.fullmatch(rf"{re.escape(self.names['blk'])}\.(\d+)\.(.+)", module)
        name = self._gguf_names.get(match[2] if match else module)
        if name is None or name == "blk" or (match and int(match[1]) >= num_layers):
            return None
        return f"blk.{match[1]}.{name}" if match else name

    @property
    def is_rotary(self) -> bool:
        """Tell whether positions are rotary; otherwise the model has a matrix of positions."""
        return "position_embd" not in self.names

    def is_transposed(self, module: str) -> bool:
        """Tell whether transformers keeps the module's weight as [in, out], where GGUF has [out, in]."""
        return module.startswith(self.names["blk"]) and module.endswith(self.transposed)

    def rotary_heads(self, module: str, config: Any) -> int | None:
        """Return the number of heads whose rows GGUF interleaves in this module; None for every other module."""
        attribute = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
        return getattr(config, attribute) if attribute and self.interleaved else None


FAMILIES = (
    Family("llama", "llama", _LLAMA_NAMES, _LLAMA_SIZES, _SILU, interleaved=True),
    Family("mistral", "llama", _LLAMA_NAMES, _LLAMA_SIZES, _SILU, interleaved=True),
    Family("qwen2", "qwen2", _LLAMA_NAMES, _LLAMA_SIZES, _SILU),
    Family("qwen3", "qwen3", _QWEN3_NAMES, _LLAMA_SIZES, _SILU),
    Family("gpt2", "gpt2", _GPT2_NAMES, _GPT2_SIZES, _GPT2_LIMITS,
           transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)  # fmt: skip


def family(model_type: str | None) -> Family | None:
    """Return the row of a model type, as config.json names it."""
    return next((row for row in FAMILIES if row.model_type == model_type), None)


def family_of_gguf(architecture: str | None) -> Family | None:
    """Return the first row of a GGUF architecture: a llama file may hold a mistral model, which computes the same."""
    return next((row for row in FAMILIES if row.architecture == architecture), None)


def interleave(rows: Any, heads: int) -> Any:
    """Turn rows [heads * n, ...] from transformers' order, rotary halves, into GGUF's, pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: Any, heads: int) -> Any:
    """Undo `interleave`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
