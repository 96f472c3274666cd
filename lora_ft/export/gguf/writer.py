"""Write a GGUF file, one tensor in memory at a time; the gguf package makes the header and the quantized blocks.

write(path, {"general.architecture": "llama", ...}, [PlannedTensor("output_norm.weight", (64,), Kind.F32)], arrays)
"""

import io
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from gguf.constants import GGMLQuantizationType as Kind
from gguf.gguf_writer import GGUFWriter, WriterState
from gguf.quants import quantize

from lora_ft.errors import ConfigError
from lora_ft.io import durable

__all__ = ["Kind", "PlannedTensor", "Value", "write"]

# An int is written as uint32, in a list as int32; a float as float32; bytes as a list of uint8.
Value = str | bool | int | float | bytes | list[str] | list[int] | list[float]


class PlannedTensor(NamedTuple):
    """Name, row-major shape and stored type of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def num_bytes(self) -> int:
        elements, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // elements * int(size)


def write(path: Path, metadata: dict[str, Value], tensors: list[PlannedTensor], arrays: Iterable[np.ndarray]) -> None:
    """Write a GGUF file atomically from float arrays in the order of `tensors`, each rounded to its type.

    `metadata` must have general.architecture; empty lists are omitted. Raises ConfigError for a number that is not
    finite in its type, ValueError for an array whose shape is not the planned one.
    """
    header = _header(metadata, tensors)
    num_bytes = len(header) + sum(tensor.num_bytes + len(_padding(tensor.num_bytes)) for tensor in tensors)
    durable.write_stream(path, _chunks(header, tensors, arrays), num_bytes)


def _header(metadata: dict[str, Value], tensors: list[PlannedTensor]) -> bytes:
    """Return the bytes before the first tensor."""
    writer = GGUFWriter(None, metadata["general.architecture"])
    for key, value in metadata.items():
        kinds = {int: GGUFValueType.UINT32, bytes: GGUFValueType.ARRAY}
        kind = kinds.get(type(value)) or GGUFValueType.get_type(value)
        if key != "general.architecture" and value != []:
            writer.add_key_value(key, value, kind)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.kind)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + _padding(buffer.tell())


def _chunks(header: bytes, tensors: list[PlannedTensor], arrays: Iterable[np.ndarray]) -> Iterator[durable.Buffer]:
    yield header
    for tensor, array in zip(tensors, arrays, strict=True):
        if array.shape != tensor.shape:
            raise ValueError(f"{tensor.name} must have shape {tensor.shape}, got {array.shape}")
        data = _quantized(tensor, array).data.cast("B")
        yield data
        yield _padding(data.nbytes)


def _quantized(tensor: PlannedTensor, array: np.ndarray) -> np.ndarray:
    # bfloat16 has float32's range. Only float16 can overflow, as the type or as the scale of Q8_0's blocks.
    with np.errstate(over="ignore"):
        stored: np.ndarray = np.ascontiguousarray(quantize(np.ascontiguousarray(array, np.float32), tensor.kind))
    half = stored if tensor.kind is Kind.F16 else np.zeros(0)
    if tensor.kind is Kind.Q8_0:
        half = stored.reshape(-1, GGML_QUANT_SIZES[tensor.kind][1])[:, :2].copy().view(np.float16)
    if not (np.isfinite(array).all() and np.isfinite(half).all()):
        raise ConfigError(f"{tensor.name} holds numbers that are not finite as {tensor.kind.name}: try bf16 or f32")
    return stored


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % GGUF_DEFAULT_ALIGNMENT)
