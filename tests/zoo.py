"""A zoo of tiny random models: one of every family that lora_ft is tested with, built from a table.

model = zoo_model("gemma2")               # sizes of tests/tiny.py: 2 layers, hidden 64, vocabulary 512
folder = zoo_folder(tmp_path, "gemma2")   # the model and the tiny tokenizer, saved as transformers saves them

A name is a model type, with a variant after a dash: "falcon-rw" is a falcon with ALiBi. Where layers differ (a
window or none, dense or experts, state space or attention), a model has one of each.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXPERTS, IDS, SIZES, TOKEN_LIMIT, VOCABULARY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

_GROUPED = {"num_key_value_heads": 2}
_WIDE = {"num_key_value_heads": 2, "head_dim": 32}  # heads wider than hidden size / heads
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {  # the last two of four layers use keys and values of the first two
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_SCALED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
_ROUTED = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}

# Models of one stack of equal layers, without experts.
DENSE: dict[str, dict[str, Any]] = {
    "arcee": _GROUPED,
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "rotary_dim": 8, "n_positions": 256},
    "cohere": _GROUPED,
    "cohere2": _GROUPED | _WINDOW,
    "ernie4_5": _WIDE,
    "exaone4": _GROUPED | _WINDOW,
    "falcon": {"multi_query": True, "parallel_attn": True},
    "falcon-40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-rw": {"alibi": True, "multi_query": False, "parallel_attn": False},
    "gemma": _WIDE,
    "gemma2": _WIDE | _WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
                                 "final_logit_softcapping": 5.0},
    "gemma3_text": _WIDE | _WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3n_text": _WIDE | _SHARED | {"intermediate_size": [128] * 4, "laurel_rank": 8,
                                       "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": _WIDE | _SHARED | {"global_head_dim": 64, "num_global_key_value_heads": 2},
    "glm": _WIDE,
    "glm4": _WIDE | _PARTIAL,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "rotary_dim": 8, "n_positions": 256},
    "granite": _GROUPED | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
                           "logits_scaling": 2.0},
    "helium": _GROUPED | {"head_dim": 16},
    "hunyuan_v1_dense": _WIDE,
    "internlm3": _WIDE,
    "llama": _GROUPED,
    "llama-3": _GROUPED | _SCALED,
    "ministral": _WIDE | _WINDOW,
    "ministral3": _WIDE,
    "mistral": _WIDE | {"sliding_window": 8},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256},
    "nanochat": _GROUPED,
    "nemotron": _GROUPED | _PARTIAL,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | _WINDOW,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": _PARTIAL,
    "phi": _GROUPED | _PARTIAL,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _WIDE,
    "seed_oss": _WIDE,
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0]},
    "stablelm": _GROUPED | _PARTIAL | {"qk_layernorm": True},
    "starcoder2": _GROUPED,
    "vaultgemma": _WIDE | _WINDOW | {"query_pre_attn_scalar": 16},
    "youtu": {k: v for k, v in _LATENT.items() if "expert" not in k},
}  # fmt: skip

# Mixtures of four experts, two per token.
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": _GROUPED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
                                "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "glm4_moe": _WIDE | _PARTIAL | {k: v for k, v in _LATENT.items() if "group" in k or "expert" in k}
    | {"moe_intermediate_size": 64, "first_k_dense_replace": 1},
    "gpt_oss": _WIDE | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": EXPERTS | {"num_local_experts": 4},
    "hunyuan_v1_moe": _WIDE | {"num_experts": 4, "moe_topk": 2},
    "llama4_text": _WIDE | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128,
                            "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8,
                            "moe_layers": [1], "no_rope_layers": [1, 0]},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "olmoe": _ROUTED | _GROUPED,
    "phimoe": EXPERTS | {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2_moe": _ROUTED | _GROUPED | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _ROUTED | _WIDE,
}  # fmt: skip

# State-space, linear-attention, recurrent and convolution layers, alone or with attention layers.
RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": _GROUPED | _MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
                                  "attn_layer_indices": [1]},
    "falcon_h1": _WIDE | _MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8},
    "granitemoehybrid": EXPERTS | {"num_local_experts": 4, "layer_types": ["mamba", "attention"],
                                   "shared_intermediate_size": 64, "mamba_n_heads": 4, "mamba_d_head": 32,
                                   "mamba_d_state": 16, "mamba_n_groups": 1},
    "jamba": EXPERTS | _MAMBA | {"num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 8,
                                 "use_mamba_kernels": False},
    "lfm2": _GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "mamba2": {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "nemotron_h": _WIDE | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 32,
                           "ssm_state_size": 16, "n_groups": 1, "num_hidden_layers": 2},
    "olmo_hybrid": _GROUPED | _LINEAR_ATTENTION,
    "qwen3_next": _ROUTED | _WIDE | _LINEAR_ATTENTION | {"shared_expert_intermediate_size": 64},
    "qwen3_5_text": _WIDE | _LINEAR_ATTENTION,
    "recurrent_gemma": _GROUPED | {"lru_width": 64, "conv1d_width": 4, "block_types": ["recurrent", "attention"],
                                   "attention_window_size": 8},
}  # fmt: skip

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
# A text model inside of a model that also reads images: the type and settings of the text, those of the whole.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (DENSE["gemma3_text"], {"mm_tokens_per_image": 4, "image_token_index": 500, "boi_token_index": 501,
                                      "eoi_token_index": 502, "vision_config": _VISION}),
}  # fmt: skip

ZOO = tuple(sorted(DENSE | MIXTURES | RECURRENT | MULTIMODAL))
# One family of each kind of layers; tests of every family have the other ones under the mark nightly.
KINDS = (
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon_mamba",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba2",
    "mpt",
    "olmo2",
    "phi3",
    "phimoe",
    "qwen3_moe",
    "qwen3_next",
)
ZOO_BY_TIME = [pytest.param(name, marks=() if name in KINDS else pytest.mark.nightly) for name in ZOO]


def zoo_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a random model in eval mode, the same for the same arguments; the global generator does not change.

    The embeddings of all models are untied.
    """
    auto: Any = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    # The default, grouped products, takes no float64.
    options = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(zoo_config(name), dtype=dtype, **options).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("correct_output_scale"):  # zero in a new Gemma 3n, which cuts off a part of it
            parameter.data.fill_(0.5)
    return model


def zoo_config(name: str) -> Any:
    """Return the config of a model of the zoo."""
    model_type = name.partition("-")[0]
    common = {"tie_word_embeddings": False, "initializer_range": 0.1, "max_position_embeddings": TOKEN_LIMIT, **IDS}
    if name in MULTIMODAL:
        text, whole = MULTIMODAL[name]
        return AutoConfig.for_model(model_type, text_config=SIZES | common | text, **whole, **common)
    return AutoConfig.for_model(model_type, **SIZES | common | (DENSE | MIXTURES | RECURRENT)[name])


def zoo_folder(tmp_path: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a model of the zoo and the tiny tokenizer into `tmp_path/name` and return that folder."""
    folder = tmp_path / name
    zoo_model(name, dtype=dtype, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
