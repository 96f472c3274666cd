"""What leaves a run: a model that needs no adapter, an adapter in other formats, a smaller one, one of several.

merge, stream, onto, verify        base weights + adapter -> a folder that transformers loads alone
combine, truncate                  several adapters into one; a smaller one
pairs, gguf_*, mlx                 the same for llama.cpp and MLX
"""
