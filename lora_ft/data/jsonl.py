"""JSON lines, and JSON that holds a list of rows: read by one decoder, which refuses what json would let pass.

    {"prompt": "2+2?", "completion": "4"}               chat.jsonl:1
    [{"prompt": "2+2?", "completion": "4"}, ...]        chat.json:row 1

Refused: a key twice in one object, NaN, numbers too large, brackets nested too deep, half a surrogate pair.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.data.text import MOST_LINE_BYTES, decode
from lora_ft.errors import DataError

MOST_NESTED = 64

_DEPTH_REASON = f"nested more than {MOST_NESTED} deep"

# Strings are matched to be stepped over.
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)

# An escape of half a surrogate pair: json accepts it alone, no tokenizer does.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def lines(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            source = f"{label}:{number}"
            if len(line) > MOST_LINE_BYTES:
                ledger.add_bad(source, "line", f"longer than {MOST_LINE_BYTES // 2**20} MiB", line[:200])
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE_BYTES)
            elif values := _parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, source, ledger):
                yield source, values


def _parse_line(line: bytes, source: str, ledger: Ledger) -> dict[str, Any] | None:
    """The object of one line; None for an empty line and for a bad one, which the ledger then holds."""
    if not line.strip():
        return None
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        ledger.add_bad(source, "line", f"not UTF-8 at byte {error.start + 1}", line[:200].decode("utf-8", "replace"))
        return None
    try:
        values = parse(text)
        if not isinstance(values, dict) or not values:
            raise RowError("row", "must be an object with columns")
    except json.JSONDecodeError as error:
        ledger.add_bad(source, f"column {error.colno}", f"not JSON: {error.msg}", excerpt(text, near=error.pos))
        return None
    except RowError as error:
        ledger.add_bad(source, error.name, error.reason, text)
        return None
    return values


def parse(text: str) -> object:
    """Decode one JSON value. Raises JSONDecodeError, and RowError for what json accepts and this module refuses."""
    if _too_deep(text) is not None:
        raise RowError("row", _DEPTH_REASON)
    value = _DECODER.decode(text)
    if isinstance(value, dict) and _SURROGATE.search(text):
        _refuse_surrogates(value)
    return value


def _too_deep(text: str) -> int | None:
    """Where JSON opens its bracket number MOST_NESTED + 1 inside of one another; None where it does not.

    json itself stops at Python's limit of recursion, which depends on who calls; what comes later recurses as well.
    """
    if text.count("[") + text.count("{") <= MOST_NESTED:
        return None
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth > MOST_NESTED:
                return match.start()
        elif match[0] in "]}":
            depth -= 1
    return None


def _decoder(refuse: Callable[[RowError], object]) -> json.JSONDecoder:
    """A decoder for all lines: json.loads with hooks builds a new one each time, at half the speed.

    `refuse` gets what json would let pass, and raises it or gives what stands in its place.
    """

    def unique(pairs: list[tuple[str, Any]]) -> object:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return refuse(RowError(twice, "key occurs twice in one object", pairs))

    def constant(name: str) -> object:
        return refuse(RowError("number", f"{name} is not JSON", name))

    def whole(digits: str) -> object:
        try:
            return int(digits)
        except ValueError:  # more digits than Python converts
            return refuse(RowError("number", f"of {len(digits)} digits is too large", digits))

    def finite(digits: str) -> object:
        value = float(digits)
        return refuse(RowError("number", f"{digits[:40]} is too large", digits)) if math.isinf(value) else value

    return json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant, parse_int=whole, parse_float=finite)


def _raise(error: RowError) -> object:
    raise error


_DECODER = _decoder(_raise)


def _refuse_surrogates(values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(ascii(name)[1:-1], "holds half a surrogate pair, which is no character") from None


def rows(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A list of objects, or {"data": [...]}; a file of JSON lines under this suffix is read as such."""
    text = decode(path.read_bytes(), label)
    if (deep := _too_deep(text)) is not None:
        line = text.count("\n", 0, deep) + 1
        raise DataError(f"{label}:{line}: row: {_DEPTH_REASON}: {excerpt(text, near=deep)}")
    refused: list[RowError] = []

    def note(error: RowError) -> RowError:
        refused.append(error)
        return error

    try:
        document = _decoder(note).decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from lines(path, label, ledger)
            return
        shown = excerpt(text, near=error.pos)
        raise DataError(f"{label}:{error.lineno}: column {error.colno}: not JSON: {error.msg}: {shown}") from None
    listed = document.get("data") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        why = f": {refused[0]}" if refused else ""
        raise DataError(f'{label}: must be a list of objects, or {{"data": [...]}} around one{why}: {excerpt(text)}')
    for number, values in enumerate(listed, 1):
        source = f"{label}:row {number}"
        try:
            if refused and (inside := _refused_in(values)):
                raise inside
            if not isinstance(values, dict) or not values:
                raise RowError("row", "must be an object with columns")
            _refuse_surrogates(values)
        except RowError as error:
            ledger.add_bad(source, error.name, error.reason, values if error.shown is None else error.shown)
        else:
            yield source, values


def _refused_in(value: object) -> RowError | None:
    """The first error that stands in the place of a value."""
    if isinstance(value, RowError):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_refused_in, inner)), None)
