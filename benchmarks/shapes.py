"""Shapes of published models, from their config.json: what a trace needs to know of them.

config_of("llama3_1_8b") -> LlamaConfig
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_1_8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "smollm2_135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3_0_6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "qwen3_8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "mistral_7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "gemma2_2b": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000,
        "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    },
    "gemma3_1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
        "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
    },
}  # fmt: skip


def config_of(shape: str, num_layers: int | None = None) -> PretrainedConfig:
    """Return the config of a shape, by default with all of its layers."""
    settings = dict(SHAPES[shape])
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if num_layers is not None:
        made.num_hidden_layers = num_layers
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:num_layers]
    return made
