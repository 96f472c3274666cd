"""Labelled tables: a prompt and an answer written over the columns of each row.

    data.prompt="Translate to German: {english}"  data.answer="{german}"

    english,german
    good morning,guten Morgen        ->   user: Translate to German: good morning   assistant: guten Morgen

Without a chat template something else must part the two: the prompt then ends with Alpaca's heading of the answer.

`{{` and `}}` stand for braces. A field is a column's whole name, spaces included; nothing else is looked up.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from lora_ft import config
from lora_ft.data.rows import ANSWER_CUE, Row, RowError, is_blank
from lora_ft.errors import ConfigError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def parser(data: config.Data, columns: Iterable[str]) -> Callable[[str, dict[str, Any]], Row]:
    """A function that makes rows by `data.prompt` and `data.answer`; ConfigError for a template that cannot work."""
    known = set(columns) - {""}
    prompt = _compile("data.prompt", data.prompt, known)
    answer = _compile("data.answer", data.answer, known)

    def parse(source: str, values: dict[str, Any]) -> Row:
        question, reply = _filled(prompt, values, "data.prompt"), _filled(answer, values, "data.answer")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return Row(source, messages, reply, plain_prompt=question + ANSWER_CUE)

    return parse


def fields(data: config.Data) -> list[str]:
    """The columns that the two templates name."""
    return [
        match[1] for template in (data.prompt, data.answer) for match in _PIECE.finditer(template or "") if match[1]
    ]


def _compile(key: str, template: str | None, known: set[str]) -> list[tuple[str, str]]:
    """Pieces of a template: literal text, and the name of the column that follows it."""
    if not template:
        raise ConfigError(f"data.format=table needs data.prompt and data.answer; {key} is not given")
    pieces, literal, end = [], "", 0
    for match in _PIECE.finditer(template):
        literal += template[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            literal += match[0][0]
        elif match[1] is None:
            raise ConfigError(f"{key}: a single {match[0]} at character {match.start() + 1}: write {match[0] * 2}")
        elif match[1] not in known:
            raise ConfigError(f"{key}: there is no column {match[1]!r}; there are {', '.join(sorted(known))}")
        else:
            pieces.append((literal, match[1]))
            literal = ""
    if not pieces:
        raise ConfigError(f"{key} names no column, so that every row would be the same: {template}")
    return [*pieces, (literal + template[end:], "")]


def _filled(pieces: list[tuple[str, str]], values: dict[str, Any], key: str) -> str:
    text = "".join(literal + (_cell(values, column) if column else "") for literal, column in pieces)
    if is_blank(text):
        raise RowError(key, "gives an empty text")
    return text


def _cell(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        raise RowError(column, "is missing or null")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list | bytes):
        raise RowError(column, f"must be text or a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # how pandas writes a number that is missing
        raise RowError(column, f"is {value}, which is no value")
    text = str(value)
    if is_blank(text):
        raise RowError(column, "is empty")
    return text
