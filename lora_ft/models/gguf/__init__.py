"""Read GGUF files: the container, the conversion to a transformers folder, and the tokenizer."""
