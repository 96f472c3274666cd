"""A parameter of experts [E, ..] in 4 or 8 bits: all of it, or the matrices of some, dequantized at each call.

    stored                                                     attributes of the parameter, named as bitsandbytes does
    nf4, fp4  uint8 [values / 2, 1], row by row of the         quant_state: shape, dtype, a scale for each 64 values,
              parameter as the model stores it                 and with quant.double scales of the scales
    int8      int8 [E, ..]                                     SCB: a scale for each output of each expert, times 127;
                                                               compute_dtype
    mxfp4     uint8 [E, out, in / 32, 16], for a parameter     exponents: uint8 [E, out, in / 32], a power of two for 32
              [E, in, out]; two codes in a byte                values, plus 127; compute_dtype

The codes of all experts are what bitsandbytes makes of the whole parameter. Blocks of 64 values do not cross the border
of two experts, so an expert's codes and scales are those of its matrix alone. (The scales of the scales are not: 256
scales share one, and all have one offset.)
"""

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a scale
MX_BLOCK = 32  # of MXFP4


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
    if hasattr(parameter, "exponents"):
        experts, outputs, blocks = parameter.exponents.shape
        return torch.Size((experts, blocks * MX_BLOCK, outputs))
    state = getattr(parameter, "quant_state", None)
    shape: torch.Size = state.shape if state is not None else parameter.shape
    return shape


def dtype_of(codes: Any) -> torch.dtype:
    """Return the dtype of the dequantized values."""
    found: torch.dtype = codes.quant_state.dtype if hasattr(codes, "quant_state") else codes.compute_dtype
    return found


def dequantized_bytes(codes: Any) -> int:
    """Return the size of the dequantized values."""
    return shape_of(codes).numel() * dtype_of(codes).itemsize


def dequantize(codes: Any) -> Tensor:
    """Return a parameter [E, ..] in the dtype that it was quantized from."""
    if hasattr(codes, "quant_state"):
        whole: Tensor = _functional().dequantize_4bit(codes.data, codes.quant_state)
        return whole
    return dequantize_experts(codes, 0, len(codes))


def dequantize_experts(codes: Any, start: int, stop: int) -> Tensor:
    """Return the matrices of some experts, as the model stores them, with the bits of `dequantize`."""
    if hasattr(codes, "exponents"):
        some = mxfp4(codes.data[start:stop], codes.exponents[start:stop]).to(codes.compute_dtype)
        return some.transpose(1, 2).contiguous()
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


def mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Return float32 values [.., 32 G] of blocks [.., G, 16] and exponents [.., G]: level[code] * 2^(exponent - 127).

    The lower half of a byte is the first of its two codes. Every value is one of bfloat16, too, unless its exponent is
    at the end of the range.
    """
    pairs = _mx_pairs(blocks.device).index_select(0, blocks.reshape(-1).to(torch.int32))
    values = pairs.view(*exponents.shape, MX_BLOCK)
    return values.mul_((exponents.to(torch.float32) - 127).exp2()[..., None]).flatten(-2)


@functools.cache
def _mx_pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte: [256, 2]."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
    levels, codes = torch.cat((levels, -levels)), torch.arange(256, device=device)
    return torch.stack((levels[codes & 15], levels[codes >> 4]), dim=1)


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
