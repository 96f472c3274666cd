"""Tensor functions, the plain form beside the fast one; nothing here knows files.

token_loss       packed tokens -> sum of losses            batch            packed documents as tensors
attention        causal within documents                  tiled_attention  the same on a CPU, tile by tile
cross_entropy    the head and its loss                    lora_linear      a layer and its LoRA as one function
norm  mlp  rope  the rest of a block, keeping less        kernels          the three compiled, or Liger's
recomputable     a tensor that can be computed again      weights          a frozen weight, however it is stored
gradient_checkpointing  layers recomputed in the backward  dequantized      small weights while generating
dropout          the frozen base's own, switched off      allocator        memory that stays in the process
"""
