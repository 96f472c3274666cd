"""Render and tokenize rows in chunks, in processes if there are many.

rows, still as text -> chunks of a thousand -> Encoder: columns of examples, bad rows -> one set of columns

The result does not depend on the number of processes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data import chat_template, tokenize, workers
from lora_ft.data.columns import Columns, Writer
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
    writer, written = Writer(), Counter[str]()
    counts = Ledger(ledger.strict, bad=ledger.bad)
    writer.append(**columns_of([], has_weights=rows.has_weights))
    processes = workers.number(data.workers) if len(rows) > FIRST_ROWS else 0
    found = workers.mapped(Encoder, (tokenizer, data, rows.has_weights), rows.chunks(), processes)
    for chunk in counted("tokenizing rows", found, lambda chunk: chunk.rows, len(rows)):
        counts.add(chunk.ledger)
        writer.append(**chunk.columns)
        written.update(chunk.written)
    return writer.finish(), {"left_out": counts.left_out, "converted": counts.converted, "written": written}


class Encoder:
    """Renders and tokenizes chunks of rows; has_weights: some row has a message with a weight."""

    def __init__(self, tokenizer: Any, data: config.Data, has_weights: bool) -> None:
        self._tokenizer, self._data, self._has_weights = tokenizer, data, has_weights
        self._trials, self._vocabulary = chat_template.trials_of(tokenizer, data), tokenize.Vocabulary(tokenizer)
        self._added = any_of(t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip())

    def __call__(self, chunk: Chunk) -> _Encoded:
        rows, ledger, examples = chunk.rows(), Ledger(self._data.strict), list[Example]()
        with until_full(ledger):
            turns = chat_template.turns(rows, self._data, self._tokenizer, ledger, self._trials)
            for example in tokenize.encode(rows, turns, self._vocabulary, self._data.train_on, ledger):
                examples.append(example)
        columns = columns_of(examples, has_weights=self._has_weights)
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
