"""Norms that keep only their input for the backward, and give their output a recipe (ops/recomputable.py).

    y = w * x / rms(x)         autograd keeps x, and the LoRA layers that read y keep y: [T, E] twice.
    r = 1 / rms(x)             Here only x and r [T, 1] are kept: y = w * (x * r) is computed again when needed.
    g = dy * w
    dx = r * g - x * r^3 * mean(g * x)

Shapes: x and y [.., E], weight and bias [E], r [.., 1] in fp32. The weights are frozen.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_ft.ops.recomputable import with_recipe


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm as transformers' LlamaRMSNorm computes it: in fp32 for every dtype, also for float64."""
    return _scaled(x, _reciprocal_rms(x, eps), weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm with a recipe: the same value as `rms_norm_plain` bit for bit, and the same gradient for x.

    Raises ValueError if the weight requires a gradient: use the plain form then.
    """
    if weight.requires_grad:
        raise ValueError("this norm computes no gradient for its weight: use rms_norm_plain for a weight that trains")
    with torch.no_grad():
        reciprocal_rms = _reciprocal_rms(x, eps)
    y: Tensor = _RMSNorm.apply(x, reciprocal_rms, weight)
    return with_recipe(y, _scaled, x, reciprocal_rms, weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm with a recipe; torch's own, which keeps only x, mean and deviation."""
    form = partial(_layer_norm, eps=eps)
    return with_recipe(form(x, weight, bias), form, x, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, reciprocal_rms: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.to(torch.float32) * reciprocal_rms).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reciprocal_rms: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, reciprocal_rms, weight)
        return _scaled(x, reciprocal_rms, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, reciprocal_rms, weight = ctx.saved_tensors
        wide = x.to(torch.float32)
        g = grads[0].to(torch.float32) * weight.to(torch.float32)
        along_x = (g * wide).mean(-1, keepdim=True).mul_(reciprocal_rms.pow(3))
        return g.mul_(reciprocal_rms).addcmul_(wide, along_x, value=-1).to(x.dtype), None, None
