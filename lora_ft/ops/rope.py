"""Rotary position embedding in half the passes over memory: no rotated copy, no zero-padded gradients of its halves.

    x = (a, b), each D/2 wide        y = (a c1 - b s1, b c2 + a s2)        dx = (da c1 + db s2, db c2 - da s1)

transformers writes y as x * cos + cat(-b, a) * sin. The same products are added here, with the same bits.
cos and sin come from the model's own rotary embedding, so positions that restart within a pack are respected.

Shapes: x [B, H, T, D]; cos and sin [B, T, R] with R <= D. Columns from R on are not rotated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q or k as transformers' apply_rotary_pos_emb does: the definition."""
    cos, sin = cos[:, None], sin[:, None]
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-b, a), dim=-1) * sin, still), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate q or k: the same value as `rotate_plain` bit for bit, and the same gradient for x. All of one dtype."""
    y: Tensor = _Rotate.apply(x, cos[:, None], sin[:, None])
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin.roll(sin.shape[-1] // 2, dims=-1), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, crossing: Tensor, sign: int) -> Tensor:
    """Return (a, b) * cos + sign * (-b', a'), where (a', b') = (a, b) * crossing."""
    width, half = cos.shape[-1], cos.shape[-1] // 2
    y = torch.empty_like(x)  # with the strides of x: heads stay interleaved with tokens
    turning = torch.mul(x[..., :width], cos, out=y[..., :width])
    crossed = x[..., :width] * crossing
    turning[..., :half].sub_(crossed[..., half:], alpha=sign)
    turning[..., half:].add_(crossed[..., :half], alpha=sign)
    y[..., width:] = x[..., width:]
    return y
