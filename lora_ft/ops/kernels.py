"""Implementations of norm, gated activation and RoPE: Liger's kernels, definitions compiled by torch, or our functions.

    fast.kernels=liger     Triton kernels of the package liger-kernel (BSD-2): one launch each
    fast.kernels=compile   torch.compile of the definitions in ops/norm, ops/mlp and ops/rope, and of their gradients
    fast.kernels=eager     the functions of those modules, a few launches each
    fast.kernels=auto      the first of them that this machine has; on a CPU always eager

Whatever makes them, the output of a norm and the product of a gated activation have a recipe (ops/recomputable.py),
which calls the same kernel again on the same inputs and so gives the same bits.

These functions are compiled, not whole layers: a layer with LoRA, packed documents and replaced forwards breaks
into 29 graphs, is compiled again for each set of document boundaries, and reaches torch's limit of eight (torch 2.13).
Each function here is one graph for any number of tokens, and another one for each rank and dtype.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ft.errors import ConfigError
from lora_ft.ops import meta_kernels
from lora_ft.ops.mlp import activation_gradient, gated, gated_plain, overwritable
from lora_ft.ops.norm import reciprocal_rms, rms_norm, rms_norm_gradients, rms_norm_plain
from lora_ft.ops.recomputable import recomputable, with_recipe
from lora_ft.ops.rope import rotate, rotate_plain
from lora_ft.values import BlockKernels


class Kernels(NamedTuple):
    """Functions of a block, and their name for the log.

    rms_norm(x, weight, eps, offset)    gated(gate, up, activation)    rotate(q, k, cos, sin) -> (q, k)
    """

    rms_norm: Callable[[Tensor, Tensor, float, float], Tensor]
    gated: Callable[[Tensor, Tensor, str], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    name: str


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


OWN = Kernels(rms_norm, gated, _rotate_both, "eager")


TRACED = Kernels(meta_kernels.rms_norm, meta_kernels.gated, meta_kernels.rotate, "one launch each")


def _or_stand_ins(rms_norm: Any, gated: Any, rotate: Any, name: str) -> Kernels:
    """Return kernels that at each call are replaced by stand-ins if the tensors have no values, as in a trace."""

    def either(stand_in: Any, kernel: Any) -> Any:
        return lambda x, *more: (stand_in if x.is_meta else kernel)(x, *more)

    return Kernels(either(TRACED.rms_norm, rms_norm), either(TRACED.gated, gated), either(TRACED.rotate, rotate), name)


def choose_kernels(device: torch.device, choice: BlockKernels) -> Kernels:
    """Return the kernels that `fast.kernels` selects; `auto` takes what a CUDA device and the installed packages allow.

    Raises ConfigError for `liger` or `compile` if the device is not a CUDA device or a package is missing.
    """
    if choice is BlockKernels.eager or (choice is BlockKernels.auto and device.type != "cuda"):
        return OWN
    setting = f"fast.kernels={choice.value}"
    if device.type != "cuda":
        raise ConfigError(f"{setting} needs a CUDA device, but this run uses {device.type}: set fast.kernels=auto")
    missing = {name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None}
    if choice is not BlockKernels.compile and not missing:
        return liger_kernels()
    if choice is BlockKernels.liger:
        raise ConfigError(f"{setting} needs the package liger-kernel: pip install 'lora_ft[cuda]'")
    if "triton" not in missing:
        return compiled_kernels()
    if choice is BlockKernels.compile:
        raise ConfigError(f"{setting} needs the package triton, which torch for CUDA comes with: pip install triton")
    return OWN


@functools.cache
def compiled_kernels(backend: Any = "inductor") -> Kernels:
    """Compile the plain definitions and their gradients, each for any number of tokens; equal up to rounding."""
    # torch compiles once more for another rank or dtype, and by default only eight times in a process.
    options = {"isolate_recompiles": True, "recompile_limit": 64}
    known = {name: value for name, value in options.items() if name in inspect.signature(torch.compile).parameters}
    differentiable = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend=backend, **known)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        call = differentiable(function)
        # Whether a tensor requires a gradient or is a parameter would be a reason to compile again.
        return lambda *tensors: call(*(tensor.detach() for tensor in tensors))

    @functools.cache
    def norm_pair(eps: float, offset: float) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return rms_norm_plain(x, weight, eps, offset)

        def gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, None]:
            return rms_norm_gradients(dy, x, reciprocal_rms(x, eps), weight, offset)[0], None

        return compiled(norm), compiled(gradients)

    @functools.cache
    def gated_pair(activation: str) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
        def product(gate: Tensor, up: Tensor) -> Tensor:
            return gated_plain(gate, up, activation)

        def gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
            return activation_gradient(dy * up, gate, activation), gated_plain(gate, dy, activation)

        return compiled(product), compiled(gradients)

    @differentiable
    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_plain(q, cos, sin), rotate_plain(k, cos, sin)

    return _or_stand_ins(
        lambda x, weight, eps, offset: recomputable(*norm_pair(eps, offset), x, weight),
        lambda gate, up, activation: recomputable(*gated_pair(activation), gate, up),
        rotate_both,
        "torch.compile",
    )


def liger_kernels() -> Kernels:
    """Return Liger's functions (liger-kernel 0.8.5), with the casts of transformers' Llama, or Gemma for an offset.

    The gradients of gate and up are written over gate and up, which saves two tensors [T, F]; a second backward over
    the same graph is an error of autograd. Their version counters are raised here, since the kernels do not.
    """
    ops: Any = importlib.import_module("liger_kernel.ops")
    pairs = {"silu": (ops.swiglu_forward, ops.swiglu_backward), "gelu_tanh": (ops.geglu_forward, ops.geglu_backward)}

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        # The last argument is in_place: it would write the gradient of x over that of y, which is used elsewhere.
        casts = "gemma" if offset else "llama"
        form = functools.partial(_applied, ops.LigerRMSNormFunction, (eps, offset, casts, False))
        return with_recipe(form(x, weight), form, x, weight)

    def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        if activation not in pairs:
            return gated(gate, up, activation)
        forward, backward = pairs[activation]

        def product(gate: Tensor, up: Tensor) -> Tensor:
            return forward(gate.contiguous(), up.contiguous())[2]

        def gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
            gate, up = overwritable(gate), overwritable(up)
            found: tuple[Tensor, Tensor] = backward(gate.contiguous(), up.contiguous(), dy.contiguous())
            torch.autograd.graph.increment_version((gate, up))
            return found

        return recomputable(product, gradients, gate, up)

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel overwrites its input. Nothing else reads q and k, the results of projections or norms.
        return ops.LigerRopeFunction.apply(q, k, cos, sin)

    return _or_stand_ins(norm, gated_product, rotate_both, "liger-kernel")


def _applied(function: Any, options: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    return function.apply(x, weight, *options)
