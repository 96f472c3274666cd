"""Tiny models whose files are quantized as published ones are, packed here by the definitions of the formats.

exact = rewrite(folder, {"quant_method": "fp8"}, lambda name, tensor: fp8(tensor, 128, 128) if "proj" in name else None)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors by the end of their name, and the weight that they stand for in float64."""

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def fp8(weight: Tensor, rows: int, columns: int, scale: str = ".weight_scale_inv") -> Packed:
    """Pack a matrix in blocks, of which the last ones may be smaller."""
    height, width = weight.shape
    grid = (-(-height // rows), -(-width // columns))
    scales = torch.empty(grid)
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    exact = torch.empty_like(weight, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[block] = codes[block].double() * scales[i, j].double()
    return {".weight": codes, scale: scales}, exact


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack codes into words of 32 bits along a dimension, the first into the lowest bits."""
    words = codes.long().unflatten(dim, (-1, 32 // bits)).movedim(dim + 1, -1)
    packed = sum(words[..., place] << (bits * place) for place in range(32 // bits))
    return packed.to(torch.uint32).view(torch.int32)


def gptq(weight: Tensor, bits: int, group: int, offset: int, ordered: bool) -> Packed:
    """Pack a matrix [out, in] with a group of inputs chosen for each of them, unless `ordered`."""
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // group
    if not ordered:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    most = 2**bits - 1
    scales, zeros = (torch.empty(inputs // group, len(weight)) for _ in range(2))
    for g in range(len(scales)):
        part = weight.T[groups == g]
        scales[g] = ((part.amax(0) - part.amin(0)) / most).half().float()
        zeros[g] = (-part.amin(0) / scales[g]).round().clamp(0, most)
    codes = (weight.T / scales[groups] + zeros[groups]).round().clamp(0, most)
    exact = (codes.double() - zeros[groups].double()) * scales[groups].double()
    stored = (zeros.long() - offset) & most
    parts = {".qweight": pack(codes, bits, 0), ".qzeros": pack(stored, bits, 1), ".scales": scales.half()}
    return parts | {".g_idx": groups.int()}, exact.T


def awq(weight: Tensor, group: int) -> Packed:
    """Pack a matrix [out, in]; eight neighbouring outputs are in a word in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    parts, exact = gptq(weight, 4, group, 0, ordered=True)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def reordered(words: Tensor, dim: int) -> Tensor:
        codes = torch.stack([(words.long() >> (4 * place)) & 15 for place in range(8)], dim=dim + 1).flatten(
            dim, dim + 1
        )
        return pack(codes.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1)

    words = {".qweight": reordered(parts[".qweight"], 0), ".qzeros": reordered(parts[".qzeros"], 1)}
    return words | {".scales": parts[".scales"]}, exact


def mxfp4(weight: Tensor) -> Packed:
    """Pack experts [E, in, out] in blocks of 32 inputs, each with a power of two as its scale."""
    blocks = weight.transpose(1, 2).double().unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = blocks / 2 ** exponents[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1)
    exact = (FP4[codes] * 2 ** exponents[..., None]).flatten(-2).transpose(1, 2)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {"_blocks": packed, "_scales": (exponents + 127).to(torch.uint8)}, exact


def rewrite(
    folder: Path, settings: dict[str, Any], packed: Callable[[str, Tensor], Packed | None]
) -> dict[str, Tensor]:
    """Pack the tensors of a model for which `packed` returns parts; return what each tensor is exactly, by its name."""
    tensors, exact = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = packed(name, tensor.float())
        if found is None:
            tensors[name] = exact[name] = tensor
            continue
        parts, exact[name] = found
        tensors |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return exact
