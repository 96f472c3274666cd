"""Read records in chunks and make rows of them, in processes if there are many.

records -> chunks of a thousand -> Parser: rows, their hashes, bad rows -> RowWriter

The format follows from the first rows. The result does not depend on the number of processes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from lora_ft import config
from lora_ft.config import Format, TrainOn
from lora_ft.data import formats, labels, thoughts, workers
from lora_ft.data.chat_template import learned_answers
from lora_ft.data.progress import counted
from lora_ft.data.row_store import PackedRows, RowWriter, packed
from lora_ft.data.rows import Ledger, Record, Row, RowError
from lora_ft.data.sources import records
from lora_ft.errors import DataError

FIRST_ROWS = 10_000  # the format follows from these; more are parsed and encoded in processes
_FIRST_CHARACTERS = 1 << 26
_CHUNK_ROWS = 1000
_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Records:
    """A chunk of records, and what reading them has put into the ledger."""

    records: list[Record]
    ledger: Ledger
    characters: int


@dataclass(frozen=True)
class Parsed:
    """The rows of a chunk. names: columns of its records. ledger: of reading and parsing it."""

    rows: PackedRows
    names: list[str]
    ledger: Ledger


def append_rows(
    key: str, data: config.Data, writer: RowWriter, ledger: Ledger, edit: Callable[[Record], Record] | None = None
) -> tuple[Format, list[str]]:
    """Read at most `data.max_rows` records of `data.path`, the value of the setting `key`, and append their rows.

    edit: changes a record before its row is made.
    Returns the format and the columns that are not read. Bad rows go into the ledger, which is raised if no row is
    good. Raises ConfigError for settings that name columns which none of the first records has, DataError if no format
    fits, there is no row, or data.labels=auto finds too many labels.
    """
    reading = Ledger(data.strict)
    found_records = records(data.path, key, data, reading)
    rest = chunks(islice(map(edit, found_records) if edit else found_records, data.max_rows), reading)
    first = _first(rest)
    header = formats.Header.of(chain.from_iterable(chunk.records for chunk in first), data)
    if not header.columns:
        for chunk in first:
            ledger.add(chunk.ledger)
        ledger.raise_bad()
        raise DataError(f"{data.path}: there are no rows")
    found = header.parser(data)[0]
    more = list(islice(rest, 1))
    processes = workers.number(data.workers) if more else 0
    before, names = writer.count, dict.fromkeys(header.names)
    parsed = workers.mapped(Parser, (header, data), chain(first, more, rest), processes)
    for made in counted("reading rows", parsed, lambda made: len(made.rows)):
        ledger.add(made.ledger)
        writer.append(made.rows)
        names.update(dict.fromkeys(made.names))
        labels.check_number(data, writer.num_words)
    if writer.count == before:
        ledger.raise_bad()
        left_out = ", ".join(f"{count} {reason}" for reason, count in ledger.left_out.items())
        raise DataError(f"{data.path}: every row is left out: {left_out}")
    return found, header.unused(names, data)


class Parser:
    """Makes the rows of a chunk of records."""

    def __init__(self, header: formats.Header, data: config.Data) -> None:
        self._parse, self._data = labels.checked(header.parser(data)[1], data), data

    def __call__(self, chunk: Records) -> Parsed:
        ledger, rows = chunk.ledger, list[Row]()
        with until_full(ledger):
            for row in formats.rows(chunk.records, self._parse, self._data, ledger):
                rows.append(row)
        names = dict.fromkeys(name for _, values in chunk.records for name in values)
        has_thought = [_has_thought(row, self._data.train_on) for row in rows]
        have_labels = self._data.labels is not None
        return Parsed(packed(rows, has_thought, have_labels=have_labels), list(names), ledger)


def _has_thought(row: Row, train_on: TrainOn) -> bool:
    """Return True if a learned answer of a chat has a thought; False for a chat of which no answer is learned."""
    try:
        return bool(row.messages) and any(thoughts.of(row.messages[i]) for i in learned_answers(row, train_on))
    except RowError:
        return False


def _first(chunks: Iterator[Records]) -> list[Records]:
    found: list[Records] = []
    rows = characters = 0
    while rows < FIRST_ROWS and characters < _FIRST_CHARACTERS and (chunk := next(chunks, None)):
        found.append(chunk)
        rows += len(chunk.records)
        characters += chunk.characters
    return found


def chunks(found: Iterable[Record], reading: Ledger) -> Iterator[Records]:
    """Yield records in chunks, each with what reading it has put into the ledger `reading`."""
    chunk: list[Record] = []
    characters = 0
    with until_full(reading):
        for record in found:
            chunk.append(record)
            characters += _characters(record[1])
            if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
                yield Records(chunk, reading.take(), characters)
                chunk, characters = [], 0
    if chunk or reading.bad or reading.left_out or reading.converted:
        yield Records(chunk, reading.take(), characters)


@contextlib.contextmanager
def until_full(ledger: Ledger) -> Iterator[None]:
    """End the block quietly where the ledger is full: the main process counts the bad rows of all chunks."""
    try:
        yield
    except DataError:
        if not ledger.is_full:
            raise


def _characters(value: object) -> int:
    """Return about the size of a record."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 8
