"""Causal attention over packed documents: no token sees another document, and no mask of all tokens is built.

    tokens     the cat sat | hello you | one
    starts   [ 0             3           5     6 ]     (cumulative, as flash attention's cu_seqlens)

    the  x                     the plain twin is transformers' own `sdpa`, which derives a dense
    cat  x x                   tokens-by-tokens mask from the position ids: the same numbers, with
    sat  x x x                 all the empty blocks computed and grouped key heads repeated
    hel        x
    you        x x
    one            x

Which of four kernels computes it is a function of device and dtype (`choose_kernel`):

    tiled         CPU, fp32 and fp64: ops/tiled_attention.py, but for documents where it is slower
    varlen        CUDA, 16 bits: torch's flash attention over cumulative boundaries
    flash_attn    the same from the package of that name, where torch was built without
    per_document  everything else: a causal call of scaled_dot_product_attention each

Shapes: B batch (always 1 when packed), H query heads, G key heads (H = G R), T tokens, D head width.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_ft.ops.tiled_attention import tiled_attention, visible, worth_it

NAME = "lora_ft_packed"
PLAIN = "sdpa"

# Keyword arguments that change nothing here. Any other one that is set may change what attention computes.
_HARMLESS = {"position_ids", "position_embeddings", "use_cache", "return_dict", "output_attentions",
             "output_hidden_states", "output_router_logits", "cache_position"}  # fmt: skip


class Unsupported(ValueError):
    """A call that packed attention would answer with other numbers than the model's own attention."""


class Kernel(NamedTuple):
    """The function that computes attention, and the reason for it."""

    name: Literal["tiled", "varlen", "flash_attn", "per_document"]
    reason: str


@functools.cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> Kernel:
    """The fastest exact kernel for queries of this dtype and head width on this device."""
    if device.type == "cpu":
        if dtype in (torch.float32, torch.float64):
            return Kernel("tiled", f"{dtype} on a CPU")
        return Kernel("per_document", f"{dtype} on a CPU: scores would be rounded to 16 bits")
    if device.type != "cuda":
        return Kernel("per_document", f"no packed kernel on {device.type}")
    if dtype not in (torch.float16, torch.bfloat16):
        return Kernel("per_document", f"{dtype}: flash attention computes in 16 bits only")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Kernel("per_document", "flash attention needs a GPU of compute capability 8.0 or more")
    if head_width % 8 or head_width > 256:
        return Kernel("per_document", f"flash attention's heads are multiples of 8 up to 256 wide, not {head_width}")
    if torch.backends.cuda.is_flash_attention_available():
        return Kernel("varlen", "torch's flash attention over boundaries")
    if importlib.util.find_spec("flash_attn"):
        return Kernel("flash_attn", "this torch was built without flash attention")
    return Kernel("per_document", "this torch was built without flash attention, and flash-attn is not installed")


def packed_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_starts: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document; query [1, H, T, D], key and value [1, G, T, D], result [1, T, H, D].

    `document_starts` is passed to the model's forward and reaches here through transformers'
    AttentionInterface. Raises Unsupported without it (generation with a key cache needs a mask that this name
    suppresses), for a mask, and for every argument that would otherwise be ignored.
    """
    if document_starts is None:
        raise Unsupported("packed attention needs document_starts: call the model through token_loss_sum")
    if attention_mask is not None:
        raise Unsupported("packed attention takes no attention_mask of the model's own")
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("packed attention is causal, and this layer is not")
    if unknown := sorted(name for name, value in kwargs.items() if value is not None and name not in _HARMLESS):
        raise Unsupported(f"packed attention does not know {', '.join(unknown)}")
    if not query.shape[2] == key.shape[2] == document_starts[-1]:
        raise Unsupported(f"packed attention over {document_starts[-1]} tokens got {query.shape[2]} queries and "
                          f"{key.shape[2]} keys")  # fmt: skip
    for calls in _recorders:
        calls.append(Call(sliding_window, query.shape[-1]))
    starts = tuple(document_starts)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = choose_kernel(query.device, query.dtype, query.shape[-1]).name
    one_width = query.shape[-1] == value.shape[-1]
    if dropout or not one_width or (kernel == "tiled" and not worth_it(starts, sliding_window)):
        kernel = "per_document"
    arguments = (query, key, value, starts, sliding_window, scale)
    match kernel:
        case "tiled":
            return tiled_attention(*arguments), None
        case "varlen":
            return varlen(*arguments), None
        case "flash_attn":
            return flash_attn(*arguments), None
    return per_document(*arguments, dropout), None


def per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[int, ...],
    window: int | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by torch's own function, document by document; shapes as in `packed_causal_attention`."""
    # split, not slices: the backward of a slice is a tensor of zeros as long as all documents.
    lengths = [end - start for start, end in pairwise(starts)]
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None if window is None or q.shape[2] <= window else visible(0, q.shape[2], 0, window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """Attention by torch's flash kernel over boundaries (torch.nn.attention.varlen); not deterministic backwards."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = _by_token(query, key, value)
    boundaries, longest = _boundaries(starts, query.device)
    grouped = query.shape[1] != key.shape[1]
    result: Tensor = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scale,
        window_size=_span(window),
        enable_gqa=grouped,
    )
    return result[None]


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """The same by the package flash-attn 2 (flash_attn_varlen_func)."""
    package = importlib.import_module("flash_attn")
    boundaries, longest = _boundaries(starts, query.device)
    result: Tensor = package.flash_attn_varlen_func(
        *_by_token(query, key, value),
        boundaries,
        boundaries,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=_span(window),
    )
    return result[None]


def _by_token(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[1, heads, T, D] as flash attention reads it: [T, heads, D]."""
    return tuple(tensor[0].transpose(0, 1) for tensor in tensors)


def _span(window: int | None) -> tuple[int, int]:
    """Keys to the left and right of a row; transformers counts the row itself into the window."""
    return (-1 if window is None else window - 1, 0)


# Copied to the device once a forward, not once a layer.
@functools.lru_cache(maxsize=4)
def _boundaries(starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    longest = max(end - start for start, end in pairwise(starts))
    return torch.tensor(starts, dtype=torch.int32, device=device), longest


class Call(NamedTuple):
    """A layer's call of packed attention: its sliding window and the width of its heads."""

    window: int | None
    head_width: int


_recorders: list[list[Call]] = []


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Record the calls of packed attention until the block ends."""
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders.remove(calls)


# Under a name that transformers' mask registry does not know, the model builds no mask at all.
ALL_ATTENTION_FUNCTIONS.register(NAME, packed_causal_attention)
