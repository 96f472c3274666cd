"""Stand-ins for Liger's and compiled kernels on tensors without values, which neither can run on.

A trace (memory/trace.py) counts launches and bytes. Each stand-in makes one launch in the forward and one in the
backward, and allocates, keeps and overwrites the same tensors as Liger's kernel; its values mean nothing.
"""

from typing import Any

import torch
from torch import Tensor

from lora_ft.ops.recomputable import recomputable


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Return a tensor of x's shape with a recipe; keeps x."""
    return recomputable(torch.mul, lambda dy, x, weight: (torch.mul(dy, x), None), x, weight)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return a tensor of gate's shape with a recipe; keeps gate and up, and overwrites them in the backward."""
    return recomputable(torch.mul, _gated_gradients, gate, up)


def _gated_gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    overwritten = [gate.detach(), up.detach()]
    torch._foreach_mul_(overwritten, [dy, dy])
    return overwritten[0], overwritten[1]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite q and k, and their gradients in the backward; keep cos and sin."""
    result: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin)
    return result


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        torch._foreach_mul_([q, k], 1)
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = grads
        torch._foreach_mul_([dq, dk], 1)
        return dq, dk, None, None
