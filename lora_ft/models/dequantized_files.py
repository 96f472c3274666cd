"""Read the weights of a base whose files are quantized by another method than bitsandbytes, each dequantized on access.

    fp8, mxfp8, fbgemm_fp8   W = codes * scale            of each block of rows and columns, of each row, or of all
    mxfp4                    W = level[code] * 2^(scale - 127)     32 values per scale, two codes in a byte
    gptq                     W = scale * (code - zero)    of each group of inputs, or the group of each input (g_idx)
    awq                      W = scale * (code - zero)    eight codes in a word, in the order of AWQ's kernels

    names and tensors of the files -> names of the 16-bit model, tensors of float32 -> transformers' own loader

Products are computed in float32 and rounded once, to the dtype of the model. The loader takes one tensor at a time, so
the whole model is in memory only in that dtype, or quantized by `quant`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ft.errors import ConfigError
from lora_ft.ops import weights as ops
from lora_ft.ops.expert_codes import MX_BLOCK, mxfp4

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_OF_LAYERS = ("scale", "qscale_weight")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".input_scale_ub", ".input_zero_point", ".output_scale")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the codes of eight neighbouring outputs in a word

Stored = Mapping[str, Any]
"""Slices of safetensors files by name; `slice[...]` reads the tensor."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is computed on access, as `lazy[...]`, like a slice of a safetensors file."""

    make: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index].contiguous()


def open_tensors(folder: Path, files: list[str], settings: Mapping[str, Any], stack: ExitStack) -> dict[str, Any]:
    """Return the tensors of a model by their names in 16 bits, each to be read or dequantized on access.

    `settings` is the quantization_config, which `stored.of` has checked. `stack` keeps the files open. Raises
    ConfigError for tensors that do not belong together.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in files:
        opened = stack.enter_context(safe_open(folder / file, framework="pt"))
        found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
    dequantized = dict(_METHODS[settings["quant_method"]](found, settings))
    if not any(isinstance(tensor, Lazy | Scaled | Experts) for tensor in dequantized.values()):
        raise ConfigError(f"{folder} has no weights quantized by {settings['quant_method']}, as its config.json says")
    return dequantized


@dataclass(frozen=True)
class Scaled:
    """A weight [.., M, N] of 8-bit floats and their scales, both slices of files; `scaled[...]` multiplies them.

    blocks: rows and columns that share a scale.
    """

    codes: Any
    scales: Any
    blocks: tuple[int, int]

    def __getitem__(self, index: Any) -> Tensor:
        return ops.scaled(self.codes[...], self.read_scales(), self.blocks)[index]

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the scales: [.., rows, columns] of blocks."""
        return _grid(self.codes.get_shape(), self.scales.get_shape())

    @property
    def float8(self) -> torch.dtype:
        return FLOAT8[self.codes.get_dtype()]

    def read_codes(self) -> Tensor:
        """Return the codes as bytes."""
        codes: Tensor = self.codes[...]
        return codes.view(torch.uint8)

    def read_scales(self) -> Tensor:
        """Return the scales as a grid in float32; those of one byte are exponents of two."""
        scales: Tensor = self.scales[...]
        values = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
        return values.view(self.grid)


def _grid(codes: list[int], scales: list[int]) -> tuple[int, ...]:
    """Return the shape of the scales as a grid: [1, 1] for a single one, [M, 1] for one per row."""
    if prod(scales) == 1:
        return (1,) * len(codes)
    return (*scales, 1) if len(scales) == len(codes) - 1 else tuple(scales)


def _scaled(found: Stored, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield weights of 8 bits times their scales, and all other weights as they are."""
    used = set()
    for name, values in found.items():
        if values.get_dtype() == "I8":
            raise ConfigError(
                f"{name} has codes of 4 bits, two in a byte, which cannot be read: use the model in 16 bits"
            )
        if values.get_dtype() in FLOAT8:
            # DeepSeek-V4 and Mistral name the scales after the layer.
            ends = (f"{name}_scale_inv", f"{name}_scale", *(name.removesuffix("weight") + end for end in _OF_LAYERS))
            scale = next((end for end in ends if end in found), None)
            if scale is None:
                raise ConfigError(f"{name} has codes of 8 bits and no scales: download the model again")
            used |= {name, scale}
            yield name, Scaled(values, found[scale], _blocks(name, values, found[scale], settings))
    rest = (name for name in found if name not in used and not name.endswith(_ACTIVATIONS))
    yield from ((name, found[name]) for name in rest)


def _blocks(name: str, codes: Any, scales: Any, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    sizes, named = codes.get_shape(), settings.get("weight_block_size") or (None, None)
    counts = _grid(sizes, scales.get_shape())
    found = tuple(map(_block, sizes[-2:], counts[-2:], named))
    if (
        not len(counts) == len(sizes) > 1
        or counts[:-2] not in (tuple(sizes[:-2]), (1,) * len(sizes[:-2]))
        or not all(found)
    ):
        raise ConfigError(f"{name} {tuple(sizes)} and its scales {tuple(scales.get_shape())} do not belong together")
    return found[0], found[1]


def _block(size: int, count: int, named: int | None) -> int:
    """Return how many values share a scale in a dimension: all, one, or as config.json says; 0 if nothing fits.

    Without a size in config.json, the dimension is divided into equal parts.
    """
    if count in (1, size):
        return size // count
    if named:
        return named if count == -(-size // named) else 0
    return 0 if size % count else size // count


@dataclass(frozen=True)
class Experts:
    """A parameter of experts [E, in, out] in MXFP4: slices of blocks [E, out, in / 32, 16] and of exponents."""

    blocks: Any
    exponents: Any

    def __getitem__(self, index: Any) -> Tensor:
        return mxfp4(self.blocks[...], self.exponents[...]).transpose(-2, -1)[index].contiguous()


def _mxfp4(found: Stored, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield experts for blocks and scales, and all other weights as they are."""
    for name, values in found.items():
        short = name.removesuffix("_blocks")
        if short != name and f"{short}_scales" in found:
            exponents = found[f"{short}_scales"]
            if values.get_shape()[:-1] != exponents.get_shape() or values.get_shape()[-1] != MX_BLOCK // 2:
                raise ConfigError(f"{name} and its scales do not belong together: their shapes differ")
            yield short, Experts(values, exponents)
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in found):
            yield name, values


def _gptq(found: Stored, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    offset = 0 if "v2" in str(settings.get("checkpoint_format") or settings.get("format") or "gptq") else 1
    parts = ("qweight", "qzeros", "scales", "g_idx")
    bits = settings["bits"]
    yield from _packed(found, parts, bits, 0, lambda read: gptq(**read, bits=bits, offset=offset))


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, offset: int) -> Tensor:
    """Return W [out, in] of GPTQ's layout: codes packed along the inputs, zeros along the outputs.

    `offset` was subtracted from the zeros when they were stored: 1 in the first version of the format, else 0.
    """
    codes = unpacked(qweight, bits, 0)
    zeros = (unpacked(qzeros, bits, 1) + offset) & (2**bits - 1)
    in_order = torch.arange(len(codes)) // -(-len(codes) // len(scales))
    groups = in_order if g_idx is None else g_idx.long()
    return ((codes - zeros[groups]).float() * scales.float()[groups]).T


def _awq(found: Stored, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _packed(found, ("qweight", "qzeros", "scales"), 4, 1, lambda read: awq(**read))


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Return W [out, in] of AWQ's layout for matrix products: codes and zeros of 4 bits, packed along the outputs."""
    codes, zeros = (
        unpacked(each, 4, 1).unflatten(1, (-1, 8))[..., list(_AWQ_PLACES)].flatten(1) for each in (qweight, qzeros)
    )
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)).float() * scales.float().repeat_interleave(size, 0)).T


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes in words of 32 bits, the lowest bits first, along a dimension of a matrix, which grows."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & (2**bits - 1)
    return codes.flatten(dim, dim + 1)


def _packed(
    found: Stored, parts: tuple[str, ...], bits: int, along: int, make: Callable[[dict[str, Tensor | None]], Tensor]
) -> Iterator[tuple[str, Any]]:
    """Yield a weight for each layer with these parts, and all other weights as they are.

    The codes are packed along the dimension `along` of the first part.
    """
    layers = {name.removesuffix(f".{parts[0]}") for name in found if name.endswith(f".{parts[0]}")}
    for layer in layers:
        if missing := [part for part in parts[:3] if f"{layer}.{part}" not in found]:
            raise ConfigError(f"the weights lack {layer}.{missing[0]}: download the model again")

        _check_packed(layer, [found[f"{layer}.{part}"].get_shape() for part in parts[:3]], along, bits)

        def read(layer: str = layer) -> Tensor:
            return make({p: found[f"{layer}.{p}"][...] if f"{layer}.{p}" in found else None for p in parts})

        yield f"{layer}.weight", Lazy(read)
    own = {f"{layer}.{part}" for layer in layers for part in parts}
    yield from ((name, values) for name, values in found.items() if name not in own)


def _check_packed(layer: str, shapes: list[list[int]], along: int, bits: int) -> None:
    per_word, (words, zeros, scales) = 32 // bits, shapes
    inputs, outputs = (size * (per_word if dim == along else 1) for dim, size in enumerate(words))
    groups = scales[0]
    if scales != [groups, outputs] or zeros != [groups, outputs // per_word] or not groups or inputs % groups:
        raise ConfigError(
            f"{layer}: codes {tuple(words)}, zeros {tuple(zeros)} and scales {tuple(scales)} do not belong together"
        )


_METHODS: dict[str, Callable[[Stored, Mapping[str, Any]], Iterator[tuple[str, Any]]]] = {
    "fp8": _scaled, "mxfp8": _scaled, "fbgemm_fp8": _scaled, "mxfp4": _mxfp4, "gptq": _gptq, "awq": _awq,
}  # fmt: skip
