"""Causal attention within packed documents, without a mask over all tokens.

    tokens     the cat sat | hello you | one
    starts   [ 0             3           5     6 ]     (cumulative, as flash attention's cu_seqlens)

    the  x                     The plain form is transformers' own `sdpa`, which derives a dense
    cat  x x                   tokens-by-tokens mask from the position ids. It gives the same numbers,
    sat  x x x                 but also computes all empty blocks and repeats grouped key heads.
    hel        x
    you        x x
    one            x

Device, dtype and head width decide which of three kernels computes it (`choose_kernel`):

    tiled         CPU, fp32 and fp64: ops/tiled_attention.py, except for documents for which it is slower
    varlen        CUDA, 16 bits: torch's flash attention over cumulative boundaries
    per_document  everything else: one causal call of scaled_dot_product_attention per document

Soft-capped scores and attention sinks are computed by ops/scored_attention.py.

Shapes: B batch (always 1 when packed), H query heads, G key heads (H = G R), T tokens, D head width.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_ft.ops.device import Target, copied, target
from lora_ft.ops.scored_attention import Scoring, flash_with_sinks, scored_attention
from lora_ft.ops.tiled_attention import tiled_attention, visible, worth_it

NAME = "lora_ft_packed"
PLAIN = "sdpa"

# Keyword arguments that do not change attention. Any other one that is set might.
_HARMLESS = {"position_ids", "position_embeddings", "use_cache", "return_dict", "output_attentions",
             "output_hidden_states", "output_router_logits", "cache_position"}  # fmt: skip


class Unsupported(ValueError):
    """A call for which packed attention would compute other numbers than the model's own attention."""


class Kernel(NamedTuple):
    """The function that computes attention, and the reason for it."""

    name: Literal["tiled", "varlen", "per_document", "blocks"]
    reason: str


def choose_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> Kernel:
    """Return the fastest exact kernel for queries of this dtype and head width on this device."""
    return _choose_kernel(target(device), dtype, head_width)


@functools.cache
def _choose_kernel(device: Target, dtype: torch.dtype, head_width: int) -> Kernel:
    if device.kind == "cpu":
        if dtype in (torch.float32, torch.float64):
            return Kernel("tiled", f"{dtype} on a CPU")
        return Kernel("per_document", f"{dtype} on a CPU: tiles would round scores to 16 bits")
    if device.kind != "cuda":
        return Kernel("per_document", f"no packed kernel on {device.kind}")
    if dtype not in (torch.float16, torch.bfloat16):
        return Kernel("per_document", f"{dtype}: flash attention computes in 16 bits only")
    if device.capability < (8, 0):
        return Kernel("per_document", "flash attention needs a GPU of compute capability 8.0 or more")
    if head_width % 8 or head_width > 256:
        return Kernel("per_document", f"flash attention needs heads of 8, 16, ... 256 columns, not {head_width}")
    if device.has_flash:
        return Kernel("varlen", "torch's flash attention over boundaries")
    return Kernel("per_document", "this torch was built without flash attention")


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document; query [1, H, T, D], key and value [1, G, T, D], result [1, T, H, D].

    `document_starts` is passed to the model's forward and arrives here through transformers' AttentionInterface.
    softcap: the cap of the scores. s_aux: the sinks, one score for each query head.
    Raises Unsupported without it (generation with a key cache needs a mask, which this attention suppresses), for a
    mask, and for every argument that would otherwise be ignored.
    """
    if document_starts is None:
        raise Unsupported("packed attention needs document_starts: call the model through token_loss_sum")
    if attention_mask is not None:
        raise Unsupported("packed attention does not support an attention_mask made by the model")
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("packed attention is causal, but this layer is not")
    if unknown := sorted(name for name, value in kwargs.items() if value is not None and name not in _HARMLESS):
        raise Unsupported(f"packed attention does not support {', '.join(unknown)}")
    if not query.shape[2] == key.shape[2] == document_starts[-1]:
        raise Unsupported(f"packed attention over {document_starts[-1]} tokens got {query.shape[2]} queries and "
                          f"{key.shape[2]} keys")  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = choose_kernel(query.device, query.dtype, query.shape[-1])
    scored = softcap is not None or s_aux is not None
    if scored:
        if dropout:
            raise Unsupported("packed attention does not support dropout with soft-capped scores or sinks")
        kernel = _scored_kernel(kernel, query, value, softcap)
    for calls in _recorders:
        calls.append(Call(sliding_window, kernel))
    if scored:
        how = Scoring(tuple(document_starts), sliding_window, scale, softcap)
        if kernel.name == "blocks" or s_aux is None:
            return scored_attention(query, key, value, s_aux, how), None
        return flash_with_sinks(query, key, value, s_aux, *_boundaries(document_starts, query.device), how), None
    name: str = kernel.name
    starts = tuple(document_starts)
    columns, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if dropout or (name == "tiled" and (missing or not worth_it(starts, sliding_window))) or missing < 0:
        name = "per_document"
    arguments = (query, key, value, starts, sliding_window, scale)
    match name:
        case "tiled":
            return tiled_attention(*arguments), None
        case "varlen" if missing:  # flash attention has one width: add columns of zeros
            padded = pad(value, (0, missing))
            return varlen(query, key, padded, document_starts, sliding_window, scale)[..., :columns], None
        case "varlen":
            return varlen(query, key, value, document_starts, sliding_window, scale), None
    return per_document(*arguments, dropout), None


def _scored_kernel(kernel: Kernel, query: Tensor, value: Tensor, cap: float | None) -> Kernel:
    """Return the kernel for soft-capped scores or sinks, where `kernel` computes plain scores."""
    if cap is not None:
        return Kernel("blocks", "soft-capped scores")
    if kernel.name == "varlen" and query.shape[-1] == value.shape[-1] and _varlen_takes_grouped_keys():
        return Kernel("varlen", "torch's flash attention over boundaries, with sinks")
    return Kernel("blocks", "attention sinks")


def per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[int, ...],
    window: int | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attend by torch's own function, document by document; shapes as in `packed_causal_attention`."""
    longest = max(end - start for start, end in pairwise(starts))
    if not _takes_grouped_keys(query, value, masked=window is not None and window < longest):
        key, value = expanded(query, key, value)
    # split, not slices: the backward of a slice makes a tensor of zeros for all documents.
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


def expanded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return key and value [1, H, T, D] with each of their G heads repeated for the query heads that share it."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _takes_grouped_keys(query: Tensor, value: Tensor, *, masked: bool) -> bool:
    """Return True if grouped key heads do not make torch choose a kernel that keeps all scores [H, T, T].

    Of torch's kernels on CUDA, the memory-efficient one takes no grouped heads (pytorch issue 181528), and flash
    attention takes no mask. Expanded keys and values cost H / G times their memory, which grows with T only.
    """
    if target(query.device).kind != "cuda":
        return True
    runs_flash = choose_kernel(query.device, query.dtype, query.shape[-1]).name == "varlen"
    return runs_flash and not masked and query.shape[-1] == value.shape[-1]


def varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], window: int | None, scale: float
) -> Tensor:
    """Attend by torch's flash kernel over boundaries (torch.nn.attention.varlen); its backward is not deterministic."""
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if query.shape[1] != key.shape[1]:
        if _varlen_takes_grouped_keys():
            options["enable_gqa"] = True
        else:  # torch 2.11
            key, value = expanded(query, key, value)
    # squeeze, not [0]: the backward of an index makes a tensor of zeros.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    boundaries, longest = _boundaries(starts, query.device)
    result: Tensor = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scale,
        # Keys to the left and right of a row; transformers counts the row itself into the window.
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return result[None]


def _varlen_takes_grouped_keys() -> bool:
    """Return False for torch 2.11, whose kernel over boundaries takes no grouped key heads."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _boundaries(starts: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
    """Return the boundaries on a device, and the length of the longest document."""
    boundaries = (starts if isinstance(starts, DocumentStarts) else DocumentStarts(starts)).on(device)
    return boundaries, max(end - start for start, end in pairwise(starts))


class DocumentStarts(list[int]):
    """Boundaries of documents, [0, ...], which are copied to a device once for all layers of a forward."""

    def on(self, device: torch.device) -> Tensor:
        """Return the boundaries on a device, int32."""
        copies: dict[torch.device, Tensor] = vars(self).setdefault("copies", {})
        if device not in copies:
            copies[device] = copied(torch.tensor(self, dtype=torch.int32), device)
        return copies[device]


class Call(NamedTuple):
    """A layer's call of packed attention: its sliding window, and the kernel for documents of the usual length."""

    window: int | None
    kernel: Kernel


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


# transformers' mask registry does not know this name, so the model builds no mask.
ALL_ATTENTION_FUNCTIONS.register(NAME, packed_causal_attention)
