"""A parameter of experts [E, ..] in 4 or 8 bits: all of it, or the matrices of some, dequantized at each call.

    stored                                                     attributes of the parameter, named as bitsandbytes does
    nf4, fp4  uint8 [values / 2, 1], row by row of the         quant_state: shape, dtype, a scale for each 64 values,
              parameter as the model stores it                 and with quant.double scales of the scales
    int8      int8 [E, ..]                                     SCB: a scale for each output of each expert, times 127;
                                                               compute_dtype

The codes of all experts are what bitsandbytes makes of the whole parameter. Blocks of 64 values do not cross the border
of two experts, so an expert's codes and scales are those of its matrix alone. (The scales of the scales are not: 256
scales share one, and all have one offset.)
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a scale


class ExpertCodes(nn.Parameter):
    """A frozen parameter of codes, with its scales as attributes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertCodes":
        made = memo[id(self)] = expert_codes(self.data.clone())
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def expert_codes(codes: Tensor, **attributes: Any) -> ExpertCodes:
    """Return the parameter of these codes."""
    made: ExpertCodes = torch.Tensor._make_subclass(ExpertCodes, codes, False)
    made.__dict__.update(attributes)
    return made


def is_quantized(parameter: Any) -> bool:
    """Return True for a parameter of codes."""
    return isinstance(parameter, ExpertCodes)


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape of a parameter, which codes had before they were quantized."""
    state = getattr(parameter, "quant_state", None)
    shape: torch.Size = state.shape if state is not None else parameter.shape
    return shape


def dtype_of(codes: Any) -> torch.dtype:
    """Return the dtype of the dequantized values."""
    found: torch.dtype = codes.quant_state.dtype if hasattr(codes, "quant_state") else codes.compute_dtype
    return found


def dequantized_bytes(codes: Any) -> int:
    """Return the size of the dequantized values."""
    shape = codes.quant_state.shape if hasattr(codes, "quant_state") else codes.shape
    return int(shape.numel()) * dtype_of(codes).itemsize


def dequantize(codes: Any) -> Tensor:
    """Return a parameter [E, ..] in the dtype that it was quantized from."""
    if hasattr(codes, "quant_state"):
        whole: Tensor = _functional().dequantize_4bit(codes.data, codes.quant_state)
        return whole
    return _from_int8(codes.data, codes.SCB, codes.compute_dtype)


def dequantize_experts(codes: Any, start: int, stop: int) -> Tensor:
    """Return the matrices of some experts, as the model stores them, with the bits of `dequantize`."""
    if not hasattr(codes, "quant_state"):
        return _from_int8(codes.data[start:stop], codes.SCB[start:stop], codes.compute_dtype)
    state = codes.quant_state
    values = state.shape[1:].numel()
    blocks = values // BLOCK
    part = type(state)(
        absmax=_scales(state, start * blocks, stop * blocks), shape=torch.Size((stop - start, *state.shape[1:])),
        code=state.code, blocksize=state.blocksize, quant_type=state.quant_type, dtype=state.dtype,
    )  # fmt: skip
    packed = codes.data[start * values // 2 : stop * values // 2]
    matrices: Tensor = _functional().dequantize_4bit(packed, part)
    return matrices


def _scales(state: Any, start: int, stop: int) -> Tensor:
    if not state.nested:
        return state.absmax[start:stop]
    inner = state.state2
    first, last = start // inner.blocksize, -(-stop // inner.blocksize)
    part = type(state)(absmax=inner.absmax[first:last], code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype)
    scales: Tensor = _functional().dequantize_blockwise(state.absmax[first * inner.blocksize : stop], part)
    return scales[start - first * inner.blocksize :] + state.offset


def _from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # As for linear layers (ops/weights.py): half precision holds every code, and products are rounded once.
    return codes.to(dtype).mul_(scales.mul(1.0 / 127.0))


def _functional() -> Any:
    return sys.modules["bitsandbytes"].functional
