"""Sequences and examples one after the other, without a copy of what they contain.

sources = Chained([rows.sources, other.sources])     sources[3], len(sources)
joined([examples, other], [1000, 200])               Examples; rows of the second count from 1000
"""

import bisect
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.columns import Columns, Joined, whole
from lora_ft.data.examples import NO_GROUP, ROW, Examples

T = TypeVar("T")


class Chained(Sequence[T]):
    """Sequences, one after the other. firsts: the index of the first item of each, and the length of all."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = parts
        self.firsts = [*itertools.accumulate(map(len, parts), initial=0)]

    def __len__(self) -> int:
        return self.firsts[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[operator.index(index)]
        part = bisect.bisect_right(self.firsts, number) - 1
        return self.parts[part][number - self.firsts[part]]

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(self.parts)


def joined(sides: Sequence[Examples], num_rows: Sequence[int]) -> Examples:
    """Return the documents of several examples, one after the other; their rows and groups get other numbers.

    num_rows: the number of rows that each was made of.
    """
    has_groups, has_weights = (any(name in side.stored.names() for side in sides) for name in ("groups", "weights"))
    by_document = any(side.by_document for side in sides)
    stored: Columns | None = None
    places, documents, row, group = list[NDArray[np.int64]](), 0, 0, 0
    for side, count in zip(sides, num_rows, strict=True):
        own = _Numbered(side.stored, row, group if has_groups else None, has_weights)
        stored = Joined(stored, own) if stored else own
        places.append(documents + (np.arange(len(side)) if side.chosen is None else side.chosen))
        documents, row, group = documents + own.count("documents"), row + count, own.next_group
    assert stored is not None, "there is nothing to join"
    sources = Chained([_sources_of_documents(side) if by_document else side.sources for side in sides])
    return Examples(stored, sources, np.concatenate(places), by_document=by_document)


def _sources_of_documents(examples: Examples) -> Sequence[str]:
    if examples.by_document:
        return examples.sources
    return [examples.sources[row] for row in whole(examples.stored, "documents")[:, ROW].tolist()]


class _Numbered:
    """Columns of which rows and groups are counted from other numbers.

    first_group: None to leave `groups` out. has_weights: have `weights`, by default 1 for each supervised token.
    """

    def __init__(self, columns: Columns, first_row: int, first_group: int | None, has_weights: bool) -> None:
        self._columns, self._first_row, self._first_group = columns, first_row, first_group
        self._has_weights, self._own = has_weights, frozenset(columns.names())

    @property
    def next_group(self) -> int:
        """A number above all groups."""
        if self._first_group is None or "groups" not in self._own:
            return self._first_group or 0
        return self._first_group + 1 + int(whole(self._columns, "groups").max(initial=-1))

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name == "groups" and self._first_group is not None:
            if "groups" not in self._own:
                return np.full(stop - start, NO_GROUP, np.int64)
            groups = self._columns.read(name, start, stop)
            return np.where(groups == NO_GROUP, NO_GROUP, groups + self._first_group)
        if name == "weights" and "weights" not in self._own:
            return self._columns.read("supervised", start, stop).astype(np.float32)
        values = self._columns.read(name, start, stop)
        if name == "documents" and self._first_row:
            values = values.copy()
            values[:, ROW] += self._first_row
        return values

    def count(self, name: str) -> int:
        return self._columns.count({"groups": "documents", "weights": "ids"}.get(name, name))

    def names(self) -> list[str]:
        optional = {"groups": self._first_group is not None, "weights": self._has_weights}
        return [*sorted(self._own - optional.keys()), *(name for name, is_there in optional.items() if is_there)]
