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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_ft import foreign
from lora_ft.data import chatterbot
from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.errors import DataError, SecurityError

MOST_LINE_BYTES = 16 * 2**20
MOST_NESTED = 64

# What a Parquet file may unpack to: so many times its size, and always so many bytes.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED = 2**30

_DEPTH_REASON = f"nested more than {MOST_NESTED} deep"

# What no text holds: NUL, and the bytes that are no UTF-8, as `surrogateescape` decodes them.
_DAMAGE = re.compile("[\0\udc80-\udcff]")

# Strings are matched to be stepped over.
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)

# What pyarrow raises for a value that Python has no such thing for: bytes that are no text, years beyond 9999.
_NO_PLAIN_VALUE = (ValueError, OverflowError, LookupError, NotImplementedError)

# An escape of half a surrogate pair: json accepts it alone, no tokenizer does.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of one file by its suffix; `label` stands for the file in places. Raises DataError."""
    try:
        yield from READERS[path.suffix.lower()](path, label, ledger)
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror or excerpt(error)}") from error


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
        if _too_deep(text) is not None:
            raise RowError("row", _DEPTH_REASON)
        values = _DECODER.decode(text)
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


def _json(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A list of objects, or {"data": [...]}; a file of JSON lines under this suffix is read as such."""
    text = _decode(path.read_bytes(), label)
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
            yield from _jsonl(path, label, ledger)
            return
        shown = excerpt(text, near=error.pos)
        raise DataError(f"{label}:{error.lineno}: column {error.colno}: not JSON: {error.msg}: {shown}") from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        why = f": {refused[0]}" if refused else ""
        raise DataError(f'{label}: must be a list of objects, or {{"data": [...]}} around one{why}: {excerpt(text)}')
    for number, values in enumerate(rows, 1):
        place = f"{label}:row {number}"
        try:
            if refused and (inside := _refused_in(values)):
                raise inside
            if not isinstance(values, dict) or not values:
                raise RowError("row", "must be an object with columns")
            _refuse_surrogates(values)
        except RowError as error:
            ledger.add_bad(place, error.name, error.reason, values if error.shown is None else error.shown)
        else:
            yield Record(place, values)


def _refused_in(value: object) -> RowError | None:
    """The first error that stands in the place of a value."""
    if isinstance(value, RowError):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_refused_in, inner)), None)


def _csv(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A header and rows of as many fields, separated by commas (.tsv: tabs), quoted as RFC 4180 says."""
    csv.field_size_limit(MOST_LINE_BYTES)  # the module's own limit of 128 KiB is shorter than a long document
    text, damaged = _decode_damaged(path.read_bytes())
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{label}:1: header: {error}: {excerpt(text)}") from None
    named = [name for name in header if name]  # pandas writes its index as a column without a name
    if not named or len(set(named)) < len(named):
        raise DataError(f"{label}:1: header: column names must be given and differ: {excerpt(header)}")
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:  # the reader goes on behind the line that it stopped at
            ledger.add_bad(f"{label}:{start}", "row", str(error), text.split("\n", start)[start - 1])
            continue
        if fields is None:
            return
        if fields and len(fields) != len(header):
            reason = f"{len(fields)} fields where the header has {len(header)}"
            ledger.add_bad(f"{label}:{start}", "row", reason, fields)
        elif fields:
            values = dict(zip(header, fields, strict=True))
            if not (damaged and _is_damaged(f"{label}:{start}", values, ledger)):
                yield Record(f"{label}:{start}", values)


def _parquet(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise DataError(f"{label}: two columns have one name: {excerpt(file.schema_arrow.names)}")
            for batch in _batches(file, path, label):
                for values in _plain_rows(batch):
                    number += 1
                    if isinstance(values, RowError):
                        ledger.add_bad(f"{label}:row {number}", values.name, values.reason, values.shown)
                    else:
                        yield Record(f"{label}:row {number}", values)
    # Damaged pages come as OSError without a number.
    except (pyarrow.ArrowException, OSError) as error:
        ledger.add_bad(f"{label}:row {number + 1}", "file", "not readable as Parquet", error)


def _batches(file: Any, path: Path, label: str) -> Iterator[Any]:
    """The batches of a Parquet file, as long as they unpack to no more than a file of rows plausibly does.

    Pages are compressed, and a dictionary holds a value once that a million rows name: 800 bytes can mean 20 GB.
    """
    from pyarrow import compute, types

    allowed = max(_ALWAYS_UNPACKED, _MOST_UNPACKED * path.stat().st_size)
    total = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    if total > allowed:
        raise SecurityError(f"{label} would unpack to {total:,} bytes, {allowed:,} are allowed for its size")
    total = 0
    for batch in file.iter_batches(batch_size=1024):
        total += batch.nbytes
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if types.is_dictionary(column.type) and _is_text(column.type.value_type):
                total += len(column) * (compute.max(compute.binary_length(column.dictionary)).as_py() or 0)
            elif _has_dictionary(column.type) and not types.is_dictionary(column.type):
                raise DataError(f"{label}: {name}: a dictionary inside of {excerpt(column.type)} cannot be read")
        if total > allowed:
            raise SecurityError(f"{label} unpacks to more than {allowed:,} bytes, which are allowed for its size")
        yield batch


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind))


def _has_dictionary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_dictionary(kind) or any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _plain_rows(batch: Any) -> Iterable[dict[str, Any] | RowError]:
    """The rows of a batch as Python's own values; one by one where a value has no such form, to find it."""
    try:
        return batch.to_pylist()
    except _NO_PLAIN_VALUE:
        return (_plain_row(batch.slice(i, 1)) for i in range(batch.num_rows))


def _plain_row(one: Any) -> dict[str, Any] | RowError:
    values = {}
    for name, column in zip(one.schema.names, one.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return RowError(name, f"not UTF-8 at byte {error.start + 1}", error.object.decode("utf-8", "replace"))
        except _NO_PLAIN_VALUE as error:
            return RowError(name, f"cannot be read: {error}", column.type)
    return values


def _txt(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A document per paragraph: blank lines part documents, single line breaks stay in them."""
    text, damaged = _decode_damaged(path.read_bytes())
    paragraph: list[str] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            place, values = f"{label}:{number - len(paragraph)}", {"text": "\n".join(paragraph)}
            if not (damaged and _is_damaged(place, values, ledger)):
                yield Record(place, values)
            paragraph = []


def _yaml(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    data = path.read_bytes()
    foreign.check_yaml(data, label, DataError)
    return chatterbot.conversations(_decode(data, label), label, ledger)


def _decode(data: bytes, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{label}:{line}: not UTF-8: byte 0x{data[error.start]:02x}") from None


def _decode_damaged(data: bytes) -> tuple[str, bool]:
    """The text, and whether `_DAMAGE` is to be found in it: rows are told apart first, and then the bad ones named."""
    try:
        return data.decode("utf-8-sig"), b"\0" in data
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "surrogateescape"), True


def _is_damaged(place: str, values: dict[str, str], ledger: Ledger) -> bool:
    for name, value in values.items():
        if found := _DAMAGE.search(name + value):
            ledger.add_bad(place, name, "holds NUL" if found[0] == "\0" else "is not UTF-8", value)
            return True
    return False


READERS: dict[str, Callable[[Path, str, Ledger], Iterator[Record]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".txt": _txt, ".yml": _yaml, ".yaml": _yaml,
}  # fmt: skip
