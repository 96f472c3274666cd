"""Rows of data become packed tokens; numpy only, the tokenizer object is handed in.

data.path -sources, files-> Record -formats, read (split)-> Row -templates-> Script -tokenize-> Encoded
          -prepare (length, cache)-> TokenRow -order-> steps -pack-> MicroBatch
"""
