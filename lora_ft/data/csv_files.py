"""Read tables with a header: .csv and .tsv files, quoted as in RFC 4180.

    question;answer              semicolons, because they alone give every row as many fields as the header
    sep=;                        the same, as Excel writes it
    question, answer             blanks around names are dropped, there and around fields

A delimiter other than the usual one of the suffix is a conversion, unless `data.delimiter` names it. A row's source is
the first of its lines.
"""

import csv
import re
from collections.abc import Iterator
from itertools import chain, islice

from lora_ft import config
from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.data.streams import File, kind
from lora_ft.data.text_files import lines, open_text
from lora_ft.errors import DataError

_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", r"\t": "\t", "pipe": "|"}
_CANDIDATES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
_SEP = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)
_LINES_TO_COMPARE = 200


def records(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield the rows below the header. Raises DataError for a header that does not name the columns."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    with open_text(file, label, ledger, data) as pieces:
        text = lines(pieces)
        head = list(islice(text, _LINES_TO_COMPARE))
        is_whole = len(head) < _LINES_TO_COMPARE
        named = _SEP.fullmatch(head[0]) if head else None
        first = 2 if named else 1  # number of the line of the header
        delimiter = _NAMES.get(data.delimiter or "", data.delimiter)
        if named and not delimiter:
            delimiter = named[1]
            ledger.convert("file", "files whose first line names the delimiter", head[0])
        if not delimiter:
            usual = "\t" if kind(file) == ".tsv" else ","
            delimiter = _detected(head, is_whole, usual, label)
            if delimiter != usual:
                ledger.convert("file", f"files with {_CANDIDATES[delimiter]} between fields", head[0])
        yield from _table(chain(head[first - 1 :], text), first, delimiter, label, ledger)


def _table(text: Iterator[str], first: int, delimiter: str, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of a table whose header begins on line `first`."""
    of_row: list[str] = []  # the lines that the reader took for the row
    text = _kept(text, of_row)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if has_blanks := any(name != name.strip() for name in header):
            ledger.convert("header", "files with blanks around columns' names, dropped there and around fields", header)
            header = [name.strip() for name in next(csv.reader(of_row, reader.dialect, skipinitialspace=True))]
    except csv.Error as error:
        raise DataError(f"{label}:{first}: header: {error}: {excerpt(''.join(of_row))}") from None
    named = [name for name in header if name]  # pandas writes its index as a column without a name
    if not named or len(set(named)) < len(named):
        raise DataError(f"{label}:{first}: header: must name the columns, each differently, got {excerpt(header)}")
    line = first + reader.line_num
    reader = csv.reader(text, reader.dialect, skipinitialspace=has_blanks)
    while True:
        start = line + reader.line_num
        source = f"{label}:{start}"
        of_row.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:  # the next call continues after the line of the error
            ledger.add_bad(source, "row", str(error), of_row[0])
            continue
        if fields is None:
            return
        if fields and len(fields) != len(header):
            ledger.add_bad(source, "row", f"has {len(fields)} fields, the header has {len(header)}", fields)
        elif fields:
            values = [field.rstrip(" \t") for field in fields] if has_blanks else fields
            yield source, dict(zip(header, values, strict=True))


def _kept(text: Iterator[str], of_row: list[str]) -> Iterator[str]:
    for line in text:
        of_row.append(line)
        yield line


def _detected(head: list[str], is_whole: bool, usual: str, label: str) -> str:
    """Return the delimiter that gives all rows as many fields as the header, if one alone does, or the usual one does.

    Raises DataError if several delimiters do, or none that divides the header does.
    """
    counts = {delimiter: _num_fields(head, is_whole, delimiter) for delimiter in _CANDIDATES}
    dividing = [delimiter for delimiter, found in counts.items() if found and found[0] > 1]
    fitting = [delimiter for delimiter in dividing if len(set(counts[delimiter])) == 1]
    if usual in fitting or not dividing or (usual in dividing and not fitting):
        return usual
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(f"{counts[d][0]} separated by {_CANDIDATES[d]}" for d in fitting or dividing)
    reason = "in all rows" if fitting else "but some rows have more or fewer"
    raise DataError(
        f"{label}:1: header: has {shown}, {reason}: set data.delimiter to one of {', '.join(sorted(_NAMES))} or a "
        f"character: {excerpt(head[0])}"
    )


def _num_fields(head: list[str], is_whole: bool, delimiter: str) -> list[int]:
    """Return the number of fields of each row, the header first; -1 for a row that is not quoted as in RFC 4180."""
    reader = csv.reader(head, delimiter=delimiter, strict=True, skipinitialspace=True)
    counts = []
    while True:
        try:
            fields = next(reader, None)
        except csv.Error:
            is_cut = not is_whole and reader.line_num == len(head)
            counts += [] if is_cut else [-1]
            continue
        if fields is None:
            return counts
        counts += [len(fields)] if fields else []
