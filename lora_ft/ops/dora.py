"""DoRA (arXiv 2402.09353): a row's direction from W + s B A, its length from a trained magnitude.

    n = |W + s B A| per row           the paper treats it as a constant in the backward
    y = (m / n) (W x + s B A x) + b   the product in parentheses is ops/lora_linear.py

PEFT makes W + s B A to compute n, from a product with a unit matrix of I columns. Here
|W + s B A|^2 = |W|^2 + 2 s (W A' . B) + s^2 (B A A' . B) per row, whose largest new tensor has r columns.

Shapes: O outputs, I inputs, r rank; W [O, I], A [r, I], B [O, r], m and n [O], z and y [.., O].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.lora_linear import product


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return |W + s B A| of each row [O], in the dtype of A and B."""
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=a.dtype).square_()
    of_weight = product(weight, compute_copy(a, weight.dtype).T, a.dtype)  # [O, r]
    return (squares + (b * (2 * scaling * of_weight + scaling**2 * (b @ (a @ a.T)))).sum(dim=1)).clamp_(min=0).sqrt_()


def scaled_rows(z: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """Return (m / n) z + b in the dtype of z; the gradient of `norms` is not computed."""
    result: Tensor = _ScaledRows.apply(z, magnitude, norms, bias)
    return result


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
        gain = magnitude / norms
        ctx.save_for_backward(z, gain, norms)
        # Float32 factors and sums, rounded once to the dtype of z.
        if bias is None:
            return torch.mul(z, gain, out=torch.empty_like(z))
        return torch.addcmul(bias.to(gain.dtype), z, gain, out=torch.empty_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, gain, norms = ctx.saved_tensors
        dy = grads[0]
        dz = dm = None
        if ctx.needs_input_grad[0]:
            dz = torch.mul(dy, gain, out=torch.empty_like(dy))
        if ctx.needs_input_grad[1]:
            dm = (dy.to(norms.dtype) * z).flatten(0, -2).sum(dim=0) / norms
        return dz, dm, None, None
