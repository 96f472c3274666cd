"""Everything that `fast.*` changes in a base: at one place, before adapters are attached, each choice with its reason.

    fast.storage            linear weights in bfloat16 where that keeps every bit
    fast.norm, mlp, rope    blocks that keep less for the backward, by the kernels of fast.compile or fast.liger
    fast.attention, loss    the path from packed tokens to the loss

fast.lora belongs to the adapter: `adapters.fast`.
"""

import dataclasses
from collections.abc import Collection

from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models.blocks import use_fast_blocks
from lora_ft.models.storage import store_in_bfloat16
from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.token_loss import Paths, choose_paths


def use_fast_paths(
    model: PreTrainedModel, fast: config.Fast, kernels: Kernels = OWN, modules_to_save: Collection[str] = ()
) -> Paths:
    """Set up a frozen base as `fast` says; `reasons` of the result tells what was chosen and what stays plain.

    `kernels` is what `choose_kernels` made of `fast`; `modules_to_save` is trained in full, and keeps its weights.
    """
    reasons = []
    if fast.storage:
        if saved_bytes := store_in_bfloat16(model, modules_to_save):
            reasons = [f"weights stored in bfloat16, which keeps every bit: {saved_bytes / 1e9:.2f} GB less"]
    else:
        reasons = ["plain storage: fast.storage=false"]
    reasons += use_fast_blocks(model, norm=fast.norm, mlp=fast.mlp, rope=fast.rope, kernels=kernels)
    if kernels is not OWN:
        reasons.append(f"norm, SwiGLU and RoPE by {'torch.compile' if fast.compile else 'Liger'}")
    paths = choose_paths(model, fast)
    return dataclasses.replace(paths, reasons=(*paths.reasons, *reasons))
