"""Shapes of published models: the packaged copies of their configs, which `lora-ft plan` reads.

config_of("llama3_1_8b") -> LlamaConfig
"""

from transformers import PretrainedConfig

from lora_ft.models.described import packaged

SHAPES = {
    "llama3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "gemma2_2b": "google/gemma-2-2b-it",
    "gemma3_1b": "google/gemma-3-1b-it",
    "gpt2": "openai-community/gpt2",
}


def config_of(shape: str, num_layers: int | None = None) -> PretrainedConfig:
    """Return the config of a shape, by default with all of its layers."""
    made: PretrainedConfig = packaged(SHAPES[shape])
    if num_layers is not None:
        made.num_hidden_layers = num_layers
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:num_layers]
    return made
