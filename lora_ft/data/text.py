"""Files of text: strict UTF-8, as CSV or as paragraphs; a byte order mark is accepted at the start.

rows.csv:3      physical line where the row starts, also of .tsv and .txt
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.errors import DataError

MOST_LINE_BYTES = 16 * 2**20

# What no text holds: NUL, and the bytes that are no UTF-8, as `surrogateescape` decodes them.
_DAMAGE = re.compile("[\0\udc80-\udcff]")


def table(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
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
                yield f"{label}:{start}", values


def paragraphs(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """A document per paragraph: blank lines part documents, single line breaks stay in them."""
    text, damaged = _decode_damaged(path.read_bytes())
    paragraph: list[str] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            source, values = f"{label}:{number - len(paragraph)}", {"text": "\n".join(paragraph)}
            if not (damaged and _is_damaged(source, values, ledger)):
                yield source, values
            paragraph = []


def decode(data: bytes, label: str) -> str:
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


def _is_damaged(source: str, values: dict[str, str], ledger: Ledger) -> bool:
    for name, value in values.items():
        if found := _DAMAGE.search(name + value):
            ledger.add_bad(source, name, "holds NUL" if found[0] == "\0" else "is not UTF-8", value)
            return True
    return False
