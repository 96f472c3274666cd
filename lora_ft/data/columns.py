"""Named arrays of which parts are read on demand: from memory, or from files that are not kept in memory.

    columns.read("ids", 1000, 1200)        an array of 200 values
    columns.count("ids")                   35,000,000

    writer = Writer()                      small arrays stay in memory, larger ones go to temporary files
    writer.append(ids=..., supervised=...)
    columns = writer.finish()

Files are read by position, not mapped: mapped pages would count as memory of the process.
"""

import hashlib
import json
import os
import secrets
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_ft.io import caches, durable

_MOST_IN_MEMORY = 8 << 20  # bytes of a writer
_READ_BYTES = 4 << 20  # of a large array at once
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32}  # of safetensors
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class Columns(Protocol):
    """Interface of a set of named arrays."""

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the values of one array from `start` to `stop`, both within the array."""
        ...

    def count(self, name: str) -> int:
        """Return the length of an array."""
        ...

    def names(self) -> list[str]: ...


class InMemory:
    """Columns that are arrays in memory; `read` returns views."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = dict(arrays)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._arrays[name][start:stop]

    def count(self, name: str) -> int:
        return len(self._arrays[name])

    def names(self) -> list[str]:
        return list(self._arrays)


class Joined:
    """The arrays of two sets of columns, one after the other; a name that one of them lacks is missing."""

    def __init__(self, first: Columns, second: Columns) -> None:
        self._first, self._second = first, second

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        middle = self._first.count(name)
        if stop <= middle:
            return self._first.read(name, start, stop)
        if start >= middle:
            return self._second.read(name, start - middle, stop - middle)
        return np.concatenate([self._first.read(name, start, middle), self._second.read(name, 0, stop - middle)])

    def count(self, name: str) -> int:
        return self._first.count(name) + self._second.count(name)

    def names(self) -> list[str]:
        return [name for name in self._first.names() if name in self._second.names()]


class _File:
    """A file that is open for reading by position until nothing refers to it."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes. Raises OSError if the file is shorter."""
        data = b""
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self.path} is cut short")
            data = data + more if data else more
        return data


@dataclass(frozen=True)
class _Part:
    """An array inside an open file: where it begins, its dtype and its shape."""

    file: _File
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class InFiles:
    """Columns in open files, which may be deleted while they are read."""

    def __init__(self, parts: Mapping[str, _Part]) -> None:
        self._parts = dict(parts)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        part = self._parts[name]
        each = part.dtype.itemsize * int(np.prod(part.shape[1:]))
        data = part.file.read((stop - start) * each, part.offset + start * each)
        return np.frombuffer(data, part.dtype).reshape(stop - start, *part.shape[1:])

    def count(self, name: str) -> int:
        return self._parts[name].shape[0]

    def names(self) -> list[str]:
        return list(self._parts)


def parts(columns: Columns, name: str, size: int | None = None) -> Iterator[NDArray[Any]]:
    """Yield an array in parts of `size` values; by default in parts of a few megabytes."""
    count = columns.count(name)
    if size is None:
        size = max(1, _READ_BYTES // max(1, columns.read(name, 0, min(1, count)).nbytes))
    for start in range(0, count, size):
        yield columns.read(name, start, min(start + size, count))


def whole(columns: Columns, name: str) -> NDArray[Any]:
    """Return a whole array."""
    return columns.read(name, 0, columns.count(name))


class Writer:
    """Collects arrays in parts: in memory, and in files of the user's cache once they are large.

    The files have temporary names, and none once the columns are finished: nothing is left behind.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._files: dict[str, Path] = {}
        self._bytes = 0

    def append(self, **arrays: NDArray[Any]) -> None:
        """Append to each array; the first call names all arrays, their dtypes and the shapes of their values."""
        for name, values in arrays.items():
            before = self._shapes.get(name, (values.dtype, (0, *values.shape[1:])))
            self._shapes[name] = values.dtype, (before[1][0] + len(values), *values.shape[1:])
            self._parts.setdefault(name, []).append(values)
            self._bytes += values.nbytes
        if self._bytes > _MOST_IN_MEMORY:
            self._spill()

    def finish(self) -> Columns:
        """Return what was appended."""
        if not self._files:
            return InMemory({name: np.concatenate(found) for name, found in self._parts.items()})
        self._spill()
        made = {}
        for name, path in self._files.items():
            made[name] = _Part(_File(path), 0, *self._shapes[name])
        self.discard()
        return InFiles(made)

    def discard(self) -> None:
        """Remove the files."""
        for path in self._files.values():
            durable.remove(path)
        self._files = {}

    def _spill(self) -> None:
        if not self._files:
            folder, mark = caches.writable("rows"), secrets.token_hex(4)
            self._files = {name: folder / f"{name}-{mark}.tmp-{secrets.token_hex(4)}" for name in self._shapes}
        for name, found in self._parts.items():
            durable.append_bytes(self._files[name], b"".join(values.tobytes() for values in found))
        self._parts, self._bytes = {}, 0


def save(path: Path, columns: Columns, metadata: dict[str, str]) -> None:
    """Write columns as a safetensors file, a few megabytes at a time."""
    specs = []
    for name in columns.names():
        first = columns.read(name, 0, min(1, columns.count(name)))
        shape = (columns.count(name), *first.shape[1:])
        size = first.dtype.itemsize * int(np.prod(shape))
        specs.append(durable.TensorSpec(name, _CODES[first.dtype], shape, size))
    durable.write_tensors(path, specs, (_bytes(columns, spec.name) for spec in specs), metadata)


def checksum(columns: Columns) -> str:
    """Return the sha256 of the values of all columns."""
    digest = hashlib.sha256()
    for name in sorted(columns.names()):
        for part in _bytes(columns, name):
            digest.update(part)
    return digest.hexdigest()


def _bytes(columns: Columns, name: str) -> Iterator[memoryview]:
    return (part.data.cast("B") for part in parts(columns, name))


def load(path: Path) -> tuple[InFiles, dict[str, str]]:
    """Open a file that `save` wrote; return its columns and metadata. Raises OSError and ValueError."""
    file = _File(path)
    (size,) = struct.unpack("<Q", file.read(8, 0))
    if size > 1 << 20:
        raise ValueError("not a file of columns")
    header = json.loads(file.read(size, 8))
    metadata = header.pop("__metadata__", {})
    found, end = {}, 8 + size
    for name, spec in header.items():
        shape, dtype = tuple(spec["shape"]), np.dtype(_DTYPES[spec["dtype"]])
        first, last = spec["data_offsets"]
        if last - first != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(f"{name} has a wrong size")
        found[name] = _Part(file, 8 + size + first, dtype, shape)
        end = max(end, 8 + size + last)
    if path.stat().st_size != end:
        raise ValueError("wrong size")
    return InFiles(found), metadata
