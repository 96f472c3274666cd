"""Find the rows in a JSON file that is one object.

{"data": [{...}, {...}]}                          rows
{"train": [{...}], "test": [{...}]}               rows by split, of which data.split chooses
{"prompt": ["a", "b"], "completion": ["c", "d"]}  columns; also {"prompt": {"0": "a", "1": "b"}, ...} of pandas
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_ft import config
from lora_ft.data.json_text import JsonText
from lora_ft.data.rows import Ledger, excerpt
from lora_ft.data.split_names import ALL_SPLITS, is_split, split_name
from lora_ft.data.text_files import open_text
from lora_ft.errors import DataError

_FIRST_KEY = re.compile(r'\{\s*"(\w+)"\s*:\s*[\[{]')


def rows(document: object, label: str, ledger: Ledger, split: str) -> Iterator[tuple[str, int, object]]:
    """Yield for each row the prefix of its number, its number and its values. Raises DataError for another object."""
    for name, part in _parts(document, split, label).items():
        if isinstance(part, dict):
            ledger.convert("file", "files of columns read as rows", label)
        found = _transposed(part, label) if isinstance(part, dict) else part
        for number, values in enumerate(found, 1):
            yield name, number, values


def _parts(document: object, split: str, label: str) -> dict[str, Any]:
    """Return rows or columns by the prefix of their rows' numbers: those of a split, or all."""
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        return {"": document["data"]}
    if parts := _splits(document):
        chosen = {name: rows for name, rows in parts.items() if split in (ALL_SPLITS, split_name(name.lower()))}
        if not (chosen := chosen or {name: rows for name, rows in parts.items() if split == name}):
            raise DataError(f"{label}: has no rows of the split {split}: it has {', '.join(sorted(parts))}")
        return {f"{name} ": rows for name, rows in chosen.items()}
    if _is_columns(document):
        return {"": document}
    raise DataError(
        f'{label}: must be a list of objects, {{"data": [...]}} around one, {{"train": [...], "test": [...]}} or '
        f'columns as in {{"prompt": [...], "completion": [...]}}: {excerpt(json.dumps(document, ensure_ascii=False))}'
    )


def _splits(document: object) -> dict[str, Any]:
    """Return the rows or columns of a document by split; empty if its keys are not names of splits."""
    if not isinstance(document, dict) or not all(map(is_split, document)):
        return {}
    has_rows = all(
        all(isinstance(row, dict) for row in rows) if isinstance(rows, list) else _is_columns(rows)
        for rows in document.values()
    )
    return document if has_rows else {}


def _is_columns(document: object) -> bool:
    """Return True for columns of lists, or of objects with numbered values as pandas writes them.

    A list of messages is no column: {"messages": [{"role": ...}, ...]} is one row.
    """
    if not isinstance(document, dict) or not document:
        return False
    columns = list(document.values())
    if all(isinstance(column, list) for column in columns):
        return not any(isinstance(i, dict) and ("role" in i or "from" in i) for column in columns for i in column[:1])
    return all(isinstance(column, dict) and column and all(map(str.isdecimal, column)) for column in columns)


def _transposed(columns: dict[str, Any], label: str) -> Iterator[dict[str, Any]]:
    keys = {name: tuple(column) if isinstance(column, dict) else len(column) for name, column in columns.items()}
    if len(set(keys.values())) > 1:
        shown = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise DataError(f"{label}: columns must have the same number of rows, got {excerpt(shown)}")
    values = (list(column.values()) if isinstance(column, dict) else column for column in columns.values())
    return (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def splits(file: Path) -> set[str]:
    """Return the splits of a file like {"train": [...], "test": [...]}, which is read whole; empty for another file."""
    stat = file.stat()
    return _known_splits(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _known_splits(file: Path, modified_ns: int, num_bytes: int) -> set[str]:
    try:
        with open_text(file, str(file), Ledger(), config.Data()) as pieces:
            text = JsonText(pieces)
            text.next_character()
            first = _FIRST_KEY.match(text.text, text.position)
            document = text.value(str(file)) if first and is_split(first[1]) else None
    except (json.JSONDecodeError, DataError):  # reported when the rows are read
        return set()
    return {split_name(name.lower()) for name in _splits(document)} if document else set()
