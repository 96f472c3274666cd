"""Compare a fast function with its plain twin: errors of both against the plain one in float32.

    error(fast, bf16) <= 2 error(plain, bf16) + floor        for the value and the gradient of every input

Errors are relative: the norm of the difference over the norm of the exact tensor. Twice what the dtype costs the plain
form is allowed, and the floor, which stands for sums in another order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}

Function = Callable[..., Tensor]


def compare(fast: Function, plain: Function, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Compare functions of tensors of one dtype; the gradient is that of a random weighting of the result."""
    dtype = inputs[0].dtype
    exact = values(plain, [tensor.float() for tensor in inputs])
    return judge(values(fast, inputs), values(plain, inputs), exact, FLOOR[dtype])


def values(function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return value and gradients of a function, in float32."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    # Kernels may write over what they are given, but not over a leaf.
    result = function(*(leaf.clone() for leaf in leaves))
    result.backward(weighting(result))
    gradients = {f"gradient {n}": leaf.grad.float() for n, leaf in enumerate(leaves) if leaf.grad is not None}
    return {"value": result.detach().float(), **gradients}


def weighting(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(result.shape, generator=generator).to(result.device, result.dtype)


def judge(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], floor: float) -> dict[str, Any]:
    """Return the errors of the tensor that is closest to its bound, or beyond it: then `failed` is set."""
    worst: dict[str, Any] = {}
    for name, reference in exact.items():
        norm = float(reference.norm()) or 1.0
        if name not in found:
            return {"failed": f"{name} is missing"}
        error, twin = (float((tensor[name] - reference).norm()) / norm for tensor in (found, plain))
        ratio = error / (2 * twin + floor) if math.isfinite(error) else math.inf
        if not worst or ratio > worst["of_bound"]:
            worst = {"error": error, "plain_error": twin, "of_bound": ratio, "at": name}
    if not worst["of_bound"] < 1:
        failed = f"{worst['at']}: relative error {worst['error']:.1e}, plain form {worst['plain_error']:.1e}"
        # JSON has no infinity and no NaN.
        return {"error": str(worst["error"]), "plain_error": str(worst["plain_error"]), "failed": failed}
    return worst
