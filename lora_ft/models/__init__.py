"""Base models: from a hub id, a folder or a GGUF file to a frozen model and its tokenizer.

    load         place -> tokenizer, and frozen (quantized) model; read first
    resolve      model.path -> a checked folder on this machine
    gguf         GGUF file -> such a folder, made once and cached
    families     names and layouts of the model families, in transformers and in GGUF
    quantize     which layers become int8, nf4 or fp4, and the proof that they did
    meta_model   a base without its weights, to check settings on
    storage      what a loaded base need not keep in memory
    acceleration the one module that replaces forwards, of the base and of an adapter, and gives them back
    self_check   the fast paths against the plain ones, on the loaded base
    fingerprint  model -> hash of the frozen weights: did training leave the base alone?

Only acceleration knows about adapters.
"""
