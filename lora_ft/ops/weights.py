"""The weight W [out, in] of a frozen layer in any storage format, dequantized again at each call.

    stored as                      a call returns           per call, 1536 x 576
    float32                        W itself                 nothing
    bfloat16, computes in float32  its exact upcast         0.04 ms
    int8, a scale per row          codes * scale / 127      0.07 ms
    nf4, fp4, a scale per 64       level[code] * scale      0.08 ms; 0.11 ms with quantized scales
    fp8, a scale per block         code * scale             2 ms, on one core

The layer's product over 1,345 tokens takes 13 ms on the same machine (two cores with AVX-512), so own kernels or
stored scales would gain little. Dequantization is bitsandbytes' own, with the same bits.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_ft.ops.device import target
from lora_ft.ops.expert_codes import dequantize_experts, is_quantized


@dataclass(frozen=True)
class FrozenWeight:
    """A function that returns W [out, in].

    fresh: every call returns a new tensor, which the caller may modify; otherwise it is the stored weight.
    """

    make: Callable[[], Tensor]
    fresh: bool

    def __call__(self) -> Tensor:
        return self.make()


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> FrozenWeight | None:
    """Return the weight by which `layer` multiplies an input of `dtype`, or None (see `why_no_weight`).

    Every call of the result reads the layer again.
    """
    if why_no_weight(layer, dtype):
        return None
    module: Any = layer
    if isinstance(module, ScaledLinear):
        return FrozenWeight(
            lambda: scaled(module.codes.view(module.float8), module.scales, module.blocks).to(dtype), fresh=True
        )
    name = _bitsandbytes_class(module)
    if name == "Linear4bit":
        dequantize = sys.modules["bitsandbytes"].functional.dequantize_4bit
        return FrozenWeight(lambda: dequantize(module.weight.data, module.weight.quant_state), fresh=True)
    if name == "Linear8bitLt":
        return FrozenWeight(lambda: _from_int8(module, dtype), fresh=True)
    is_fresh = module.weight.dtype != dtype
    if isinstance(module, Conv1D):
        return FrozenWeight(lambda: module.weight.detach().to(dtype).T, is_fresh)
    return FrozenWeight(lambda: module.weight.detach().to(dtype), is_fresh)


def expert_weights(module: nn.Module, name: str, start: int, stop: int) -> Tensor:
    """Return the weights W [.., out, in] of some experts of the parameter `name` [E, ..] of a module of experts.

    Quantized ones are dequantized, in the dtype of the parameter before quantization; others are the stored weights.
    """
    holder: Any = module
    parameter = holder._parameters[name]
    stored = (
        parameter.detach()[start:stop] if not is_quantized(parameter) else dequantize_experts(parameter, start, stop)
    )
    return stored.mT if holder.is_transposed else stored


def why_no_weight(layer: nn.Module, dtype: torch.dtype) -> str:
    """Return why `frozen_weight` returns None, such as "the base computes in bfloat16"; "" if it returns a weight."""
    module: Any = layer
    if isinstance(module, ScaledLinear):  # to ask for its weight would make it
        return "" if module.compute_dtype == dtype else f"the base computes in {_short(module.compute_dtype)}"
    name = _bitsandbytes_class(module)
    if not name and type(module) not in (nn.Linear, Conv1D):
        return f"the base layer is of type {type(module).__name__}"
    if name and not _is_quantized(module):
        return "the base layer is not quantized yet"
    compute = getattr(module, "compute_dtype", module.weight.dtype)
    if compute != dtype:
        return f"the base computes in {_short(compute)}"
    if name == "Linear4bit" and module.weight.quant_state.dtype != dtype:
        return "the base was quantized from another dtype"
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_4bit(layer: nn.Module) -> bool:
    """Return True for a layer with 4-bit weights."""
    return _bitsandbytes_class(layer) == "Linear4bit"


def _bitsandbytes_class(layer: Any) -> str:
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # if it is not imported, none of its layers exist
    names = ("Linear4bit", "Linear8bitLt") if bitsandbytes else ()
    return next((name for name in names if isinstance(layer, getattr(bitsandbytes.nn, name))), "")


def _is_quantized(layer: Any) -> bool:
    return layer.weight.dtype == torch.int8 or getattr(layer.weight, "quant_state", None) is not None


def _from_int8(layer: Any, dtype: torch.dtype) -> Tensor:
    """Dequantize an int8 weight with the same bits as bitsandbytes' CPU training forward.

    Half precision holds every code exactly; the products with the float32 scales are rounded once.
    """
    scales: Tensor = layer.weight.SCB
    return layer.weight.detach().to(dtype).mul_(scales[:, None].mul(1.0 / 127.0))


class ScaledLinear(nn.Linear):
    """A frozen linear layer whose weight [out, in] is stored as 8-bit floats and scales; see `scaled`.

    `weight` is made at each access, in `compute_dtype`, so code that reads it gets the layer's numbers. The codes are
    stored as bytes, which no cast of the model's dtype changes. blocks: rows and columns that share a scale.
    """

    def __init__(self, like: nn.Linear, float8: torch.dtype, scales: tuple[int, ...], blocks: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.float8, self.blocks, self.compute_dtype = float8, blocks, like.weight.dtype
        device = like.weight.device
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device=device))
        self.register_parameter("bias", like.bias)

    @property
    def weight(self) -> Tensor:
        return self._frozen()()

    def forward(self, input: Tensor) -> Tensor:
        return frozen_linear(input, self._frozen(), self.bias)

    def _frozen(self) -> FrozenWeight:
        weight = frozen_weight(self, self.compute_dtype)
        assert weight is not None  # frozen_weight returns None only for another dtype than compute_dtype
        return weight


def scaled(codes: Tensor, scales: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return 8-bit floats [.., M, N] times their scales, in float32: a grid, of which each scale covers a block.

    The last block of a dimension may be smaller. `blocks` has the size of the dimension where one scale is for all.
    """
    values = float8_values(codes)
    for dim, block in zip((-2, -1), blocks, strict=True):
        if scales.shape[dim] != 1 and block != 1:
            scales = scales.repeat_interleave(block, dim).narrow(dim, 0, values.shape[dim])
    return values.mul_(scales)


def float8_values(codes: Tensor) -> Tensor:
    """Return 8-bit floats in float32. On a CPU, a look-up among 256 values is five times as fast as torch's cast."""
    if target(codes.device).kind != "cpu":
        return codes.to(torch.float32)
    index = codes.reshape(-1).view(torch.uint8).to(torch.int32)
    return _all_values(codes.dtype, codes.device).index_select(0, index).view(codes.shape)


@functools.cache
def _all_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).to(torch.float32)


def frozen_linear(inputs: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Return linear(inputs, weight(), bias) with the same bits; autograd keeps neither the inputs nor the weight.

    The backward calls `weight` again. inputs [.., in] are cast to the weight's dtype, and the result [.., out] is cast
    back. Weight and bias get no gradient.
    """
    rows: Tensor = _FrozenLinear.apply(inputs, weight, bias)
    # A view made here, and not in the function, can be changed in place, as Llama 4 does.
    return rows.view(*inputs.shape[:-1], rows.shape[-1])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, inputs.shape
        w = weight()
        rows = inputs.reshape(-1, inputs.shape[-1]).to(w.dtype)
        y = linear(rows, w, None if bias is None else bias.to(w.dtype))
        return y.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        w = ctx.weight()
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        return (dy.to(w.dtype) @ w).to(dy.dtype).view(ctx.shape), None, None
