"""Make rows of a table by two templates over its columns, one for the prompt and one for the answer.

    data.prompt="Translate to German: {english}"  data.answer="{german}"

    english,german
    good morning,guten Morgen        ->   user: Translate to German: good morning   assistant: guten Morgen

Without a chat template the prompt ends with Alpaca's heading of the answer, which separates the two. `{{` and `}}`
are literal braces. A field is the whole name of a column, spaces included: no attributes, indices or conversions. A
list in the column that is the whole answer, as in data.answer={labels}, becomes JSON text.
"""

import json
import math
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any

from lora_ft import config
from lora_ft.data.rows import ANSWER_CUE, Ledger, Row, RowError, is_blank
from lora_ft.errors import ConfigError

Parse = Callable[[str, dict[str, Any], Ledger], Row]


def parser(data: config.Data, columns: Iterable[str]) -> tuple[Parse, list[str]]:
    """Return a function that makes a row by `data.prompt` and `data.answer`, and the columns that it reads.

    Raises ConfigError for a template that is missing, malformed, or names no column or an unknown one.
    """
    known = set(columns) - {""}
    prompt = _compile("data.prompt", data.prompt, known)
    answer = _compile("data.answer", data.answer, known)
    # A row whose answer is one label, as data.labels says, has no list of them.
    listed = str(answer[0][1]) if len(answer) == 1 and not answer[0][0] and data.labels is None else ""

    def parse(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
        values = _with_lists_as_text(values, listed, ledger)
        question, reply = _filled(prompt, values, "data.prompt"), _filled(answer, values, "data.answer")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return Row(source, messages, reply, plain_prompt=question + ANSWER_CUE)

    return parse, [column for _, column in prompt + answer if column]


def text_alone(prompt: str, template: str | None) -> str:
    """Return the column of a prompt without the words around it, if its template has one column; else the prompt."""
    pieces = list(Formatter().parse(template or ""))
    if sum(column is not None for _, column, _, _ in pieces) != 1:
        return prompt
    before, *rest = (literal for literal, _, _, _ in pieces)
    after = "".join(rest)
    is_filled = prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after)
    return prompt[len(before) : len(prompt) - len(after)] if is_filled else prompt


def _compile(key: str, template: str | None, known: set[str]) -> list[tuple[str, str | None]]:
    """Split a template into pieces: literal text, and the column that follows it."""
    if not template:
        raise ConfigError(f"data.format=table needs data.prompt and data.answer; {key} is not set")
    pieces: list[tuple[str, str | None]] = []
    try:
        for literal, field, spec, conversion in Formatter().parse(template):
            # A column's name may contain "!" and ":", at which Python's format strings are split further.
            column = field and field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            if column is not None and column not in known:
                raise ConfigError(f"{key}: there is no column {column!r}; there are {', '.join(sorted(known))}")
            pieces.append((literal, column))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}: {template} (write {{{{ and }}}} for literal braces)") from None
    if not any(column for _, column in pieces):
        raise ConfigError(f"{key} names no column, so every row would be the same: {template}")
    return pieces


def _filled(pieces: list[tuple[str, str | None]], values: dict[str, Any], key: str) -> str:
    text = "".join(literal + (_cell(values, column) if column else "") for literal, column in pieces)
    if is_blank(text):
        raise RowError(key, "gives an empty text")
    return text


def _with_lists_as_text(values: dict[str, Any], column: str, ledger: Ledger) -> dict[str, Any]:
    """Return values in which the column that is the whole answer is text: a list of texts and numbers is JSON text."""
    value = values.get(column)
    if not isinstance(value, list) or any(not isinstance(each, str | int) for each in value):
        return values
    ledger.convert(column, "lists in the answer, written as JSON text", value)
    return values | {column: json.dumps(value, ensure_ascii=False)}


def _cell(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        raise RowError(column, "is missing or null")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list | bytes):
        raise RowError(column, f"must be text or a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # pandas writes NaN for a missing number
        raise RowError(column, f"must be text or a finite number, got {value}")
    text = str(value)
    if is_blank(text):
        raise RowError(column, "is empty")
    return text
