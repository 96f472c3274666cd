"""Write an adapter in other forms: merged into its base, as GGUF or MLX, combined with others, or of lower rank.

merge, verify, merge_base, weight_stream      base + adapter -> a folder that loads with plain transformers
combine, truncate                             several adapters into one; an adapter of lower rank
lora_weights, gguf/, mlx                      adapters for llama.cpp and MLX, merged models for llama.cpp
"""
