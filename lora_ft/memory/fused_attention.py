"""Let torch's scaled_dot_product_attention take, on the meta device, the kernel that it takes on the target.

on the meta device torch computes it step by step, with all scores [heads, rows, keys], as no device does

cpu     the kernel that torch names for tensors of the same sizes (without memory) on this CPU
cuda    flash attention: 16 bits, compute capability 8.0, no mask, at most 256 columns
        memory-efficient attention: as many heads of keys as of queries
        else step by step, as on the meta device
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_ft.ops.device import target

_aten = torch.ops.aten
_FLASH = 1  # of torch.nn.attention.SDPBackend


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Replace the attention of meta tensors until the block ends."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    try:
        yield
    finally:
        library._destroy()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    kernel = _kernel(query, key, value, attn_mask, options, enable_gqa)
    if kernel == "step by step":
        by_step: Any = _aten._scaled_dot_product_attention_math
        whole: Tensor = by_step(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)[0]
        return whole
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # torch makes a mask to add, for each call
        attn_mask = torch.where(attn_mask.logical_not(), -math.inf, torch.zeros((), device="meta", dtype=query.dtype))
    result: Any
    if kernel == "cpu":
        result = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask, **options)
    elif kernel == "flash":
        result = _aten._scaled_dot_product_flash_attention(query, key, value, **options)
    else:
        if attn_mask is not None:
            attn_mask = _aligned(attn_mask).expand(*query.shape[:3], key.shape[2])
        keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        result = _aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, keeps, **options)
    attended: Tensor = result[0]
    return attended


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], grouped: bool
) -> str:
    device = target(query.device)
    if device.kind == "cpu":
        there = [
            None if tensor is None else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            for tensor in (query, key, value, mask)
        ]
        chosen = torch._fused_sdp_choice(*there, **options, enable_gqa=grouped)
        return "cpu" if chosen == _FLASH else "step by step"
    if device.kind != "cuda" or query.shape[-1] != value.shape[-1]:
        return "step by step"
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if device.has_flash and device.capability >= (8, 0) and is_half and mask is None and query.shape[-1] <= 256:
        return "flash"
    return "efficient" if query.shape[1] == key.shape[1] else "step by step"


def _aligned(mask: Tensor) -> Tensor:
    """Return a mask whose rows begin at multiples of 16 elements: torch copies one that is not."""
    columns = mask.shape[-1]
    if columns % 16 == 0:
        return mask
    return torch.nn.functional.pad(mask, (0, 16 - columns % 16))[..., :columns]
