"""Causal attention of packed documents whose scores are soft-capped or compete with sinks.

    score     s = scale q k                           Gemma 2:  s = cap tanh(s / cap)
    weight    exp(s) / (sum exp(s) + exp(sink))       gpt-oss:  each head has a sink, a learned score without a value

Blocks of rows are computed in the forward and again in the backward, so only the inputs are kept. Scores are in
float32 for 16-bit inputs, as in torch's kernels (float64 for float64).

On a GPU, attention with sinks and without a cap is flash attention over boundaries: a sink only adds a term to the
normalizer. Flash attention returns its logarithm, and its backward takes it as an argument:

    flash   lse = log sum exp(s)       out = sum exp(s - lse) v
    sinks   lse' = log(exp(lse) + exp(sink))    out' = exp(lse - lse') out      backward(grad, q, k, v, out', lse')

Shapes: H query heads, G key heads (H = G R), T tokens, D head width (values may have another one), sinks [H].
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_ft.ops.tiled_attention import visible

_ROWS = {"cpu": 64}  # rows of a block: its scores stay in the cache of a CPU
_ROWS_ELSEWHERE = 256


class Scoring(NamedTuple):
    """The function from products of queries and keys to scores, and the rows' limits.

    starts: cumulative document boundaries. window: keys that a row sees, itself included. cap: of the scores.
    """

    starts: tuple[int, ...]
    window: int | None
    scale: float
    cap: float | None


def scored_attention_plain(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: Scoring) -> Tensor:
    """Compute the definition with a dense mask; shapes as in `scored_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * how.scale
    if how.cap is not None:
        scores = how.cap * torch.tanh(scores / how.cap)
    seen = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=query.device)
    for start, end in pairwise(how.starts):
        seen[start:end, start:end] = visible(0, end - start, 0, how.window, query.device)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def scored_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: Scoring) -> Tensor:
    """Attend within documents; query [1, H, T, D], key and value [1, G, T, D], result [1, T, H, D]."""
    result: Tensor = _ScoredAttention.apply(query, key, value, sinks, how)
    return result


class _Block(NamedTuple):
    """Rows [start, end) of one document with the keys [first_key, end) that they may see."""

    start: int
    end: int
    first_key: int


def _blocks(how: Scoring, device: torch.device) -> Iterator[_Block]:
    rows = _ROWS.get(device.type, _ROWS_ELSEWHERE)
    for document, document_end in pairwise(how.starts):
        for start in range(document, document_end, rows):
            first_key = document if how.window is None else max(document, start - how.window + 1)
            yield _Block(start, min(start + rows, document_end), first_key)


class _ScoredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, how: Scoring) -> Tensor:
        ctx.save_for_backward(query, key, value, *([] if sinks is None else [sinks]))
        ctx.how = how
        q, k, v = _by_key_head(query, len(key[0])), key[0], value[0]
        heads = _by_key_head_of_sinks(sinks, q)
        out = query.new_empty(1, *query.shape[1:3], value.shape[-1]).transpose(1, 2).contiguous()
        for block in _blocks(how, query.device):
            weights, _, _ = _weights(q, k, heads, how, block)
            seen = torch.bmm(weights.to(v.dtype), v[:, block.first_key : block.end])
            rows = _by_key_head(out.transpose(1, 2), len(k))[:, block.start : block.end]
            rows.copy_(seen.view(rows.shape))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *rest = ctx.saved_tensors
        how: Scoring = ctx.how
        q, k, v = _by_key_head(query, len(key[0])), key[0], value[0]
        heads = _by_key_head_of_sinks(rest[0] if rest else None, q)
        d_out = _by_key_head(gradients[0].transpose(1, 2), len(k))
        wide = _wide(query.dtype)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        d_heads = None if heads is None else torch.zeros_like(heads)
        for block in _blocks(how, query.device):
            keys = slice(block.first_key, block.end)
            weights, slope, of_sinks = _weights(q, k, heads, how, block)
            d_rows = d_out[:, block.start : block.end].flatten(1, 2)
            d_value[:, keys] += torch.bmm(weights.to(v.dtype).mT, d_rows)
            d_weights = _product(d_rows, v[:, keys].mT)
            mean = (weights * d_weights).sum(-1, keepdim=True)
            if d_heads is not None and of_sinks is not None:
                d_heads -= (of_sinks * mean).view(len(k), -1, q.shape[2]).sum(1)
            d_scores = (d_weights - mean).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = d_scores.mul_(how.scale).to(query.dtype)
            d_key[:, keys] += torch.bmm(d_scores.mT, q[:, block.start : block.end].flatten(1, 2))
            rows = _by_key_head(d_query, len(k))[:, block.start : block.end]
            rows.copy_(torch.bmm(d_scores, k[:, keys]).view(rows.shape))
        d_sinks = None if d_heads is None else d_heads.flatten().to(rest[0].dtype)
        return d_query, d_key[None].to(key.dtype), d_value[None].to(value.dtype), d_sinks, None


def _by_key_head(heads: Tensor, groups: int) -> Tensor:
    """View [1, H, T, D] as [G, T, R, D]."""
    return heads[0].unflatten(0, (groups, -1)).transpose(1, 2)


def _by_key_head_of_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the sinks as [G, R], in the dtype of scores."""
    return None if sinks is None else sinks.detach().to(_wide(q.dtype)).view(q.shape[0], q.shape[2])


def _weights(
    q: Tensor, k: Tensor, sinks: Tensor | None, how: Scoring, block: _Block
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a block's weights [G, rows R, keys], the slope of the cap at its scores, and weights of the sinks."""
    scores = _product(q[:, block.start : block.end].flatten(1, 2), k[:, block.first_key : block.end].mT)
    scores.mul_(how.scale)
    slope = None
    if how.cap is not None:
        scores.div_(how.cap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(how.cap)
    hidden = ~visible(block.start, block.end, block.first_key, how.window, q.device)
    by_row = scores.view(q.shape[0], block.end - block.start, q.shape[2], -1)
    by_row.masked_fill_(hidden[:, None], -math.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1), slope, None
    column = sinks[:, None].expand(by_row.shape[:3]).flatten(1)[..., None]
    normalizer = torch.logaddexp(scores.logsumexp(-1, keepdim=True), column)
    return (scores - normalizer).exp_(), slope, (column - normalizer).exp_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices; the result is in float32 for 16-bit inputs."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def flash_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, boundaries: Tensor, longest: int, how: Scoring
) -> Tensor:
    """Attend by torch's flash kernel over boundaries [documents + 1], int32; shapes as in `scored_attention`."""
    result: Tensor = _FlashWithSinks.apply(query, key, value, sinks, boundaries, longest, how)
    return result


class _FlashWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        boundaries: Tensor,
        longest: int,
        how: Scoring,
    ) -> Tensor:
        import torch.nn.attention.varlen  # registers the operators

        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
        window = [-1 if how.window is None else how.window - 1, 0]
        ctx.lengths, ctx.options = (longest, longest, window == [-1, 0]), (how.scale, window)
        out, normalizer, state = torch.ops.torch_attn._varlen_attn(
            q, k, v, boundaries, boundaries, *ctx.lengths, *ctx.options, q.shape[1] != k.shape[1]
        )
        with_sinks = torch.logaddexp(normalizer, sinks.float()[:, None])  # [H, T]
        out = out * (normalizer - with_sinks).exp().T[..., None].to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks, boundaries, out, with_sinks, state)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, boundaries, out, normalizer, state = ctx.saved_tensors
        d_out = gradients[0].squeeze(0)
        found = torch.ops.torch_attn._varlen_attn_backward(
            d_out, q, k, v, out, normalizer, boundaries, boundaries, *ctx.lengths, state, *ctx.options
        )
        d_sinks = None
        if ctx.needs_input_grad[3]:
            mean = (d_out.float() * out.float()).sum(-1).T  # [H, T]
            d_sinks = -((sinks.float()[:, None] - normalizer).exp() * mean).sum(-1).to(sinks.dtype)
        return *(each.transpose(0, 1)[None] for each in found), d_sinks, None, None, None
