"""Base models: load a hub id, a folder or a GGUF file as a frozen model with its tokenizer.

    load         model settings -> tokenizer and frozen (quantized) model; read this first
    device       device and dtype settings -> those of this machine; gpus: which of its GPUs torch can use
    resolve      model.path -> a checked folder on this machine
    gguf         GGUF file -> such a folder, converted once and cached
    families     layouts of the model families, in transformers and in GGUF
    quantize     linear layers -> int8, nf4 or fp4, verified after loading
    meta_model   a base without its weights, on which settings are checked
    storage      forms of the loaded weights that take less memory
    acceleration replaces forwards of the base and of an adapter, and restores them
    self_check   compares the fast paths with the plain one on the loaded base
    fingerprint  model -> hash of the frozen weights, to verify that training does not change them

Only acceleration depends on adapters.
"""
