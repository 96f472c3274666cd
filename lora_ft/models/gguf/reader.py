"""Read a GGUF file through the gguf package; raise ConfigError with the file's name if it is damaged.

    file = read(path)
    file.metadata["general.architecture"]             "llama"
    shape(file.tensors["blk.0.attn_q.weight"])        (576, 576)
    values(file.tensors["blk.0.attn_q.weight"])       float32 [576, 576]

The tensors are views of the mapped file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.gguf_reader import READER_SUPPORTED_VERSIONS, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from lora_ft.errors import ConfigError


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a GGUF file as plain values and lists, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]


class _CheckedReader(GGUFReader):
    """The package's reader with a check for the end of the file, beyond which it would return truncated values.

    np.frombuffer instead of slices of the memory map reads a vocabulary in a third of the time.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        size = int(count) * np.dtype(dtype).itemsize
        if offset + size > len(self.data):
            raise ValueError(f"a value at byte {offset} extends beyond the end of the file")
        return np.frombuffer(self.data, dtype, int(count), int(offset))


def read(path: Path) -> GgufFile:
    """Parse a little-endian GGUF file of version 2 or 3; raises ConfigError for any other file."""
    with path.open("rb") as file:
        magic, version = file.read(4), int.from_bytes(file.read(4), "little")
    if magic != b"GGUF":
        raise ConfigError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    if version not in READER_SUPPORTED_VERSIONS:
        raise ConfigError(f"{path}: GGUF version must be 2 or 3, little-endian, got {version}")
    try:
        with np.errstate(over="raise"):
            reader = _CheckedReader(path)
        metadata = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"{path} is truncated or damaged: {error}") from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path} is one of {metadata['split.count']} parts: merge them with llama-gguf-split --merge")
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return the row-major shape."""
    return tuple(tensor.shape.tolist()[::-1])


def dtype_code(tensor: ReaderTensor) -> str:
    """Return the safetensors dtype that holds `values` exactly: F32 for every quantized type."""
    kind = tensor.tensor_type
    return kind.name if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16) else "F32"


def values(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """Return the tensor as float32, float16 or, for bfloat16, its bits as uint16; raises ConfigError.

    Block formats are d * q (+ m) with half-precision d and m. The result is not rounded to 16 bits again, which would
    lose up to half of the difference between two levels.
    """
    if dtype_code(tensor) == "BF16":
        return tensor.data.view(np.uint16)
    if dtype_code(tensor) == "F16":
        return tensor.data
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ConfigError(
            f"tensor {tensor.name} is stored as {tensor.tensor_type.name}, which is not supported: "
            "use a file of another quantization type, or the safetensors model"
        ) from None


def float32(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """Return the tensor as float32, which holds every stored type exactly; raises ConfigError."""
    stored = values(tensor)
    if dtype_code(tensor) == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
