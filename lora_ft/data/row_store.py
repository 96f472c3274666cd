"""Rows as text in columns instead of a million objects: a `Row` is made when it is asked for.

    writer = RowWriter(folder)
    writer.append(packed(rows))           rows in chunks
    rows = writer.finish()                StoredRows
    rows[3], rows.sources[3], rows.hashes, rows.is_chat

    columns   text uint8: a JSON list of each row    ends int64 [rows]: of the texts    is_chat, has_thought uint8
              hashes uint64 [rows, 2]: half of the sha256 of the content    prompts uint64 [rows]: hash of the prompt
              places int64 [rows, 2]: prefix and number of the source, "chat.jsonl:" and 12
              labels int32 [rows]: number of the answer among `words`, -1 for rows without data.labels

Values that JSON does not have, such as a date of a Parquet file inside a message, become text.
"""

import hashlib
import json
import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.columns import Columns, Writer, whole
from lora_ft.data.rows import Row
from lora_ft.data.split import content_hash

_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})", re.DOTALL)
_ROWS_AT_ONCE = 1000
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, separators=(",", ":"))


@dataclass(frozen=True)
class PackedRows:
    """A chunk of rows as columns.

    prefixes: of the sources in `places`. words: the different labels. has_weights: a message has a weight.
    """

    columns: dict[str, NDArray[Any]]
    prefixes: list[str]
    words: list[str]
    has_weights: bool

    def __len__(self) -> int:
        return len(self.columns["ends"])


def packed(rows: Sequence[Row], has_thought: Sequence[bool] = (), *, have_labels: bool = False) -> PackedRows:
    """Pack a chunk of rows.

    has_thought: of each row, True if a learned answer has a thought; by default none has. have_labels: the answers are
    labels.
    """
    texts = [_text(row) for row in rows]
    words: dict[str, int] = {}
    labels = [words.setdefault(row.answer, len(words)) if have_labels else -1 for row in rows]
    prefixes: dict[str, int] = {}
    places = np.empty((len(rows), 2), np.int64)
    for index, row in enumerate(rows):
        match = _NUMBERED.fullmatch(row.source)
        prefix, number = (match[1], int(match[2])) if match else (row.source, -1)
        places[index] = prefixes.setdefault(prefix, len(prefixes)), number
    hashes = b"".join(content_hash(row)[:16] for row in rows)
    arrays: dict[str, NDArray[Any]] = {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "is_chat": np.array([bool(row.messages) for row in rows], np.uint8),
        "has_thought": np.array(has_thought or [False] * len(rows), np.uint8),
        "hashes": np.frombuffer(hashes, ">u8").astype(np.uint64).reshape(-1, 2),
        "prompts": np.array([_prompt_hash(row) for row in rows], np.uint64),
        "places": places,
        "labels": np.array(labels, np.int32),
    }
    return PackedRows(
        arrays, list(prefixes), list(words), any("weight" in message for row in rows for message in row.messages)
    )


def _text(row: Row) -> bytes:
    values = [row.messages, row.answer, row.plain_prompt, sorted(row.context), sorted(row.excluded), row.tools]
    return _ENCODER.encode(values).encode("utf-8", "surrogatepass")


def _row(text: bytes, source: str) -> Row:
    messages, answer, plain_prompt, context, excluded, tools = json.loads(text.decode("utf-8", "surrogatepass"))
    return Row(source, messages, answer, plain_prompt, frozenset(context), frozenset(excluded), tools)


def _prompt_hash(row: Row) -> int:
    """Hash the letters and digits of a chat before its last answer, or of a whole text; 0 if there are none."""
    text = " ".join(str(m["content"]) for m in row.messages[:-1]) if row.messages else row.answer
    plain = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
    if not plain:
        return 0
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


class Sources(Sequence[str]):
    """File and line of each row, as text."""

    def __init__(self, stored: Columns, prefixes: Sequence[str], chosen: NDArray[np.int64] | None) -> None:
        self._stored, self._prefixes, self._chosen = stored, prefixes, chosen

    def __len__(self) -> int:
        return self._stored.count("ends") if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[operator.index(index)]
        place = number if self._chosen is None else int(self._chosen[number])
        return self.of(self._stored.read("places", place, place + 1)[0])

    def of(self, place: NDArray[np.int64]) -> str:
        prefix, number = place.tolist()
        return self._prefixes[prefix] if number < 0 else f"{self._prefixes[prefix]}{number}"


class StoredRows(Sequence[Row]):
    """A sequence of rows.

    digest: sha256 of their content, without sources. has_weights: a message has a weight. words: the different labels,
    also those that only rows have which are not selected.
    """

    def __init__(
        self,
        stored: Columns,
        prefixes: Sequence[str],
        digest: str,
        has_weights: bool,
        words: Sequence[str] = (),
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._stored, self._prefixes, self._chosen = stored, prefixes, chosen
        self.digest, self.has_weights, self.words = digest, has_weights, words
        self.sources = Sources(stored, prefixes, chosen)

    def select(self, indices: NDArray[np.int64]) -> "StoredRows":
        """Return the rows with these indices, which ascend."""
        chosen = indices if self._chosen is None else self._chosen[indices]
        if len(chosen) == len(self):
            return self
        digest = hashlib.sha256(self.digest.encode() + np.ascontiguousarray(chosen, np.int64).tobytes()).hexdigest()
        return StoredRows(self._stored, self._prefixes, digest, self.has_weights, self.words, chosen)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Hash of the content of each row: uint64 [rows, 2]."""
        return self._column("hashes")

    @property
    def prompts(self) -> NDArray[np.uint64]:
        """Hash of the prompt of each row, or of the whole text; 0 for one without letters and digits."""
        return self._column("prompts")

    @property
    def is_chat(self) -> NDArray[np.bool_]:
        """True for each row with messages, False for plain text."""
        return self._column("is_chat").view(np.bool_)

    @property
    def has_thought(self) -> NDArray[np.bool_]:
        """True for each chat with a thought in a learned answer."""
        return self._column("has_thought").view(np.bool_)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Number of each row's label in `words`; -1 without data.labels."""
        return self._column("labels")

    def __len__(self) -> int:
        return self._stored.count("ends") if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[operator.index(index)]
        place = number if self._chosen is None else int(self._chosen[number])
        start, stop = self._span(place, place)
        return _row(self._stored.read("text", start, stop).tobytes(), self.sources[number])

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks():
            yield from chunk.rows()

    def chunks(self) -> Iterator["Chunk"]:
        """Yield the rows in chunks, still packed."""
        for first in range(0, len(self), _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, len(self))
            places = np.arange(first, last) if self._chosen is None else self._chosen[first:last]
            low, high = int(places[0]), int(places[-1])
            start, stop = self._span(low, high)
            text = self._stored.read("text", start, stop)
            ends = self._stored.read("ends", low, high + 1) - start
            starts = np.concatenate([[0], ends[:-1]])
            found = self._stored.read("places", low, high + 1)[places - low]
            bounds = np.stack([starts, ends], axis=1)[places - low]
            yield Chunk(first, text.tobytes(), bounds, [self.sources.of(place) for place in found])

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """Return where the texts of consecutive rows begin and end."""
        start = int(self._stored.read("ends", first - 1, first)[0]) if first else 0
        return start, int(self._stored.read("ends", last, last + 1)[0])

    def _column(self, name: str) -> NDArray[Any]:
        values = whole(self._stored, name)
        return values if self._chosen is None else values[self._chosen]


@dataclass(frozen=True)
class Chunk:
    """Some rows as text. first: index of the first of them. bounds: of each text."""

    first: int
    text: bytes
    bounds: NDArray[np.int64]
    sources: list[str]

    def rows(self) -> list[Row]:
        """Make the rows."""
        return [
            _row(self.text[start:stop], source)
            for (start, stop), source in zip(self.bounds.tolist(), self.sources, strict=True)
        ]


class RowWriter:
    """Collects chunks of rows."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(folder)
        self._prefixes: dict[str, int] = {}
        self._words: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._text = self.count = 0
        self._has_weights = False
        self.append(packed([]))  # gives the columns their dtypes if no row follows

    def append(self, chunk: PackedRows) -> None:
        """Append a chunk of rows."""
        numbers = [self._prefixes.setdefault(prefix, len(self._prefixes)) for prefix in chunk.prefixes]
        places = chunk.columns["places"].copy()
        places[:, 0] = np.array([*numbers, 0], np.int64)[places[:, 0]]
        words = [self._words.setdefault(word, len(self._words)) for word in chunk.words]
        labels = np.array([*words, -1], np.int32)[chunk.columns["labels"]]  # -1 is the last one
        ends = chunk.columns["ends"] + self._text
        self._digest.update(chunk.columns["text"].tobytes() + chunk.columns["ends"].tobytes())
        self._writer.append(**{**chunk.columns, "ends": ends, "places": places, "labels": labels})
        self._has_weights |= chunk.has_weights
        self._text += len(chunk.columns["text"])
        self.count += len(chunk)

    @property
    def num_words(self) -> int:
        """Number of different labels so far."""
        return len(self._words)

    def finish(self) -> StoredRows:
        """Return all rows."""
        stored, digest = self._writer.finish(), self._digest.hexdigest()
        return StoredRows(stored, list(self._prefixes), digest, self._has_weights, list(self._words))
