"""Base models: from a hub id, a folder or a GGUF file to a frozen model and its tokenizer.

locate     model.path -> a checked folder on this machine (a download, or a GGUF conversion)
gguf       read a GGUF file: metadata and tensors
convert    GGUF -> the folder that transformers would have saved, once, in the user's cache
vocabulary GGUF metadata -> tokenizer
load       folder -> tokenizer; folder -> frozen (quantized) model: start reading here
quantize   which layers become int8, nf4 or fp4, and the proof that they did
fingerprint  a hash of the frozen weights: did training leave the base alone?
"""
