"""Files of rows: JSON lines, JSON, CSV, Parquet, plain text and ChatterBot YAML, each row with its place.

    chat.jsonl:12        physical line, also of .csv (where the row starts) and .yml
    chat.json:row 3      counted from 1, also of .parquet

Text is strict UTF-8; a byte order mark is accepted at the start of a file. Readers never skip a row silently:
a bad one goes into the ledger with place, field, reason and an excerpt.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_ft.data import chatterbot
from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.errors import DataError

MOST_LINE_BYTES = 16 * 2**20

# An escape of half a surrogate pair: json accepts it alone, no tokenizer does.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of one file by its suffix; `label` stands for the file in places. Raises DataError."""
    try:
        yield from READERS[path.suffix.lower()](path, label, ledger)
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror}") from error


def _jsonl(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            place = f"{label}:{number}"
            if len(line) > MOST_LINE_BYTES:
                ledger.add_bad(place, "line", f"longer than {MOST_LINE_BYTES // 2**20} MiB", line[:200])
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE_BYTES)
            elif values := _parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place, ledger):
                yield Record(place, values)


def _parse_line(line: bytes, place: str, ledger: Ledger) -> dict[str, Any] | None:
    """The object of one line; None for an empty line and for a bad one, which the ledger then holds."""
    if not line.strip():
        return None
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        ledger.add_bad(place, "line", f"not UTF-8 at byte {error.start + 1}", line[:200].decode("utf-8", "replace"))
        return None
    try:
        values = _parse_json(text)
        if not isinstance(values, dict) or not values:
            raise RowError("row", "must be an object with columns")
        if _SURROGATE.search(text):
            _refuse_surrogates(values)
    except json.JSONDecodeError as error:
        ledger.add_bad(place, f"column {error.colno}", f"not JSON: {error.msg}", excerpt(text, near=error.pos))
        return None
    except RowError as error:
        ledger.add_bad(place, error.name, error.reason, text)
        return None
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(twice, "key occurs twice in one object")
    return values


def _no_constant(name: str) -> None:
    raise RowError("number", f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RowError("number", f"{digits[:40]} is too large")
    return value


# One decoder for all lines: json.loads with hooks builds a new one each time, at half the speed.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _parse_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise RowError("row", "nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise RowError("number", str(error).split(":")[0]) from None


def _refuse_surrogates(values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(ascii(name)[1:-1], "holds half a surrogate pair, which is no character") from None


def _json(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A list of objects, or {"data": [...]}; a file of JSON lines under this suffix is read as such."""
    text = _decode(path.read_bytes(), label)
    try:
        document = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path, label, ledger)
            return
        shown = excerpt(text, near=error.pos)
        raise DataError(f"{label}:{error.lineno}: column {error.colno}: not JSON: {error.msg}: {shown}") from None
    except RowError as error:
        raise DataError(f"{label}: {error.name}: {error.reason}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DataError(f'{label}: must be a list of objects, or {{"data": [...]}} around one: {excerpt(text)}')
    for number, values in enumerate(rows, 1):
        place = f"{label}:row {number}"
        try:
            if not isinstance(values, dict) or not values:
                raise RowError("row", "must be an object with columns")
            _refuse_surrogates(values)
        except RowError as error:
            ledger.add_bad(place, error.name, error.reason, json.dumps(values))
        else:
            yield Record(place, values)


def _csv(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A header and rows of as many fields, separated by commas (.tsv: tabs), quoted as RFC 4180 says."""
    csv.field_size_limit(MOST_LINE_BYTES)  # the module's own limit of 128 KiB is shorter than a long document
    lines = io.StringIO(_decode(path.read_bytes(), label), newline="\n")
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    start = 1
    try:
        header = next(reader, [])
        named = [name for name in header if name]  # pandas writes its index as a column without a name
        if not named or len(set(named)) < len(named):
            raise DataError(f"{label}:1: header: column names must be given and differ: {excerpt(header)}")
        while True:
            start = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if len(fields) == len(header):
                yield Record(f"{label}:{start}", dict(zip(header, fields, strict=True)))
            elif fields:
                reason = f"{len(fields)} fields where the header has {len(header)}"
                ledger.add_bad(f"{label}:{start}", "row", reason, fields)
    except csv.Error as error:
        raise DataError(f"{label}:{start}: row: {error}") from None


def _parquet(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise DataError(f"{label}: two columns have one name: {excerpt(file.schema_arrow.names)}")
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{label}:row {number}", values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{label}:row {number + 1}: not readable as Parquet: {excerpt(error)}") from None


def _txt(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A document per paragraph: blank lines part documents, single line breaks stay in them."""
    paragraph: list[str] = []
    for number, line in enumerate([*_decode(path.read_bytes(), label).replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Record(f"{label}:{number - len(paragraph)}", {"text": "\n".join(paragraph)})
            paragraph = []


def _yaml(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    return chatterbot.conversations(_decode(path.read_bytes(), label), label, ledger)


def _decode(data: bytes, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{label}:{line}: not UTF-8: byte 0x{data[error.start]:02x}") from None


READERS: dict[str, Callable[[Path, str, Ledger], Iterator[Record]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".txt": _txt, ".yml": _yaml, ".yaml": _yaml,
}  # fmt: skip
