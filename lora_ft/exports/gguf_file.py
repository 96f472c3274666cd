"""Write a GGUF file, one tensor in memory at a time; what `models/gguf.py` reads.

    "GGUF" u32 version | u64 tensors | u64 keys | key, type, value ... | name, shape, type, offset ... | padding | data

    write(path, {"general.architecture": "llama", ...}, [Planned("output_norm.weight", (64,), Kind.F32)], arrays)

The type of a value follows from Python's: text, bool, int (uint32), float (float32), and lists of text or of int
(int32), which are all that llama.cpp asks for. Numbers become blocks by the gguf package. Layout: the GGUF
specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize

from lora_ft.errors import ConfigError
from lora_ft.io import durable

__all__ = ["Kind", "Planned", "Value", "write"]

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9

Value = str | bool | int | float | list[str] | list[int]


class Planned(NamedTuple):
    """Name, row-major shape and stored type of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def num_bytes(self) -> int:
        elements, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // elements * size


def write(path: Path, metadata: dict[str, Value], tensors: list[Planned], arrays: Iterable[np.ndarray]) -> None:
    """Write a GGUF file in one move from float32 arrays in the order of `tensors`, rounded to their types.

    Raises ConfigError where a number is not finite as that type, ValueError where a shape is not the one planned.
    """
    header = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items()) + _directory(tensors)
    header += _padding(len(header))
    num_bytes = len(header) + sum(t.num_bytes + len(_padding(t.num_bytes)) for t in tensors)
    durable.write_stream(path, _chunks(header, tensors, arrays), num_bytes)


def _chunks(header: bytes, tensors: list[Planned], arrays: Iterable[np.ndarray]) -> Iterator[durable.Buffer]:
    yield header
    for planned, array in zip(tensors, arrays, strict=True):
        if array.shape != planned.shape:
            raise ValueError(f"{planned.name} has shape {array.shape} where {planned.shape} was planned")
        data = _stored(planned, array).data.cast("B")
        yield data
        yield _padding(data.nbytes)


def _stored(planned: Planned, array: np.ndarray) -> np.ndarray:
    # bfloat16 has float32's range, and blocks of 8 bits a scale each: only float16 can overflow, in either
    with np.errstate(over="ignore"):
        stored: np.ndarray = np.ascontiguousarray(quantize(np.ascontiguousarray(array, np.float32), planned.kind))
    half = stored if planned.kind is Kind.F16 else np.zeros(0)
    if planned.kind is Kind.Q8_0:
        half = stored.reshape(-1, GGML_QUANT_SIZES[planned.kind][1])[:, :2].copy().view(np.float16)
    if not (np.isfinite(array).all() and np.isfinite(half).all()):
        raise ConfigError(f"{planned.name} holds numbers that are not finite as {planned.kind.name}: try bf16, or f32")
    return stored


def _directory(tensors: list[Planned]) -> bytes:
    parts, at = [], 0
    for name, shape, kind in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_text(name) + dimensions + struct.pack("<IQ", kind, at))
        num_bytes = Planned(name, shape, kind).num_bytes
        at += num_bytes + len(_padding(num_bytes))
    return b"".join(parts)


def _value(value: Value) -> bytes:
    if not isinstance(value, list):
        kind, data = _scalar(value)
        return struct.pack("<I", kind) + data
    kind = _STRING if value and isinstance(value[0], str) else _INT32
    items: list[Any] = value
    data = b"".join(map(_text, items)) if kind == _STRING else struct.pack(f"<{len(items)}i", *items)
    return struct.pack("<IIQ", _ARRAY, kind, len(items)) + data


def _scalar(value: str | bool | int | float) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    return (_UINT32, struct.pack("<I", value)) if isinstance(value, int) else (_FLOAT32, struct.pack("<f", value))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGNMENT)
