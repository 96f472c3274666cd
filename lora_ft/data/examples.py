"""Examples as flat arrays instead of a million objects: an `Example` is made when it is asked for.

examples = Examples.of([Example(...), ...])
examples.lengths, examples.supervised_tokens      numpy arrays, one value a document
examples[3]                                       Example(ids=[1, 9, 4, 2], ...)
examples.select(indices)                          other documents of the same arrays, without a copy of tokens
for block in examples.blocks(): ...               all tokens in order, a few megabytes at a time

columns   ids int32 [tokens]   supervised uint8 [tokens]
          weights float32 [tokens] and groups int64 [documents], if any example has them
          documents int32 [documents, 5]: length, supervised tokens, row, prompt_end, answer_start
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.columns import Columns, InMemory, Joined, Writer, parts
from lora_ft.data.rows import Example

NO_GROUP = int(np.iinfo(np.int64).min)
_LENGTH, _SUPERVISED, ROW, _PROMPT_END, _ANSWER_START = range(5)  # columns of `documents`
_BLOCK_TOKENS = 1 << 20
_PART = 1 << 16  # documents of which one column is read
_DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Block:
    """Consecutive documents: the index of the first, all their tokens, and the start of each, with the end.

    weights: of the tokens in the loss; None if no document has any.
    """

    first: int
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    starts: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


class Examples(Sequence[Example]):
    """A sequence of examples that is stored as columns.

    sources: file and line of each row, by `Example.row`; of each document if `by_document`. chosen: the documents of
    a selection.
    """

    def __init__(
        self,
        stored: Columns,
        sources: Sequence[str],
        chosen: NDArray[np.int64] | None = None,
        starts: NDArray[np.int64] | None = None,
        by_document: bool = False,
    ) -> None:
        self.stored, self.sources, self.chosen, self.by_document = stored, sources, chosen, by_document
        self._starts = _starts(self._field(_LENGTH)) if starts is None else starts

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """Return examples as columns in memory; `Examples` are returned as they are."""
        if isinstance(examples, Examples):
            return examples
        return cls(InMemory(columns_of(examples)), [example.source for example in examples], by_document=True)

    def select(self, indices: Any) -> "Examples":
        """Return the documents with these indices, in their order."""
        chosen = np.asarray(indices, dtype=np.int64)
        if self.chosen is not None:
            chosen = self.chosen[chosen]
        return Examples(self.stored, self.sources, chosen, self._starts, self.by_document)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each document."""
        return self._of_chosen(np.diff(self._starts))

    @property
    def supervised_tokens(self) -> NDArray[np.int64]:
        """Number of supervised tokens of each document."""
        return self._of_chosen(self._field(_SUPERVISED))

    @property
    def rows(self) -> NDArray[np.int64]:
        """Index of the row of each document."""
        return self._of_chosen(self._field(ROW))

    @property
    def answer_starts(self) -> NDArray[np.int64]:
        """`Example.answer_start` of each document."""
        return self._of_chosen(self._field(_ANSWER_START))

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Group of each document, NO_GROUP if it has none; None if no document has one."""
        if "groups" not in self.stored.names():
            return None
        return self._of_chosen(self.stored.read("groups", 0, len(self._starts) - 1))

    def __len__(self) -> int:
        return len(self._starts) - 1 if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        place = self._place(number % len(self))
        span = int(self._starts[place]), int(self._starts[place + 1])
        ids, supervised = self.stored.read("ids", *span), self.stored.read("supervised", *span)
        weights = self.stored.read("weights", *span) if "weights" in self.stored.names() else None
        return self._made(place, ids, supervised.view(np.bool_), weights)

    def __iter__(self) -> Iterator[Example]:
        for block in self.blocks():
            for number, (start, stop) in enumerate(
                zip(block.starts[:-1].tolist(), block.starts[1:].tolist(), strict=True)
            ):
                weights = None if block.weights is None else block.weights[start:stop]
                place = self._place(block.first + number)
                yield self._made(place, block.ids[start:stop], block.supervised[start:stop], weights)

    def blocks(self) -> Iterator[Block]:
        """Yield all documents with their tokens, about `_BLOCK_TOKENS` tokens at a time."""
        ends, first = np.cumsum(self.lengths), 0
        while first < len(self):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
            yield self._block(first, last)
            first = last

    def _block(self, first: int, last: int) -> Block:
        places = np.arange(first, last) if self.chosen is None else self.chosen[first:last]
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)  # of documents that are stored side by side
        spans = [(int(self._starts[run[0]]), int(self._starts[run[-1] + 1])) for run in runs]
        names = self.stored.names()
        ids, supervised, weights = (
            np.concatenate([self.stored.read(name, *span) for span in spans]) if name in names else None
            for name in ("ids", "supervised", "weights")
        )
        assert ids is not None and supervised is not None
        return Block(first, ids, supervised.view(np.bool_), _starts(self.lengths[first:last]), weights)

    def _place(self, index: int) -> int:
        return index if self.chosen is None else int(self.chosen[index])

    def _of_chosen(self, values: NDArray[Any]) -> NDArray[np.int64]:
        return (values if self.chosen is None else values[self.chosen]).astype(np.int64, copy=False)

    def _field(self, number: int) -> NDArray[np.int32]:
        """Return one column of `documents`, read in parts: the others are not kept."""
        found = np.empty(self.stored.count("documents"), np.int32)
        start = 0
        for part in parts(self.stored, "documents", _PART):
            found[start : start + len(part)] = part[:, number]
            start += len(part)
        return found

    def _made(
        self, place: int, ids: NDArray[np.int32], supervised: NDArray[np.bool_], weights: NDArray[np.float32] | None
    ) -> Example:
        row, prompt_end, answer_start = self.stored.read("documents", place, place + 1)[0, ROW:].tolist()
        group = int(self.stored.read("groups", place, place + 1)[0]) if "groups" in self.stored.names() else NO_GROUP
        source = self.sources[place if self.by_document else row]
        if weights is not None and np.array_equal(weights, supervised):
            weights = None
        group_or_none = None if group == NO_GROUP else group
        return Example(ids, supervised, source, row, prompt_end, answer_start, group_or_none, weights)


class Replacements:
    """Collects documents that are made of those of `examples`, as columns, in files if they are many."""

    def __init__(self, examples: Examples) -> None:
        self._examples, self._writer = examples, Writer()
        self._sources: list[str] = []
        self._kept: list[Example] = []

    def append(self, made: Iterable[Example]) -> int:
        """Append documents; return their number."""
        before = len(self._kept)
        self._kept += made
        count = len(self._kept) - before
        if len(self._kept) >= _DOCUMENTS_AT_ONCE:
            self._write()
        return count

    def finish(self, order: NDArray[np.int64]) -> Examples:
        """Return an order of the documents of `examples` and of those appended, which follow in the numbering."""
        self._write()
        old, added = self._examples, self._writer.finish()
        own = np.arange(len(old)) if old.chosen is None else old.chosen
        places = np.concatenate([own, np.arange(added.count("documents")) + old.stored.count("documents")])
        sources = [*old.sources, *self._sources] if old.by_document else old.sources
        return Examples(Joined(old.stored, added), sources, places[order], by_document=old.by_document)

    def _write(self) -> None:
        names = self._examples.stored.names()
        self._writer.append(**columns_of(self._kept, "groups" in names, "weights" in names))
        if self._examples.by_document:
            self._sources += [example.source for example in self._kept]
        self._kept = []


def columns_of(
    examples: Sequence[Example], has_groups: bool = False, has_weights: bool = False
) -> dict[str, NDArray[Any]]:
    """Return the columns of examples; `groups` and `weights` are missing if none has any, unless they are asked for."""
    made: dict[str, NDArray[Any]] = {
        "ids": np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)]),
        "supervised": np.concatenate([np.zeros(0, np.bool_), *(e.supervised for e in examples)]).view(np.uint8),
        "documents": np.array(
            [(len(e.ids), e.supervised.sum(), e.row, e.prompt_end, e.answer_start) for e in examples], np.int32
        ).reshape(-1, 5),
    }
    if has_groups or any(e.group is not None for e in examples):
        made["groups"] = np.array([NO_GROUP if e.group is None else e.group for e in examples], np.int64)
    if has_weights or any(e.weights is not None for e in examples):
        made["weights"] = np.concatenate([np.zeros(0, np.float32), *(e.loss_weights for e in examples)])
    return made


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number of tokens of each of some examples."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.ids) for example in examples], dtype=np.int64)


def groups_of(examples: Sequence[Example]) -> NDArray[np.int64] | None:
    """Return the group of each of some examples, NO_GROUP if it has none; None if no example has one."""
    if isinstance(examples, Examples):
        return examples.groups
    groups = [NO_GROUP if example.group is None else example.group for example in examples]
    return np.array(groups, dtype=np.int64) if any(group != NO_GROUP for group in groups) else None


def _starts(lengths: NDArray[Any]) -> NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
