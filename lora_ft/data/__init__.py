"""Turn rows of data into packed batches of tokens; the tokenizer is passed in by the caller.

data.path -sources, files, formats, read (split)-> Row -chat_template, tokenize, dataset (length, cache)-> Example
          -sampler-> steps -packing-> Batch (ops/batch.py)
"""
