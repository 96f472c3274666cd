"""Memory beside the tensors of a step: buffers inside operators, and what the allocator adds. All of it is assumed.

    workspaces       buffers that operators make for themselves, and cuBLAS's workspaces
    allocator_slack  gaps, rounding and blocks kept for later

Sources: PyTorch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (flash attention's backward),
.../mem_eff_attention/kernel_backward.h, ATen/cuda/CublasHandlePool.cpp and ATen/native/cpu/FlashAttentionKernel.cpp.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_ft.memory.costs import Kind
from lora_ft.ops.device import Target

if TYPE_CHECKING:
    from lora_ft.memory.trace import StepTrace

MIB = 2**20

# What a process holds beside its imports and tensors: a share of the bytes that come and go within a step (passing),
# and a constant for code, threads and Python's objects of the first step.
#
# CPU: glibc leaves gaps, as each step has tensors of other sizes, and torch aligns those from 2 MiB on. Measured with
# rows of 30 to 600 tokens, three steps, one thread, glibc 2.36, on 2026-12-01; MB:
#                                            imports  tensors  passing  process  predicted
#     Llama, 26M, steps of 512 tokens          437      204       80       695       713   +3 %
#     GPT-2, 28M, nf4, 512                     437      114       62       602       614   +2 %
#     SmolLM2-135M                             488      764      130     1,387     1,349   -3 %
#     SmolLM2-135M, nf4                        488      742      478     1,352     1,501  +11 %
# Whole runs of SmolLM2-135M: ten of eleven within 12 %, one NF4 run at rank 64 23 % above (benchmarks/LOG.md).
#
# CUDA: with expandable segments, which grow by pages of 2 MiB for small tensors and of 20 MiB for others, an 8B model's
# QLoRA step took 10.8 GiB, and without them 16.4 (https://github.com/meta-pytorch/torchtune/issues/1185). arXiv
# 2507.16274 compares allocators on more models. How much is left with expandable segments is an assumption.
SLACK_SHARE = {"cpu": 0.5, "cuda": 0.04}
_SLACK_CONSTANT = {"cpu": 30 * MIB, "cuda": 22 * MIB}
_PAGE = 2 * MIB


def workspaces(trace: "StepTrace", device: Target) -> int:
    """Return the bytes that operators of a step need for themselves at its peak, and those of cuBLAS."""
    return trace.bytes_inside + (_cublas(device) if device.kind == "cuda" else 0)


def _cublas(device: Target) -> int:
    """Return the workspaces that torch gives to cuBLAS: one to the thread of the forward, one to that of the backward.

    cuBLASLt uses the same ones. 32 MiB from Hopper on, before that 2 x 4 MiB + 8 x 16 KiB.
    """
    each = 32 * MIB if device.capability[0] in (9, 10, 12) else 8 * MIB + 128 * 1024
    return 2 * each


def bytes_inside(kind: Kind, func: Any, args: Sequence[Any], documents: int) -> int:
    """Return the bytes of the buffers that an operator makes for itself; `documents`: how many it packs, at least 1."""
    formula = _INSIDE.get(kind.name.rpartition(".")[2])
    if formula is None:
        return 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    return formula(given["query"], given["key"], documents)


def _flash_backward(query: Tensor, key: Tensor, documents: int) -> int:
    """Gradient of the queries in float32, and of keys and values for each head of queries.

    A document's rows are followed by 128 more; columns are rounded up to a multiple of 32, over 128 of 64.
    """
    if query.dim() == 4:  # [documents, heads, tokens, width]
        documents, heads, tokens, width = query.shape
        tokens, keys, key_heads = documents * tokens, documents * key.shape[2], key.shape[1]
    else:
        (tokens, heads, width), keys, key_heads = query.shape, key.shape[0], key.shape[1]
    columns = _up(width, 32 if width <= 128 else 64)
    accumulated = 4 * (tokens + 128 * documents) * heads * (columns + 1)  # and a sum for each row
    expanded = 2 * keys * heads * width * query.element_size() if heads != key_heads else 0
    return accumulated + expanded


def _efficient_backward(query: Tensor, key: Tensor, documents: int) -> int:
    """A sum for each row; gradients in float32 if the results are shorter: of queries, of wide keys and values."""
    batch, heads, tokens, width = query.shape
    rows = 4 * batch * heads * tokens
    if query.element_size() == 4:
        return rows
    columns = _up(width, 64)
    wide = 2 * _up(key.shape[2], 128) * columns if width > 128 else 0
    return rows + 4 * batch * heads * (_up(tokens, 64) * columns + wide)


def _cpu_attention(query: Tensor, key: Tensor, documents: int) -> int:
    """A block of scores, of a result and of sums for each thread: 32 to 256 rows by 512 keys, in float32."""
    rows = 256 if query.shape[2] >= 768 else 64 if query.shape[2] >= 192 else 32
    return torch.get_num_threads() * 4 * rows * (512 + query.shape[-1] + 2)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_INSIDE = {
    "_varlen_attn_backward": _flash_backward,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention,
}


def allocator_slack(trace: "StepTrace", device: Target) -> int:
    """Return the bytes that the allocator of a device holds beside the tensors of a step."""
    kind = device.kind if device.kind in SLACK_SHARE else "cuda"
    passing = trace.peak_bytes - trace.resident_bytes
    return _up(int(SLACK_SHARE[kind] * passing) + _SLACK_CONSTANT[kind], _PAGE)
