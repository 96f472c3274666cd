"""Tensor functions, the plain form beside the fast one; nothing here knows files.

token_loss       packed tokens -> sum of losses; chooses which of the paths below a model takes
attention        causal within documents                  tiled_attention  the same on a CPU, tile by tile
cross_entropy    the head and its loss                    lora_linear      a layer and its LoRA as one function
norm  mlp  rope  the rest of a block, keeping less        kernels          the three compiled, or Liger's
recipe           a tensor that can be computed again      weights          a frozen weight, however it is stored
recompute        activation checkpointing                 dequantized      small weights while generating
dropout          the frozen base's own, switched off      allocator        memory that stays in the process
"""
