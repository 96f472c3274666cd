"""Causal attention over packed documents: no token sees another document, and no mask is built.

    tokens     the cat sat | hello you | one
    starts   [ 0             3           5     6 ]     (cumulative, as flash attention's cu_seqlens)

    the  x                     each document is one causal call; the plain twin is transformers'
    cat  x x                   own `sdpa`, which derives a dense tokens-by-tokens mask from the
    sat  x x x                 position ids: the same numbers, with all the empty blocks computed
    hel        x               and grouped key heads repeated
    you        x x
    one            x

Shapes: B batch (always 1 when packed), H query heads, G key heads (H is a multiple of G), T tokens, D head width.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lora_ft_packed"
PLAIN = "sdpa"

# Keyword arguments of some architectures that change what attention computes; none may be dropped silently.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


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
    AttentionInterface. Raises ValueError without it: generation with a key cache needs a mask that
    this name suppresses (see `plain_attention`); and for arguments that would otherwise be ignored.
    """
    if document_starts is None:
        raise ValueError("packed attention needs document_starts: call the model through token_loss_sum")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not know {name}: use fast=off for this architecture")
    outputs = []
    for start, end in pairwise(document_starts):
        length = end - start
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = _band(length, sliding_window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _band(length: int, width: int, device: torch.device) -> Tensor:
    """The causal mask of a sliding window: position i sees the `width` positions up to itself."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < width)


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend as transformers does, for generation, and give it back as it was."""
    before = model.config._attn_implementation
    if before != NAME:
        yield
        return
    model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# Under a name that transformers' mask registry does not know, the model builds no mask at all.
ALL_ATTENTION_FUNCTIONS.register(NAME, packed_causal_attention)
