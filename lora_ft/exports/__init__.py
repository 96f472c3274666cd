"""What leaves a run: a merged model that needs no adapter.

merge      base weights + adapter -> a folder that transformers loads alone
verify     that folder's logits against those of the attached adapter
"""
