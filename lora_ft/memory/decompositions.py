"""Operators that are traced otherwise than by torch's own function for the meta device.

bitsandbytes computes some by other operators, in Python. As one operation, the tensors in between would not be seen:

    gemm_4bit                 the dequantized weight. On CUDA this holds from a few hundred rows on
    optimizer updates, cpu    gradient, value and state in float32
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS = {
    ("bitsandbytes::gemm_4bit", ""): ("default", "_gemm_4bit_default_impl"),
    ("bitsandbytes::optimizer_update_8bit_blockwise", "cpu"): ("cpu", "_optimizer_update_8bit_blockwise_cpu"),
    ("bitsandbytes::optimizer_update_32bit", "cpu"): ("cpu", "_optimizer_update_32bit_cpu"),
}


def decomposition(func: Any, device: str) -> Callable[..., Any] | None:
    """Return the function that computes an operator on a kind of device by other operators; None for most operators."""
    name = func._schema.name
    found = _FUNCTIONS.get((name, device)) or _FUNCTIONS.get((name, ""))
    if found is None:
        return None
    from bitsandbytes.backends.cpu import ops as cpu
    from bitsandbytes.backends.default import ops as default

    backend, function = found
    return getattr({"cpu": cpu, "default": default}[backend], function, None)


def grouped_mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the result of a product of experts; torch's own meta function (2.13) refuses all dtypes but bfloat16.

    Strides that are aligned in another dtype need not be so in bfloat16.
    """
    rows, matrices = args[:2]
    if rows.dtype is torch.bfloat16 or rows.dim() != 2:
        result: Tensor = func(*args, **kwargs)
        return result
    groups = () if matrices.dim() == 3 else (len(args[2] if len(args) > 2 else kwargs["offs"]),)
    return rows.new_empty((*groups, len(rows), matrices.shape[-1]))
