"""Norms that keep only their input for the backward, and give their output a recipe (ops/recomputable.py).

    y = w * x / rms(x)         autograd keeps x, and the LoRA layers that read y keep y: [T, E] twice.
    r = 1 / rms(x)             Here only x and r [T, 1] are kept: y = w * (x * r) is computed again when needed.
    g = dy * w
    dx = r * g - x * r^3 * mean(g * x)

Gemma's norms multiply by 1 + w and cast once, at the end: offset=1.

Shapes: x and y [.., E], weight and bias [E], r [.., 1] in fp32. The weights are frozen.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lora_ft.ops.recomputable import recomputable, with_recipe


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm as transformers' LlamaRMSNorm, or GemmaRMSNorm for offset=1: in fp32 for every dtype, also float64."""
    return _scaled(x, reciprocal_rms(x, eps), weight, offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm with a recipe: the same value as `rms_norm_plain` bit for bit, and the same gradient for x.

    Raises ValueError if the weight requires a gradient: use the plain form then.
    """
    if weight.requires_grad:
        raise ValueError("this norm computes no gradient for its weight: use rms_norm_plain for a weight that trains")
    with torch.no_grad():
        r = reciprocal_rms(x, eps)
    return recomputable(partial(_scaled, offset=offset), partial(rms_norm_gradients, offset=offset), x, r, weight)


def rms_norm_gradients(dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, None, None]:
    """Return the gradient of x, and None for r and the weight; `r` is `reciprocal_rms(x, eps)`."""
    wide = x.to(torch.float32)
    g = dy.to(torch.float32) * _factor(weight.to(torch.float32), offset)
    along_x = (g * wide).mean(-1, keepdim=True).mul_(r.pow(3))
    return g.mul_(r).addcmul_(wide, along_x, value=-1).to(x.dtype), None, None


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / rms(x) [.., 1] in fp32."""
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm with a recipe; torch's own, which keeps only x, mean and deviation."""
    form = partial(_layer_norm, eps=eps)
    return with_recipe(form(x, weight, bias), form, x, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _scaled(x: Tensor, r: Tensor, weight: Tensor, offset: float) -> Tensor:
    normed = x.to(torch.float32) * r
    if offset:
        return (normed * _factor(weight.to(torch.float32), offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def _factor(weight: Tensor, offset: float) -> Tensor:
    return offset + weight if offset else weight
