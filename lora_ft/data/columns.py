"""Named arrays of which parts are read on demand: from memory, or from a file that is not kept in memory.

    columns.read("ids", 1000, 1200)        an array of 200 values
    columns.count("ids")                   35,000,000

A file is read by position, not mapped: mapped pages would count as memory of the process.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Columns(Protocol):
    """Interface of a set of named arrays."""

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the values of one array from `start` to `stop`, both within the array."""
        ...

    def count(self, name: str) -> int:
        """Return the length of an array."""
        ...

    def __contains__(self, name: object) -> bool: ...


class InMemory:
    """Columns that are arrays in memory; `read` returns views."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = dict(arrays)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._arrays[name][start:stop]

    def count(self, name: str) -> int:
        return len(self._arrays[name])

    def __contains__(self, name: object) -> bool:
        return name in self._arrays


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

    def __contains__(self, name: object) -> bool:
        return name in self._first and name in self._second


def parts(columns: Columns, name: str, size: int) -> Iterator[NDArray[Any]]:
    """Yield an array in parts of `size` values."""
    count = columns.count(name)
    for start in range(0, count, size):
        yield columns.read(name, start, min(start + size, count))
