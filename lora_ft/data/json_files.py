"""Read JSON: lines, a list of objects, objects one after the other, columns of lists, and splits by name.

    chat.jsonl:12            a line of JSON lines; the first line of an object that takes several
    chat.json:row 3          an object of a list, counted from 1; a row of {"data": [...]} or {"prompt": [...], ...}
    chat.json:test row 3     a row of {"train": [...], "test": [...]}

The first value of a file decides what it is, whatever its suffix is. Lines, lists and objects are decoded while they
are read; a file that is one object is read whole.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from lora_ft import config
from lora_ft.data import json_documents
from lora_ft.data.json_text import SURROGATE, JsonText, parse_json
from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.data.streams import File, kind
from lora_ft.data.text_files import open_text
from lora_ft.errors import DataError


def records(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield the rows of a JSON file. Raises DataError for a document that is not JSON or holds no rows."""
    with open_text(file, label, ledger, data) as pieces:
        text = JsonText(pieces)
        try:
            yield from _records(text, label, ledger, data, is_document=kind(file) == ".json")
        except json.JSONDecodeError as error:
            line, column = text.place(error)
            shown = excerpt(text.text, near=error.pos)
            raise DataError(f"{label}:{line}: column {column}: not JSON: {error.msg}: {shown}") from None


def _records(text: "JsonText", label: str, ledger: Ledger, data: config.Data, *, is_document: bool) -> Iterator[Record]:
    """Choose the form by the first value: `[` begins a list, an object on one line is followed by other lines."""
    first = text.next_character()
    if first == "[":
        if not is_document:
            ledger.convert("file", "files of JSON lines read as one list", label)
        yield from _list(text, label, ledger)
        return
    if first != "{" and not is_document:
        yield from _lines(text.all_lines(), label, ledger)
        return
    start = text.position
    try:
        value = text.value(label)
    except (json.JSONDecodeError, DataError):
        if is_document:
            raise
        yield from _lines(text.all_lines(), label, ledger)
        return
    is_on_one_line = "\n" not in text.text[start : text.position]
    is_only_value = not text.next_character()
    if is_document and is_only_value:
        for part, number, values in json_documents.rows(value, label, ledger, data.split):
            yield from _row(f"{label}:{part}row {number}", values, text.has_surrogates, ledger)
    elif is_on_one_line:
        yield from _lines(text.all_lines(), label, ledger)
    else:
        ledger.convert("file", "files of objects that take several lines", label)
        text.position = start
        for line, values in _objects(text, label):
            yield from _row(f"{label}:{line}", values, text.has_surrogates, ledger)


def _lines(text: Iterable[str], label: str, ledger: Ledger) -> Iterator[Record]:
    for number, line in enumerate(text, 1):
        source = f"{label}:{number}"
        if not line.strip():
            continue
        try:
            found = _line(line, source, ledger)
        except json.JSONDecodeError as error:
            shown = excerpt(line, near=error.pos)
            ledger.add_bad(source, f"column {error.colno}", f"not JSON: {error.msg}", shown)
            continue
        except RowError as error:
            ledger.add_bad(source, error.name, error.reason, line)
            continue
        for values in found:
            yield from _row(source, values, bool(SURROGATE.search(line)), ledger, line)


def _line(line: str, source: str, ledger: Ledger) -> list[object]:
    """Return the objects of a line: one, or several with or without commas after them."""
    try:
        return [parse_json(line)]
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        try:
            found = [values for _, values in _objects(JsonText(iter([line])), source)]
        except (json.JSONDecodeError, DataError):
            raise error from None
        if not all(isinstance(values, dict) for values in found):
            raise
    ledger.convert("line", "lines with several objects, or with a comma at the end", line)
    return found


def _list(text: "JsonText", label: str, ledger: Ledger) -> Iterator[Record]:
    text.position += 1
    number, is_at_end = 0, text.next_character() == "]"
    while not is_at_end:
        number += 1
        text.begin = text.position
        source = f"{label}:row {number}"
        yield from _row(source, text.value(source), text.has_surrogates, ledger)
        is_at_end = text.next_character() == "]"
        if not is_at_end:
            text.skip(",")
    text.skip("]")
    if text.next_character():
        raise json.JSONDecodeError("Extra data", text.text, text.position)


def _objects(text: "JsonText", source: str) -> Iterator[tuple[int, object]]:
    """Yield values that follow each other, with or without a comma between, and the line on which each begins."""
    while text.next_character():
        text.begin = text.position
        yield text.line(), text.value(source)
        if text.next_character() == ",":
            text.position += 1


def _row(source: str, values: object, has_surrogates: bool, ledger: Ledger, shown: object = None) -> Iterator[Record]:
    """Yield a row; one without columns, or with half of a surrogate pair, goes into the ledger."""
    try:
        yield source, _columns(values, has_surrogates)
    except RowError as error:
        ledger.add_bad(source, error.name, error.reason, values if shown is None else shown)


def _columns(values: object, has_surrogates: bool) -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        raise RowError("row", "must be an object with columns")
    for name, value in values.items() if has_surrogates else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(name, "holds half of a surrogate pair, which is not a character") from None
    return values
