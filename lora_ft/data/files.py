"""Read files of rows: JSON lines, JSON, CSV, Parquet, plain text and ChatterBot YAML.

    chat.jsonl:12        line of the file, counted from 1; also .csv (first line of the row), .txt and .yml
    chat.json:row 3      number of the row, counted from 1; also .parquet

Text is UTF-8, with or without a byte order mark. No row is skipped silently: a bad one goes into the ledger with its
source, field, reason and an excerpt. A file that cannot be read as a whole is a DataError.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_ft.data import chatterbot
from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.errors import DataError
from lora_ft.io import untrusted

# An escaped half of a surrogate pair. json accepts it without its other half; tokenizers fail on it.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of one file by its suffix; `label` is the file's name in sources. Raises DataError."""
    try:
        yield from READERS[path.suffix.lower()](path, label, ledger)
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror or excerpt(error)}") from error


def _json_lines(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{label}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield source, _columns(parse_json(text), bool(_SURROGATE.search(text)))
            except UnicodeDecodeError as error:
                shown = line.decode("utf-8", "replace")
                ledger.add_bad(source, "line", f"not UTF-8 at byte {error.start + 1}", shown)
            except json.JSONDecodeError as error:
                shown = excerpt(text, near=error.pos)
                ledger.add_bad(source, f"column {error.colno}", f"not JSON: {error.msg}", shown)
            except RowError as error:
                ledger.add_bad(source, error.name, error.reason, text)


def _json(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the objects of a list, or of the list in {"data": [...]}; JSON lines with this suffix are read as such."""
    text = _text(path, label)
    try:
        document = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path, label, ledger)
            return
        shown = excerpt(text, near=error.pos)
        raise DataError(f"{label}:{error.lineno}: column {error.colno}: not JSON: {error.msg}: {shown}") from None
    except RowError as error:
        raise DataError(f"{label}: {excerpt(error)}: {excerpt(text if error.shown is None else error.shown)}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DataError(f'{label}: must be a list of objects, or {{"data": [...]}} around one: {excerpt(text)}')
    has_surrogates = bool(_SURROGATE.search(text))
    for number, values in enumerate(rows, 1):
        try:
            yield f"{label}:row {number}", _columns(values, has_surrogates)
        except RowError as error:
            ledger.add_bad(f"{label}:row {number}", error.name, error.reason, values)


def parse_json(text: str) -> object:
    """Decode one JSON value.

    Raises JSONDecodeError, and RowError for JSON that cannot be a row: a key that occurs twice in an object, which
    would lose a value silently, an integer too long for Python, and nesting too deep for it.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise RowError("number", f"cannot be read: {error}") from None
    except RecursionError:
        raise RowError("row", "is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowError(twice, "key occurs twice in one object", pairs)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # built once: json.loads with a hook builds one per call


def _columns(values: object, has_surrogates: bool) -> dict[str, Any]:
    """Return the columns of a row; RowError if it has none, or holds half of a surrogate pair."""
    if not isinstance(values, dict) or not values:
        raise RowError("row", "must be an object with columns")
    for name, value in values.items() if has_surrogates else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(name, "holds half of a surrogate pair, which is not a character") from None
    return values


def _csv(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows below a header, quoted as in RFC 4180; fields are separated by commas, or by tabs in .tsv."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    text = _text(path, label)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{label}:1: header: {error}: {excerpt(text)}") from None
    named = [name for name in header if name]  # pandas writes its index as a column without a name
    if not named or len(set(named)) < len(named):
        raise DataError(f"{label}:1: header: must name the columns, each differently, got {excerpt(header)}")
    while True:
        start = reader.line_num + 1
        source = f"{label}:{start}"
        try:
            fields = next(reader, None)
        except csv.Error as error:  # the next call continues after the line of the error
            ledger.add_bad(source, "row", str(error), text.split("\n", start)[start - 1])
            continue
        if fields is None:
            return
        if fields and len(fields) != len(header):
            ledger.add_bad(source, "row", f"has {len(fields)} fields, the header has {len(header)}", fields)
        elif fields:
            yield source, dict(zip(header, fields, strict=True))


def _paragraphs(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield each paragraph as one document: blank lines separate documents, single line breaks are kept."""
    paragraph: list[str] = []
    for number, line in enumerate([*_text(path, label).replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield f"{label}:{number - len(paragraph)}", {"text": "\n".join(paragraph)}
            paragraph = []


def _text(path: Path, label: str) -> str:
    """Read a file as UTF-8. Raises DataError with the line of the first byte that is NUL or not UTF-8."""
    data = path.read_bytes()
    try:
        text, wrong = data.decode("utf-8-sig"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        line = data.count(b"\n", 0, wrong) + 1
        raise DataError(f"{label}:{line}: not UTF-8 text: byte 0x{data[wrong]:02x}; convert the file to UTF-8")
    return text


def _parquet(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield rows as Python's own values.

    Arrow has one schema for all rows: an object has the keys of all others at its position, null where it had none.
    These nulls are dropped. A null that was written into an object on purpose looks the same and is dropped too.
    """
    import pyarrow
    from pyarrow import parquet

    first = 1  # number of the first row of the batch
    try:
        with parquet.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise DataError(f"{label}: two columns have the same name: {excerpt(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=100):
                try:
                    rows = batch.to_pylist()
                # Values that Python cannot represent: text that is not UTF-8, years beyond 9999.
                except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
                    batch_rows = f"{label}:row {first} to row {first + batch.num_rows - 1}"
                    raise DataError(f"{batch_rows}: a value cannot be read: {excerpt(error)}") from None
                for number, values in enumerate(rows, first):
                    yield f"{label}:row {number}", untrusted.without_filled_nulls(values)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        ledger.add_bad(f"{label}:row {first}", "file", "not readable as Parquet", error)


def _yaml(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    data = path.read_bytes()
    untrusted.check_yaml(data, label, DataError)
    return chatterbot.conversations(data, label, ledger)


READERS: dict[str, Callable[[Path, str, Ledger], Iterator[Record]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv,
    ".parquet": _parquet, ".txt": _paragraphs, ".yml": _yaml, ".yaml": _yaml,
}  # fmt: skip
