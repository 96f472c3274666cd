"""What norm, SwiGLU and RoPE compute with: our functions, torch's compilation of their definitions, or Liger's.

    fast.compile=true    torch.compile of the plain twins in ops/norm, ops/mlp and ops/rope, backward included
    fast.liger=true      Triton kernels of the package liger-kernel (BSD-2)
    neither              the functions of those modules, a few kernels each

Compiled are these three regions and no whole layer: a layer with LoRA, packed documents and replaced
forwards falls into 29 graphs, is compiled again for other boundaries and gives up at torch's limit of eight
(torch 2.13). Each region here is one graph for every number of tokens.
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
    """What a block computes with: rms_norm(x, weight, eps), swiglu(gate, up), rotate(q, k, cos, sin) -> (q, k)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


OWN = Kernels(rms_norm, swiglu, _rotate_both)


def choose_kernels(device: torch.device, *, compile_: bool, liger: bool) -> Kernels:
    """The kernels that `fast.compile` or `fast.liger` ask for; ours where neither does.

    Raises ConfigError where both are set, on a device that is no CUDA device, and where Liger is not installed.
    """
    if not (compile_ or liger):
        return OWN
    if compile_ and liger:
        raise ConfigError("fast.compile and fast.liger give the same blocks other kernels: set one of them")
    if device.type != "cuda":
        name = "fast.compile" if compile_ else "fast.liger"
        raise ConfigError(f"{name}=true needs a CUDA device, this run is on {device.type}")
    if compile_:
        return compiled_kernels()
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("fast.liger=true needs Liger's kernels: pip install liger-kernel")
    return liger_kernels()


@functools.cache
def compiled_kernels(backend: str = "inductor") -> Kernels:
    """The plain definitions compiled, each for any number of tokens; equal to them up to rounding."""

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin)

    compiled = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
    return Kernels(compiled(rms_norm_plain), compiled(swiglu_plain), compiled(rotate_both))


def liger_kernels() -> Kernels:
    """Liger's autograd functions (liger-kernel 0.8.5); they compute in the Llama casting mode, as transformers does.

    Its SwiGLU writes gradients over the gate and up that it kept: a graph has one backward, as training needs.
    """
    functions: Any = importlib.import_module("liger_kernel.ops")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The last argument is in_place: it would write the gradient of x over that of y, which others may hold.
        return functions.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel writes over its input: q and k are results of projections, or norms, that nothing else reads.
        return functions.LigerRopeFunction.apply(q, k, cos, sin)

    return Kernels(rms_norm, functions.LigerSiLUMulFunction.apply, rotate_both)
