"""Causal attention of packed documents on a CPU: one autograd function over tiles of a few dozen rows.

    a document of 6 tokens in tiles of 2 rows; x is computed, . masked inside a tile, blank never touched

    x .            The rows of all query heads that share a key head form one matrix, so a tile is one matrix
    x x            product per key head (three times the rate of torch's flash kernel on a CPU). Its scores
    x x x .        stay in the cache and are computed again in the backward. Gradients are written in place;
    x x x x        autograd would add up one tensor of all tokens per document.
    x x x x x .
    x x x x x x    With a sliding window, a tile starts at the first key that its first row sees.

Measured against one call of torch's kernel per document, forward and backward, with 9 query heads over 3 key heads
of width 64 on two cores: 0.75 of its time for documents of 512 tokens, 0.87 to 0.90 for 128 to 300, but 1.1 for 16
to 51, and 1.0 from 768 on (12 over 12 heads: 1.2 at 2,048). `worth_it` follows these figures.

Shapes: H query heads, G key heads (H = G R), T tokens, D head width; fp32 or float64.
"""

import functools
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 48 and 128 rows were slower, 96 rows equally fast.
TILE_ROWS = 64
LONG_DOCUMENT = 1024


class Tile(NamedTuple):
    """Rows [start, end) of one document with the keys [first_key, end) that they may see, except those masked.

    `mask` [end - start, M], 0 or -inf, is added to the scores of the last M keys; all rows see the earlier keys.
    """

    start: int
    end: int
    first_key: int
    mask: Tensor


def worth_it(starts: tuple[int, ...], window: int | None) -> bool:
    """Return True if tiles are faster than one call of torch's kernel per document."""
    longest = max(end - start for start, end in pairwise(starts))
    if window is not None and window < longest:
        return True  # torch's kernel would also compute the scores outside of the window
    return starts[-1] >= TILE_ROWS * (len(starts) - 1) and longest < LONG_DOCUMENT


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """Attend within documents; query [1, H, T, D], key and value [1, G, T, D], result [1, T, H, D]."""
    result: Tensor = _TiledAttention.apply(query, key, value, tiles(starts, window, query.dtype), scale)
    return result


# All layers of a forward, and all that are recomputed in its backward, use the same tiles.
@functools.lru_cache(maxsize=4)
def tiles(starts: tuple[int, ...], window: int | None, dtype: torch.dtype) -> list[Tile]:
    """Divide every document into equal tiles of at most TILE_ROWS rows."""
    found = []
    for document, document_end in pairwise(starts):
        length = document_end - document
        rows = math.ceil(length / max(1, math.ceil(length / TILE_ROWS)))
        for start in range(document, document_end, rows):
            end = min(start + rows, document_end)
            first_key = document if window is None else max(document, start - window + 1)
            # Without a window, only the square on the diagonal is masked.
            masked_from = start if window is None else first_key
            hidden = ~visible(start, end, masked_from, window, torch.device("cpu"))
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            found.append(Tile(start, end, first_key, mask))
    return found


def visible(start: int, end: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys [first_key, end) the rows [start, end) of one document see; bool [rows, keys]."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first_key, end, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: list[Tile], scale: float) -> Tensor:
        # Save the inputs themselves: q, k and v may be parts of one tensor, and a copy would be kept besides it.
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale = plan, scale
        q, k, v, groups = _grouped(query, len(key[0])).mul(scale).contiguous(), key[0], value[0], len(key[0])
        out = query.new_empty(query.transpose(1, 2).shape)
        for tile in plan:
            seen = torch.bmm(_weights(q, k, tile), v[:, tile.first_key : tile.end])
            rows = _grouped(out.transpose(1, 2), groups)[:, tile.start : tile.end]
            rows.copy_(seen.view(rows.shape))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        q, k, v, groups = _grouped(query, len(key[0])).mul(ctx.scale).contiguous(), key[0], value[0], len(key[0])
        d_out = _grouped(gradients[0].transpose(1, 2), groups).contiguous()
        d_query = gradients[0].new_empty(gradients[0].shape).transpose(1, 2)
        d_key, d_value = k.new_zeros(k.shape), v.new_zeros(v.shape)
        for tile in ctx.plan:
            keys = slice(tile.first_key, tile.end)
            weights = _weights(q, k, tile)
            d_rows = d_out[:, tile.start : tile.end].flatten(1, 2)
            d_value[:, keys] += torch.bmm(weights.mT, d_rows)
            d_scores = torch.bmm(d_rows, v[:, keys].mT)
            torch.ops.aten._softmax_backward_data.out(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
            d_key[:, keys] += torch.bmm(d_scores.mT, q[:, tile.start : tile.end].flatten(1, 2))
            rows = _grouped(d_query, groups)[:, tile.start : tile.end]
            rows.copy_(torch.bmm(d_scores, k[:, keys]).view(rows.shape))
        return d_query.mul_(ctx.scale), d_key[None], d_value[None], None, None


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """View [1, H, T, D] as [G, T, R, D]: the query heads of one key head become rows of one matrix."""
    return heads[0].unflatten(0, (groups, -1)).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Return the attention weights [G, rows R, keys] of a tile; q [G, T, R, D] is scaled, k [G, T, D]."""
    scores = torch.bmm(q[:, tile.start : tile.end].flatten(1, 2), k[:, tile.first_key : tile.end].mT)
    by_row = scores.view(q.shape[0], tile.end - tile.start, q.shape[2], -1)
    by_row[..., -tile.mask.shape[1] :].add_(tile.mask[:, None])
    return torch.softmax(scores, dim=-1, out=scores)
