"""Rows of data become packed tokens; numpy only, the tokenizer object is handed in.

data.path -sources, files-> Record -formats-> Row -templates-> Script -tokenize-> Encoded
          -prepare (split, length, cache)-> TokenRow -order-> steps -pack-> MicroBatch
"""
