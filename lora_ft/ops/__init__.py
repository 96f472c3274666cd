"""Tensor functions, the plain form beside the fast one; nothing here knows settings beyond `fast`, or files.

token_loss     packed tokens -> sum of losses; chooses which of the paths below a model takes
attention      causal within documents                  cross_entropy  the head and its loss
lora_linear    a layer and its LoRA as one function
recompute      activation checkpointing                 unpacked       4-bit weights while generating
allocator      memory that stays in the process
"""
