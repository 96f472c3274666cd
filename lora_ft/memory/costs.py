"""The work of an operation on a device, from the shapes of its tensors: FLOPs, bytes read and written, launches.

    mm [4096, 4096] x [4096, 14336], bfloat16     flops 481e9     bytes 268 MB     launches 1
    max(flops / rate, bytes / bandwidth)          the least time that it takes

bytes: each tensor that it reads or writes, once. What a kernel reads twice, or finds in a cache, is not known here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

# They return memory or a view, and launch nothing.
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
         _aten._unsafe_view, _aten._reshape_alias, _aten.lift_fresh}  # fmt: skip
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten._grouped_mm: 0}
# Their first tensor is written and not read.
_OVERWRITES = {_aten.copy_, _aten.zero_, _aten.fill_, _aten.normal_, _aten.uniform_}
# They read, or write, only a few rows of their first tensor.
_READ_ROWS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.nll_loss_forward}
_WRITE_ROWS = {_aten.scatter_add_, _aten.scatter_, _aten.index_put_, _aten.index_add_, _aten.index_copy_}
# Attention by one operation: by name, whether it is a backward.
_ATTENTION = {
    "_scaled_dot_product_flash_attention": False,
    "_scaled_dot_product_flash_attention_backward": True,
    "_scaled_dot_product_flash_attention_for_cpu": False,
    "_scaled_dot_product_flash_attention_for_cpu_backward": True,
    "_scaled_dot_product_efficient_attention": False,
    "_scaled_dot_product_efficient_attention_backward": True,
    "_varlen_attn": False,
    "_varlen_attn_backward": True,
}
# Products in the backward of attention: two of them compute the scores and their gradient's factor again.
_BACKWARD_PER_FORWARD = 2.5
_LAUNCHES = {"_varlen_attn_backward": 3, "_scaled_dot_product_flash_attention_backward": 3,
             "_scaled_dot_product_efficient_attention_backward": 2}  # fmt: skip


TRANSFER = "transfer"  # op of a copy between host and device


@dataclass(frozen=True)
class Cost:
    """`count` equal operations of a phase; flops, bytes and launches are those of each one.

    op: such as "aten.mm"; TRANSFER for a copy between the host and a GPU. dtype: that of the operands of a product,
    else of the first tensor, such as "bfloat16".
    bytes: read and written.
    """

    phase: str
    op: str
    dtype: str
    flops: int
    bytes: int
    launches: int
    count: int


@dataclass(frozen=True)
class Kind:
    """Facts about an operation that do not depend on its arguments."""

    name: str
    is_free: bool
    product: int | None  # the position of the left operand
    attention: bool | None  # True for a backward
    traffic: Callable[[Sequence[Tensor], Sequence[Tensor], int], int]
    mutated: tuple[int, ...]  # positions of arguments that it changes without returning them
    launches: int

    @property
    def is_attention(self) -> bool:
        """True if the operation computes attention, forward or backward."""
        return self.attention is not None


@cache
def kind_of(func: Any) -> Kind:
    """Return the facts about an operator."""
    packet, name = func.overloadpacket, func._schema.name.partition("::")[2]
    arguments = func._schema.arguments
    writes_out = packet in _OVERWRITES or any(argument.is_out for argument in arguments)
    traffic = _all_read_and_written
    if writes_out:
        traffic = _all_once
    elif packet in _READ_ROWS:
        traffic = _rows_read
    elif packet in _WRITE_ROWS:
        traffic = _rows_written
    changed = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    return Kind(
        name=str(packet),
        is_free=func.is_view or packet in _FREE,
        product=_PRODUCTS.get(packet),
        attention=_ATTENTION.get(name),
        traffic=traffic,
        mutated=() if func._schema.returns else tuple(changed),
        launches=_LAUNCHES.get(name, 1),
    )


def product_flops(kind: Kind, args: Sequence[Any]) -> int:
    """Return the FLOPs of a matrix product; 0 for another operation."""
    if kind.product is None:
        return 0
    left, right = args[kind.product], args[kind.product + 1]
    flops: int = 2 * left.numel() * right.shape[-1]
    return flops


def attention_flops(kind: Kind, func: Any, args: Sequence[Any], kwargs: dict[str, Any], starts: Sequence[int]) -> int:
    """Return the FLOPs of an attention; `starts`: boundaries of the documents, if the operation packs several.

    Causal attention computes half of the scores, and a window of w keys w of them per row.
    """
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    query, key = given["query"], given["key"]
    if starts:  # [tokens, heads, width]
        window = (given.get("window_size") or [-1])[0]
        scores = sum(_causal(end - start, window + 1) for start, end in pairwise(starts))
        scores *= query.shape[1]
    else:  # [batch, heads, tokens, width]
        rows, columns = query.shape[-2], key.shape[-2]
        scores = query.numel() // query.shape[-1] // rows * (rows * columns)
        if given.get("is_causal"):
            scores //= 2
    width = query.shape[-1] + given["value"].shape[-1]
    return int(2 * scores * width * (_BACKWARD_PER_FORWARD if kind.attention else 1))


def _causal(tokens: int, window: int) -> int:
    """Return how many scores a causal attention computes; window: keys that a row sees, 0 for all."""
    if window <= 0 or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def traffic(kind: Kind, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """Return the bytes that an operation reads and writes; given: tensors among its arguments, made: its results."""
    changed = 0
    for position in kind.mutated:
        if position < len(args):
            values = args[position] if isinstance(args[position], list | tuple) else [args[position]]
            changed += sum(nbytes(value) for value in values if isinstance(value, Tensor))
    return kind.traffic(given, made, changed)


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values; those of a broadcast tensor are counted once."""
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes()) if 0 in tensor.stride() else size


def _all_read_and_written(given: Sequence[Tensor], made: Sequence[Tensor], changed: int) -> int:
    return sum(map(nbytes, given)) + sum(map(nbytes, made)) + changed


def _all_once(given: Sequence[Tensor], made: Sequence[Tensor], changed: int) -> int:
    return sum(map(nbytes, given))


def _rows_read(given: Sequence[Tensor], made: Sequence[Tensor], changed: int) -> int:
    return sum(map(nbytes, given[1:])) + 2 * sum(map(nbytes, made))


def _rows_written(given: Sequence[Tensor], made: Sequence[Tensor], changed: int) -> int:
    return 3 * sum(map(nbytes, given[1:]))
