"""Read rows without their answers, for predictions; an answer that a row has is not used.

    {"text": "great film"}                                   data.prompt="{text}" data.answer="{label}"
    {"messages": [{"role": "user", "content": "great film"}]}
    {"prompt": "great film"}

Each row gets one of the labels as its answer, so that any format reads it as in training.
"""

from string import Formatter
from typing import Any

import numpy as np

from lora_ft import config
from lora_ft.data import cache
from lora_ft.data.json_values import decoded
from lora_ft.data.messages import is_of_assistant
from lora_ft.data.parsing import append_rows
from lora_ft.data.read import Rows
from lora_ft.data.row_store import RowWriter
from lora_ft.data.rows import Ledger, Record
from lora_ft.data.synonyms import SYNONYMS

# Columns of prompts, each with the column of its answer.
_PAIRS = [
    ("prompt", "completion"),
    ("instruction", "output"),
    *((names.in_file[0], names.in_file[1]) for names in SYNONYMS if len(names.in_file) == 2),
]
_CHATS = ("messages", "conversations", "conversation")


def read(data: config.Data, key: str, label: str) -> tuple[Rows, dict[str, dict[str, Any]]]:
    """Read the rows of `data.path` as eval rows with the answer `label`; return them and their columns by source."""
    ledger, writer = Ledger(data.strict), RowWriter(cache.folder())
    columns: dict[str, dict[str, Any]] = {}

    def answered(record: Record) -> Record:
        source, columns[source] = record
        return source, _with_answer(columns[source], data, label)

    found, unused = append_rows(key, data, writer, ledger, answered)
    rows = writer.finish()
    return Rows(found, rows, np.ones(len(rows), np.bool_), 0, unused, ledger), columns


def _with_answer(values: dict[str, Any], data: config.Data, label: str) -> dict[str, Any]:
    """Return the columns of a row with `label` where its format has the answer."""
    if data.answer is not None:
        fields = {field for _, field, _, _ in Formatter().parse(data.answer) if field}
        return values | {data.columns.get(field, field): label for field in fields}
    for column in (data.columns.get(name, name) for name in _CHATS):
        turns = values.get(column)
        if isinstance(turns, str):
            turns = decoded(column, turns)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            role, text, answerer = ("role", "content", "assistant") if "role" in turns[-1] else ("from", "value", "gpt")
            before = turns[:-1] if is_of_assistant(turns[-1].get(role)) else turns
            return values | {column: [*before, {role: answerer, text: label}]}
    pairs = [(data.columns.get(prompt, prompt), data.columns.get(answer, answer)) for prompt, answer in _PAIRS]
    for prompt, answer in sorted(pairs, key=lambda pair: pair[1] not in values):  # an answer that is there goes first
        if prompt in values:
            return values | {answer: label}
    return values
