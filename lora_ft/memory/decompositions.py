"""Operators of bitsandbytes that its own Python code computes by other operators.

Traced as one operation, the tensors that they make for themselves would not be seen:

    gemm_4bit                 the dequantized weight. On CUDA this holds from a few hundred rows on
    optimizer updates, cpu    gradient, value and state in float32
"""

import importlib
from collections.abc import Callable
from typing import Any

_FUNCTIONS = {
    ("bitsandbytes::gemm_4bit", ""): ("default", "_gemm_4bit_default_impl"),
    ("bitsandbytes::optimizer_update_8bit_blockwise", "cpu"): ("cpu", "_optimizer_update_8bit_blockwise_cpu"),
    ("bitsandbytes::optimizer_update_32bit", "cpu"): ("cpu", "_optimizer_update_32bit_cpu"),
}


def decomposition(func: Any, device: str) -> Callable[..., Any] | None:
    """Return the function that computes an operator on a kind of device by other operators, None if there is none."""
    name = func._schema.name
    found = _FUNCTIONS.get((name, device)) or _FUNCTIONS.get((name, ""))
    if found is None:
        return None
    backend, function = found
    module = importlib.import_module(f"bitsandbytes.backends.{backend}.ops")
    return getattr(module, function, None)
