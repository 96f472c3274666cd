"""Implementations of norm, SwiGLU and RoPE: our functions, their definitions compiled by torch, or Liger's kernels.

    fast.compile=true    torch.compile of the plain definitions in ops/norm, ops/mlp and ops/rope, with their backward
    fast.liger=true      Triton kernels of the package liger-kernel (BSD-2)
    neither              the functions of those modules, a few kernels each

These three functions are compiled, not whole layers: a layer with LoRA, packed documents and replaced forwards breaks
into 29 graphs, is compiled again for each set of document boundaries, and reaches torch's limit of eight (torch 2.13).
Each function here is one graph for any number of tokens.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ft.errors import ConfigError
from lora_ft.ops.mlp import swiglu, swiglu_plain
from lora_ft.ops.norm import rms_norm, rms_norm_plain
from lora_ft.ops.rope import rotate, rotate_plain


class Kernels(NamedTuple):
    """Functions of a block: rms_norm(x, weight, eps), swiglu(gate, up), rotate(q, k, cos, sin) -> (q, k)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


OWN = Kernels(rms_norm, swiglu, _rotate_both)


def choose_kernels(device: torch.device, *, compile_: bool, liger: bool) -> Kernels:
    """Return the kernels that `fast.compile` or `fast.liger` select; our own if neither is set.

    Raises ConfigError if both are set, if the device is not a CUDA device, or if Liger is not installed.
    """
    if not (compile_ or liger):
        return OWN
    if compile_ and liger:
        raise ConfigError("fast.compile and fast.liger replace the same blocks: set only one of them")
    if device.type != "cuda":
        name = "fast.compile" if compile_ else "fast.liger"
        raise ConfigError(f"{name}=true needs a CUDA device, but this run uses {device.type}: set {name}=false")
    if compile_:
        return compiled_kernels()
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("fast.liger=true needs the package liger-kernel: pip install liger-kernel")
    return liger_kernels()


@functools.cache
def compiled_kernels(backend: str = "inductor") -> Kernels:
    """Compile the plain definitions, each for any number of tokens; results are equal up to rounding."""

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin)

    compiled = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
    return Kernels(compiled(rms_norm_plain), compiled(swiglu_plain), compiled(rotate_both))


def liger_kernels() -> Kernels:
    """Return Liger's autograd functions (liger-kernel 0.8.5), in Llama's casting mode, as transformers computes.

    Its SwiGLU writes the gradients over its saved gate and up, so a graph allows one backward, enough for training.
    """
    functions: Any = importlib.import_module("liger_kernel.ops")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The last argument is in_place: it would write the gradient of x over that of y, which is used elsewhere.
        return functions.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel overwrites its input. Nothing else reads q and k, the results of projections or norms.
        return functions.LigerRopeFunction.apply(q, k, cos, sin)

    return Kernels(rms_norm, functions.LigerSiLUMulFunction.apply, rotate_both)
