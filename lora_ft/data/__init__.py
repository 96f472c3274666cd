"""Rows of data become packed tokens; the tokenizer object is handed in.

data.path -sources, files, formats, read (split)-> Row -chat_template, tokenize, dataset (length, cache)-> Example
          -sampler-> steps -packing-> Batch (ops/batch.py)
"""
