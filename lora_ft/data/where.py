"""Keep the rows whose columns have the values of `data.where`, before columns are renamed.

    data.where.source=rotten_tomatoes  data.where.label=[1,2]     both must hold; a list: any of its values

Values are compared as text; numbers, booleans and null in the form that they have in JSON.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any

from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.errors import ConfigError

LEFT_OUT = "without the values of data.where"
_MOST_SHOWN = 10


def selected(records: Iterable[Record], where: dict[str, Any], path: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows that `where` selects, and count the others.

    Raises ConfigError at the end for a column or value that no row has, and for values that no row has together.
    """
    wanted = {column: set(_values(column, value)) for column, value in where.items()}
    missing = {column: set(values) for column, values in wanted.items()}  # values that no row had yet
    known: dict[str, dict[str, None]] = {column: {} for column in wanted}
    columns: dict[str, None] = {}
    num_kept = num_left_out = 0
    for source, values in records:
        has_all = True
        if not all(known.values()):  # a column is not found yet
            columns |= dict.fromkeys(values)
        for column, any_of in wanted.items():
            text = _text(values[column]) if column in values else None
            has_all &= text in any_of
            if text is not None:
                missing[column].discard(text)
                if len(known[column]) < _MOST_SHOWN:
                    known[column][text] = None
        if has_all:
            num_kept += 1
            yield source, values
        else:
            num_left_out += 1
            ledger.left_out[LEFT_OUT] += 1
    if num_kept + num_left_out:
        _check(missing, known, list(columns), num_kept, path)


def _check(
    missing: dict[str, set[str]], known: dict[str, dict[str, None]], columns: list[str], num_kept: int, path: str
) -> None:
    for column, values in missing.items():
        if column not in columns:
            raise ConfigError(f"data.where.{column}: no row of {path} has this column; there are {_listed(columns)}")
        if values:
            value = excerpt(sorted(values)[0])
            raise ConfigError(f"data.where.{column}: no row of {path} has the value {value}; there are "
                              f"{_listed(list(known[column]))}")  # fmt: skip
    if not num_kept:
        raise ConfigError(f"data.where: no row of {path} has all of these values: {', '.join(missing)}")


def _values(column: str, value: object) -> Iterator[str]:
    """Yield the values of a setting as text; a list may be written as text, as the command line does."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = next(csv.reader([value[1:-1]], skipinitialspace=True), [])
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list | dict):
            raise ConfigError(f"data.where.{column} must be a value or a list like [a,b], got {excerpt(value)}")
        yield _text(item)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _listed(names: list[str]) -> str:
    shown = [excerpt(name, longest=40) for name in names[:_MOST_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) >= _MOST_SHOWN else "")
