"""Describe the model families that can be read from GGUF files and written to them, one row each. Imports no torch.

    family("mistral").architecture                                   "llama"
    family("llama").gguf_name("model.layers.0.self_attn.q_proj", 32)   "blk.0.attn_q"

To support another family, add a row to `FAMILIES`. The gguf package has the names of the tensors; metadata keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; graphs: llama.cpp b11549, src/models.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The values of an attribute that llama.cpp computes, some of which depend on the rest of the config.
Limit = tuple[Any, ...] | Callable[[Any], tuple[Any, ...]]

_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
}  # fmt: skip
_LLAMA_SIZES = _SIZES | {
    "feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
_EXPERT_SIZES = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_MOE_SIZES = _LLAMA_SIZES | _EXPERT_SIZES | {"expert_feed_forward_length": "moe_intermediate_size"}
_GEMMA2_SIZES = _LLAMA_SIZES | {
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_GRANITE_SIZES = _LLAMA_SIZES | {
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_STARCODER2_SIZES = _SIZES | {
    "feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_epsilon": "norm_epsilon",
}  # fmt: skip
_NEOX_SIZES = _SIZES | {"feed_forward_length": "intermediate_size", "attention.layer_norm_epsilon": "layer_norm_eps"}
_GPT2_SIZES = _SIZES | {"feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"}

_SILU: dict[str, Limit] = {"hidden_act": ("silu",)}
_GELU = ("gelu_pytorch_tanh", "gelu_new")  # by the tangent, which is all that llama.cpp has
_OLMO2_LIMITS: dict[str, Limit] = _SILU | {"attention_bias": (False,), "tie_word_embeddings": (False,)}
_QWEN_MOE_LIMITS: dict[str, Limit] = _SILU | {
    "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "attention_bias": (False,),
}  # fmt: skip
_SMOLLM3_LIMITS: dict[str, Limit] = _SILU | {
    "no_rope_layers": lambda config: ([int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)],),
    "use_sliding_window": (False,),
}
_GPT2_LIMITS: dict[str, Limit] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
}  # fmt: skip


def _gemma(period: int, layers_27b: int) -> dict[str, Limit]:
    """Return Gemma's limits: each `period`-th layer attends to everything, and the 27B alone has another scale.

    llama.cpp knows the 27B by its number of layers. It takes the head of every Gemma from the embedding.
    """

    def layer_types(config: Any) -> tuple[list[str]]:
        kinds = ("sliding_attention", "full_attention")
        return ([kinds[(i + 1) % period == 0] for i in range(config.num_hidden_layers)],)

    def scalar(config: Any) -> tuple[int]:
        is_27b = config.num_hidden_layers == layers_27b
        return (config.hidden_size // config.num_attention_heads if is_27b else config.head_dim,)

    return {
        "hidden_activation": _GELU[:1], "attention_bias": (False,), "tie_word_embeddings": (True,),
        "layer_types": layer_types, "query_pre_attn_scalar": scalar,
    }  # fmt: skip


_GEMMA3_LIMITS: dict[str, Limit] = {
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The metadata and layouts of one model family, in transformers and in GGUF.

    sizes: GGUF's metadata key, without the architecture, to the attribute of the config.
    limits: the values of config attributes that llama.cpp computes; a model with other values cannot be exported.
    constants: metadata that every model of the family has.
    body: the module of the transformers model that holds the embedding and the layers.
    is_rotary: positions are rotary; otherwise the model has a matrix of positions.
    is_partial: llama.cpp can rotate a part of each head.
    has_longrope: llama.cpp can scale rotary positions by LongRoPE.
    has_window: llama.cpp applies the sliding window; otherwise only contexts within the window are right.
    interleaved: llama.cpp stores the rotary halves of each head of q and k as pairs (0, n/2, 1, n/2 + 1, ...).
    fused: ending of the module whose rows are q, k and v of each head in turn; GGUF has those of all heads in turn.
    transposed: endings of modules whose weight transformers stores as [in, out] (Conv1D).
    norm_offset: the number that transformers adds to the weights of norms, and GGUF has added already.
    """

    model_type: str
    architecture: str
    sizes: Mapping[str, str]
    limits: Mapping[str, Limit]
    constants: Mapping[str, int] = field(default_factory=dict)
    body: str = "model"
    is_rotary: bool = True
    is_partial: bool = False
    has_longrope: bool = False
    has_window: bool = False
    interleaved: bool = False
    fused: str | None = None
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0

    @property
    def has_experts(self) -> bool:
        """Return True for a mixture of experts."""
        return "expert_count" in self.sizes

    def gguf_name(self, module: str, num_layers: int) -> str | None:
        """Return GGUF's name of a transformers module; None for a module that a model of `num_layers` layers lacks."""
        name: str | None = _name_table(self.architecture, num_layers).get_name(module)
        return name

    def tensor_names(self, parameter: str, num_layers: int) -> tuple[str, ...] | None:
        """Return GGUF's names of the tensors of a parameter; None for one that GGUF lacks.

        Two names if transformers stacks two matrices in one: gate and up of the experts [experts, gate + up, in].
        """
        module, _, leaf = parameter.rpartition(".")
        if not module.endswith(".experts"):
            name = self.gguf_name(module, num_layers)
            return None if name is None else (f"{name}.{leaf}",)
        matrices = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        names = [self.gguf_name(f"{module}.{matrix}", num_layers) for matrix in matrices]
        return None if None in names else tuple(f"{name}.weight" for name in names)

    def is_transposed(self, module: str) -> bool:
        """Return True if transformers stores the module's weight as [in, out], where GGUF has [out, in]."""
        return module.endswith(self.transposed)

    def offset(self, module: str) -> float:
        """Return the number to add to a module's weight in transformers for that in GGUF."""
        return self.norm_offset if module.endswith("norm") else 0.0

    def rows(self, module: str, config: Any, *, stored: bool) -> Callable[[Any], Any] | None:
        """Return the function that reorders the rows of a module for GGUF, or of its `stored` tensor back.

        None for a module whose rows have the same order in both.
        """
        if self.fused and module.endswith(self.fused):
            heads, reorder = config.num_attention_heads, group_heads if stored else ungroup_heads
        elif heads := self.rotary_heads(module, config):
            reorder = deinterleave if stored else interleave
        else:
            return None
        return functools.partial(reorder, heads=heads)

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
    Family("mixtral", "llama", _LLAMA_SIZES | _EXPERT_SIZES, _SILU, interleaved=True),
    Family("qwen2", "qwen2", _LLAMA_SIZES, _SILU),
    Family("qwen3", "qwen3", _LLAMA_SIZES, _SILU),
    Family("qwen3_moe", "qwen3moe", _QWEN_MOE_SIZES, _QWEN_MOE_LIMITS),
    Family("gemma", "gemma", _LLAMA_SIZES,
           {"hidden_act": _GELU[:1], "attention_bias": (False,), "tie_word_embeddings": (True,)}, norm_offset=1.0),
    Family("gemma2", "gemma2", _GEMMA2_SIZES, _gemma(2, 46), has_window=True, norm_offset=1.0),
    Family("gemma3_text", "gemma3", _LLAMA_SIZES,
           _gemma(6, 62) | _GEMMA3_LIMITS, has_window=True, norm_offset=1.0),
    Family("phi3", "phi3", _LLAMA_SIZES, _SILU, constants={"attention.sliding_window": 0},
           is_partial=True, has_longrope=True),
    Family("phi", "phi2", _NEOX_SIZES | {"attention.head_count_kv": "num_key_value_heads"},
           {"hidden_act": _GELU, "qk_layernorm": (False,)}, is_partial=True),
    Family("gpt_neox", "gptneox", _NEOX_SIZES | {"use_parallel_residual": "use_parallel_residual"},
           {"hidden_act": ("gelu", *_GELU), "attention_bias": (True,)}, body="gpt_neox", is_partial=True,
           fused="query_key_value"),
    Family("olmo2", "olmo2", _LLAMA_SIZES, _OLMO2_LIMITS),
    Family("granite", "granite", _GRANITE_SIZES, _SILU, interleaved=True),
    Family("smollm3", "smollm3", _LLAMA_SIZES, _SMOLLM3_LIMITS, interleaved=True),
    Family("starcoder2", "starcoder2", _STARCODER2_SIZES, {"hidden_act": _GELU, "use_bias": (True,)}),
    Family("gpt2", "gpt2", _GPT2_SIZES, _GPT2_LIMITS, body="transformer", is_rotary=False,
           transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)  # fmt: skip

# The families whose adapters are compared with mlx-lm.
MLX = tuple(row for row in FAMILIES if row.model_type in ("llama", "mistral", "qwen2", "qwen3", "gpt2"))


def family(model_type: str | None) -> Family | None:
    """Return the row of a model type, as config.json names it."""
    return next((row for row in FAMILIES if row.model_type == model_type), None)


def family_of_gguf(architecture: str | None, *, has_experts: bool = False) -> Family | None:
    """Return the first row of a GGUF architecture: a llama file may hold a mistral model, which computes the same."""
    return next((row for row in FAMILIES if row.architecture == architecture
                 and row.has_experts is has_experts), None)  # fmt: skip


def interleave(rows: Any, heads: int) -> Any:
    """Reorder rows [heads * n, ...] from transformers' order, rotary halves, to GGUF's order, pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: Any, heads: int) -> Any:
    """Undo `interleave`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def ungroup_heads(rows: Any, heads: int) -> Any:
    """Reorder rows [heads * 3 * n, ...], q, k and v of each head, to all of q, of k and of v."""
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def group_heads(rows: Any, heads: int) -> Any:
    """Undo `ungroup_heads`."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
