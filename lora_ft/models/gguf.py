"""Read a GGUF file in one pass: its metadata as plain values, its tensors as views of the mapped file.

    "GGUF" u32 version | u64 tensors | u64 keys | key, type, value ... | name, shape, type, offset ... | padding | data

    read(path).metadata["general.architecture"]      -> "llama"
    read(path).tensors["blk.0.attn_q.weight"].shape  -> (576, 576)

The gguf package's own reader makes an array view of every string: 2 to 4 seconds for a vocabulary of
49,152 tokens, where this takes 0.1. Dequantizing is left to that package. Layout: the GGUF
specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.errors import ConfigError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The types that hold numbers as they are: GGML id -> numpy type, safetensors code. numpy has no
# bfloat16; nothing here computes with it, so its bits travel as integers.
_PLAIN: dict[int, tuple[Any, str]] = {
    0: (np.dtype("<f4"), "F32"),
    1: (np.dtype("<f2"), "F16"),
    30: (np.dtype("<u2"), "BF16"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape in row-major order, its GGML type, and its bytes (a view, uint8)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def code(self) -> str:
        """The safetensors dtype that holds the values of `values()`: quantized types become F32."""
        return _PLAIN[self.kind][1] if self.kind in _PLAIN else "F32"

    def values(self) -> Any:
        """The tensor as an array of float32, float16 or (bfloat16's bits) uint16, without loss.

        Block formats are d * q (+ m) with half-precision d and m: rounding the product to 16 bits
        again would lose up to half of the difference between two levels.
        """
        from gguf.quants import dequantize

        if self.kind in _PLAIN:
            return self.data.view(_PLAIN[self.kind][0]).reshape(self.shape)
        try:
            return dequantize(self.data.reshape(*self.shape[:-1], -1), _ggml_type(self.kind)).reshape(self.shape)
        except NotImplementedError:
            raise ConfigError(f"{self.name} is stored as {_type_name(self.kind)}, which cannot be read") from None


@dataclass(frozen=True)
class Gguf:
    """The contents of a GGUF file; arrays of the metadata are lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: Path) -> Gguf:
    """Parse a GGUF file of version 2 or 3, little-endian; ConfigError where it is not one, or not whole."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        # The map outlives this function through the tensors' views, and closes with the last of them.
        blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(path, blob)
    except (struct.error, UnicodeDecodeError, RecursionError, _Cut) as error:
        raise ConfigError(f"{path} is cut short or damaged: {error}") from None


class _Cut(Exception):
    """The file ends inside a value or a tensor."""


@dataclass
class _Cursor:
    """A position in the file; every method reads one value and moves past it."""

    blob: mmap.mmap
    at: int

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.blob, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        start = self.at + 8
        self.at = start + int(self.scalar("Q"))
        if self.at > len(self.blob):
            raise _Cut(f"a text at byte {start} reaches beyond the end")
        return self.blob[start : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _Cut(f"value type {kind} at byte {self.at} is unknown")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        width = struct.calcsize(_SCALARS[kind])
        if self.at + count * width > len(self.blob):
            raise _Cut(f"an array at byte {self.at} reaches beyond the end")
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.blob, self.at)
        self.at += count * width
        return list(values)


def _parse(path: Path, blob: mmap.mmap) -> Gguf:
    cursor = _Cursor(blob, 4)
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ConfigError(f"{path}: GGUF version must be 2 or 3, little-endian, got {version}")
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    headers = [_tensor_header(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Cut(f"general.alignment is {alignment}")
    data = np.frombuffer(blob, np.uint8)[-(-cursor.at // alignment) * alignment :]
    return Gguf(path, metadata, {header[0]: _view(data, *header) for header in headers})


def _tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    reversed_shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
    return name, tuple(reversed_shape[::-1]), cursor.scalar("I"), cursor.scalar("Q")


def _view(data: np.ndarray[Any, np.dtype[np.uint8]], name: str, shape: tuple[int, ...], kind: int, at: int) -> Stored:
    from gguf.constants import GGML_QUANT_SIZES

    if kind not in GGML_QUANT_SIZES:
        raise ConfigError(f"{name} is stored as {_type_name(kind)}, which cannot be read")
    elements, num_bytes = GGML_QUANT_SIZES[_ggml_type(kind)]
    size = prod(shape) // elements * num_bytes
    if not shape or shape[-1] % elements or at + size > len(data):
        raise _Cut(f"{name} {shape} reaches beyond the end, or does not fill its blocks")
    return Stored(name, shape, kind, data[at : at + size])


def _ggml_type(kind: int) -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind)


def _type_name(kind: int) -> str:
    try:
        return str(_ggml_type(kind).name)
    except ValueError:
        return f"GGML type {kind}"
