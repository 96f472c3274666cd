"""Render and tokenize rows in chunks, in processes if there are many.

rows, still as text -> chunks of a thousand -> Encoder: columns of examples, bad rows -> one set of columns

The result does not depend on the number of processes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data import cache, chat_template, tokenize, workers
from lora_ft.data.columns import Beside, Columns, Writer
from lora_ft.data.examples import ROW, columns_of
from lora_ft.data.parsing import FIRST_ROWS, until_full
from lora_ft.data.progress import counted
from lora_ft.data.row_store import Chunk, StoredRows
from lora_ft.data.rows import Example, Ledger, Row, any_of

Counts = dict[str, Counter[str]]


@dataclass(frozen=True)
class _Encoded:
    """The columns of a chunk of `rows` rows. written: rows by the added token in a prompt or text."""

    rows: int
    columns: dict[str, NDArray[Any]]
    written: Counter[str]
    ledger: Ledger


def encode(rows: StoredRows, tokenizer: Any, data: config.Data, ledger: Ledger) -> tuple[Columns, Counts]:
    """Return the columns of the examples of rows, and counts of rows; bad rows go into the ledger.

    The counts are those that rendering adds to a ledger, and `written`: rows by the added token in a prompt or text.
    """
    writer, written = Writer(cache.folder()), Counter[str]()
    counts, weights = Ledger(ledger.strict, bad=ledger.bad), _Weights()
    writer.append(**columns_of([]))
    processes = workers.number(data.workers) if len(rows) > FIRST_ROWS else 0
    found = workers.mapped(Encoder, (tokenizer, data), rows.chunks(), processes)
    for chunk in counted("tokenizing rows", found, lambda chunk: chunk.rows, len(rows)):
        counts.add(chunk.ledger)
        weights.add(chunk.columns.pop("weights", None), len(chunk.columns["ids"]))
        writer.append(**chunk.columns)
        written.update(chunk.written)
    return weights.beside(writer.finish()), {
        "left_out": counts.left_out,
        "converted": counts.converted,
        "written": written,
    }


class _Weights:
    """The weights of the tokens of all chunks, of which few may have any: then those of the others are 0 or 1."""

    def __init__(self) -> None:
        self._given, self._chunks = Writer(cache.folder()), list[tuple[bool, int]]()

    def add(self, weights: NDArray[np.float32] | None, tokens: int) -> None:
        """Add the weights of the tokens of the next chunk."""
        self._chunks.append((weights is not None, tokens))
        if weights is not None:
            self._given.append(weights=weights)

    def beside(self, stored: Columns) -> Columns:
        """Return columns with the weights, if any chunk has them."""
        if not any(has_weights for has_weights, _ in self._chunks):
            return stored
        given, made = self._given.finish(), Writer(cache.folder())
        start = taken = 0
        for has_weights, tokens in self._chunks:
            if has_weights:
                made.append(weights=given.read("weights", taken, taken + tokens))
                taken += tokens
            else:
                made.append(weights=stored.read("supervised", start, start + tokens).astype(np.float32))
            start += tokens
        return Beside(stored, made.finish())


class Encoder:
    """Renders and tokenizes chunks of rows."""

    def __init__(self, tokenizer: Any, data: config.Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._trials, self._vocabulary = chat_template.trials_of(tokenizer, data), tokenize.Vocabulary(tokenizer)
        self._added = any_of(t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip())

    def __call__(self, chunk: Chunk) -> _Encoded:
        rows, ledger, examples = chunk.rows(), Ledger(self._data.strict), list[Example]()
        with until_full(ledger):
            turns = chat_template.turns(rows, self._data, self._tokenizer, ledger, self._trials)
            for example in tokenize.encode(rows, turns, self._vocabulary, self._data.train_on, ledger):
                examples.append(example)
        columns = columns_of(examples)
        columns["documents"][:, ROW] += chunk.first
        return _Encoded(len(rows), columns, self._written(rows), ledger)

    def _written(self, rows: list[Row]) -> Counter[str]:
        """Count rows by each added token in a message that is not an answer, or in plain text.

        Answers may contain <think> and the like, which the model is to write. Added tokens of whitespace are only text.
        Special tokens in chats are refused, but plain text may use them on purpose to separate documents.
        """
        counts: Counter[str] = Counter()
        for row in rows:
            if row.messages and self._tokenizer.chat_template:
                texts = [str(message["content"]) for message in row.messages if message["role"] != "assistant"]
            else:
                texts = [row.plain_prompt or "", row.answer]
            counts.update({token for text in texts for token in self._added.findall(text)})
        return counts
