"""Write the adapter of a run in other forms: merged into its base, as GGUF or MLX, combined with others, or smaller.

merge, weight_stream, merge_base, verify      base weights + adapter -> a folder that transformers loads alone
combine, truncate                             several adapters into one; a smaller one
lora_weights, gguf/, mlx                      adapters for llama.cpp and MLX, merged models for llama.cpp
"""
