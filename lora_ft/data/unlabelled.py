"""Read rows without their answers, for predictions; an answer that a row has is not used.

    {"text": "great film"}                                   data.prompt="{text}" data.answer="{label}"
    {"messages": [{"role": "user", "content": "great film"}]}
    {"prompt": "great film"}

Each row gets one of the labels as its answer, so that any format reads it as in training.
"""

from collections.abc import Iterator
from string import Formatter
from typing import Any

from lora_ft import config
from lora_ft.data import formats
from lora_ft.data.read import Rows
from lora_ft.data.rows import Ledger, Record
from lora_ft.data.sources import records

# The columns of answers, by a column of the prompt that a row has.
_ANSWERS = {"prompt": "completion", "instruction": "output"}
# Keys of a message's role and text, and the role of an answer, by the column of a chat.
_CHATS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}


def read(data: config.Data, key: str, label: str) -> tuple[Rows, dict[str, dict[str, Any]]]:
    """Read the rows of `data.path` as eval rows with the answer `label`; return them and their columns by source."""
    ledger = Ledger(data.strict)
    columns: dict[str, dict[str, Any]] = {}

    def answered() -> Iterator[Record]:
        for source, values in records(data.path, key, data, ledger):
            columns[source] = values
            yield source, _with_answer(values, data, label)

    found, rows, unused = formats.rows(answered(), data, ledger)
    return Rows(found, rows, [], [True] * len(rows), 0, unused, ledger), columns


def _with_answer(values: dict[str, Any], data: config.Data, label: str) -> dict[str, Any]:
    """Return the columns of a row with `label` where its format has the answer."""
    if data.answer is not None:
        fields = {field for _, field, _, _ in Formatter().parse(data.answer) if field}
        return values | {data.columns.get(field, field): label for field in fields}
    for name, (role, text, answerer) in _CHATS.items():
        column = data.columns.get(name, name)
        turns = values.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            before = turns[:-1] if turns[-1].get(role) in ("assistant", answerer) else turns
            return values | {column: [*before, {role: answerer, text: label}]}
    for prompt, answer in _ANSWERS.items():
        if data.columns.get(prompt, prompt) in values:
            return values | {data.columns.get(answer, answer): label}
    return values
