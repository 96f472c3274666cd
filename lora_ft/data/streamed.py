"""Training rows that are read while a run trains: data.stream=true, for rows that do not fit a disk.

    rows in the order of their files     | block 0 | block 1 | ...     each of data.shuffle_buffer rows
    order of a block                     a function of the seed, the epoch and the number of the block
    steps                                cut from the blocks in turn, an epoch after the other

    stream.step(41)                      the examples of step 41, if the last one was step 40 or 41
    stream.position_of(42)               Position(epoch=0, block=3, offset=810), from which `seek` goes on

So the steps depend on no state but three integers. Two blocks are in memory, one of them incomplete.
"""

import collections
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data import formats, parsing, split, workers
from lora_ft.data.columns import InMemory
from lora_ft.data.dataset import MakeExamples, documents
from lora_ft.data.examples import NO_GROUP, Examples, columns_of
from lora_ft.data.groups import Groups, grouped
from lora_ft.data.read import Rows
from lora_ft.data.row_store import RowWriter, StoredRows
from lora_ft.data.rows import Example, Ledger, Record
from lora_ft.data.sampler import derive, shuffled
from lora_ft.data.sources import records
from lora_ft.errors import DataError

_MOST_PROCESSES = 8  # by default: more would wait for the training


@dataclass(frozen=True)
class Position:
    """The place of a step in a stream: offset counts the groups of the block that earlier steps took."""

    epoch: int = 0
    block: int = 0
    offset: int = 0


@dataclass(frozen=True)
class _Task:
    block: tuple[int, int]
    records: parsing.Records


@dataclass(frozen=True)
class _Prepared:
    """The documents of a chunk of a block, the epoch and number of the block, and the rows' hashes and sources."""

    block: tuple[int, int]
    columns: dict[str, NDArray[Any]]
    document_sources: list[str]
    hashes: split.Hashes
    row_sources: list[str]


class _Preparer:
    """Makes the documents of a chunk of records."""

    def __init__(self, header: formats.Header, data: config.Data, tokenizer: Any, make_examples: MakeExamples) -> None:
        self._parser, self._format = parsing.Parser(header, data), header.parser(data)[0]
        self._data, self._tokenizer, self._make_examples = data, tokenizer, make_examples

    def __call__(self, task: _Task) -> _Prepared:
        parsed, writer = self._parser(task.records), RowWriter()
        writer.append(parsed.rows)
        rows = writer.finish()
        found = Rows(self._format, rows, np.zeros(len(rows), np.bool_), 0, [], parsed.ledger)
        made = list(documents(found, self._data, self._tokenizer, self._make_examples)[0])
        return _Prepared(task.block, columns_of(made), [e.source for e in made], rows.hashes, list(rows.sources))


@dataclass(frozen=True)
class _Block:
    """The documents of a block. order: of its groups. chunks: their number."""

    examples: Examples
    groups: Groups
    order: NDArray[np.int64]
    chunks: int


class Stream:
    """The steps of a run whose rows are streamed. eval_rows: must not be among the training rows."""

    def __init__(
        self,
        data: config.Data,
        tokenizer: Any,
        make_examples: MakeExamples,
        seed: int,
        tokens_per_step: int,
        eval_rows: StoredRows,
    ) -> None:
        self._data, self._seed, self._tokens_per_step, self._eval_rows = data, seed, tokens_per_step, eval_rows
        first = itertools.islice(self._records(Ledger(data.strict)), first_rows(data))
        self._prepare = formats.Header.of(first, data), data, tokenizer, make_examples
        self._chunks: Generator[_Prepared] | None = None
        self.seek(Position(), 0)

    def seek(self, position: Position, number: int) -> None:
        """Go to a position, which is that of step `number`."""
        self.close()
        self._position = self._before = position
        self._number, self._current = number - 1, list[Example]()
        self._block: _Block | None = None
        self._ahead: collections.deque[_Prepared] = collections.deque()  # chunks of the next block
        self._last_epoch = position.epoch - 1  # the last one that had documents

    def close(self) -> None:
        """End the processes."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = None

    def step(self, number: int) -> list[Example]:
        """Return the examples of a step: the one after the last that was asked for, or that one again."""
        if number != self._number:
            if number != self._number + 1:
                raise ValueError(f"step {number} of a stream was asked for after step {self._number}")
            self._before, self._number = self._position, number
            self._current = self._next_step()
            self._read_ahead()
        return self._current

    def position_of(self, number: int) -> Position:
        """Return the position of the step that was asked for last, or of the one after it."""
        if number not in (self._number, self._number + 1):
            raise ValueError(f"the position of step {number} of a stream is not known after step {self._number}")
        return self._before if number == self._number else self._position

    def _next_step(self) -> list[Example]:
        """Take groups of examples, as many as fit into a step, at least one; a step ends with its epoch."""
        found: list[Example] = []
        tokens = 0
        while True:
            while self._block is None or self._position.offset == len(self._block.order):
                if found and self._peek().block[0] != self._position.epoch:
                    return found
                self._load()
            block, position = self._block, self._position
            group = block.order[position.offset : position.offset + 1]
            tokens += int(block.groups.lengths[group[0]])
            if found and tokens > self._tokens_per_step:
                return found
            found += [block.examples[i] for i in block.groups.members_of(group)]
            self._position = replace(position, offset=position.offset + 1)

    def _load(self) -> None:
        """Load the next block; after `seek` the block of the position, whose offset stays."""
        key, chunks = self._peek().block, list[_Prepared]()
        while self._peek().block == key:
            chunks.append(self._ahead.popleft())
        for chunk in chunks:
            split.refuse_leaks(chunk.row_sources, self._eval_rows.sources, chunk.hashes, self._eval_rows.hashes)
        examples = _joined(chunks)
        groups = grouped(examples)
        order = shuffled(len(groups), derive(self._seed, "stream", *key))
        self._position = Position(*key, self._position.offset if self._block is None else 0)
        self._block = _Block(examples, groups, order, len(chunks))
        if len(order):
            self._last_epoch = key[0]
        elif key[0] - self._last_epoch > 1:
            raise DataError(f"{self._data.path}: no row is left to train on")

    def _read_ahead(self) -> None:
        """Prepare as much of the next block as was taken of this one, so that no step waits for all of it."""
        if self._block is None:
            return
        wanted = self._block.chunks * self._position.offset // max(1, len(self._block.order))
        while len(self._ahead) < wanted and self._ahead[-1].block == self._ahead[0].block:
            self._pull()

    def _peek(self) -> _Prepared:
        if not self._ahead:
            self._pull()
        return self._ahead[0]

    def _pull(self) -> None:
        if self._chunks is None:
            asked = self._data.workers
            processes = min(workers.number(None), _MOST_PROCESSES) if asked is None else asked
            self._chunks = workers.mapped(_Preparer, self._prepare, self._tasks(self._position), processes)
        self._ahead.append(next(self._chunks))

    def _tasks(self, start: Position) -> Iterator[_Task]:
        """Yield the chunks of all blocks from a position on, without end."""
        for epoch in itertools.count(start.epoch):
            first, ledger = start.block if epoch == start.epoch else 0, Ledger(self._data.strict)
            found = self._records(ledger)
            collections.deque(itertools.islice(found, first * self._data.shuffle_buffer), maxlen=0)  # skips them
            ledger.take()
            for block in itertools.count(first):
                chunks = parsing.chunks(itertools.islice(found, self._data.shuffle_buffer), ledger)
                tasks = [_Task((epoch, block), chunk) for chunk in itertools.islice(chunks, 1)]
                if not tasks:
                    break
                yield from tasks
                yield from (_Task((epoch, block), chunk) for chunk in chunks)
            if block == 0:
                raise DataError(f"{self._data.path}: there are no rows")

    def _records(self, ledger: Ledger) -> Iterator[Record]:
        found = records(self._data.path, "data.path", self._data, ledger)
        return itertools.islice(found, self._data.max_rows)


def first_rows(data: config.Data) -> int:
    """Return the number of rows from which the format follows."""
    return min(data.shuffle_buffer, parsing.FIRST_ROWS)


def _joined(chunks: list[_Prepared]) -> Examples:
    """Return the documents of a block as one; its groups get new numbers, as those of chunks may be equal."""
    names = {name: None for chunk in chunks for name in chunk.columns}
    base = 0
    for chunk in chunks if "groups" in names else ():
        groups = chunk.columns.setdefault("groups", np.full(len(chunk.document_sources), NO_GROUP))
        has_one = groups != NO_GROUP
        different, numbers = np.unique(groups[has_one], return_inverse=True)
        groups[has_one] = base + numbers
        base += len(different)
    for chunk in chunks if "weights" in names else ():
        chunk.columns.setdefault("weights", chunk.columns["supervised"].astype(np.float32))
    arrays = {name: np.concatenate([chunk.columns[name] for chunk in chunks]) for name in names}
    sources = [source for chunk in chunks for source in chunk.document_sources]
    return Examples(InMemory(arrays), sources, by_document=True)
