"""Tensor functions: each fast form next to its plain definition. Nothing here reads or writes files.

token_loss       packed tokens -> sum of losses            batch            packed documents as tensors
attention        causal within documents                  tiled_attention  the same on a CPU, tile by tile
cross_entropy    the head and its loss                    logits           LoRA, scale and soft cap of a head
lora_linear      a linear layer and its LoRA as one function
norm  mlp  rope  blocks that keep less for the backward   kernels          the three compiled, or Liger's
recomputable     tensors that are computed again          weights          a frozen weight in any storage format
gradient_checkpointing  layers recomputed in backward     dropout          switches off the frozen base's dropout
"""
