"""Read files of rows by their suffix: JSON, tables, Arrow, plain text and ChatterBot YAML, each also compressed.

    chat.jsonl:12        line of the file, counted from 1; also .csv (first line of the row), .txt and .yml
    chat.json:row 3      number of the row, counted from 1; also .parquet and .arrow

No row is skipped silently: a bad one goes into the ledger with its source, field, reason and an excerpt. A file that
cannot be read as a whole is a DataError. Memory does not grow with the size of .jsonl, .csv, .txt, .parquet and .arrow
files, nor of a .json file that is a list.
"""

from collections.abc import Callable, Iterator

from lora_ft import config
from lora_ft.data import arrow_files, chatterbot, csv_files, json_files
from lora_ft.data.json_text import parse_json as parse_json
from lora_ft.data.rows import Ledger, Record, RowError
from lora_ft.data.streams import COMPRESSIONS, File, kind, open_bytes
from lora_ft.data.text_files import lines, open_text
from lora_ft.errors import DataError
from lora_ft.io import untrusted


def read_file(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield the rows of one file by its suffix; `label` is the file's name in sources. Raises DataError.

    `data.encoding`, `data.delimiter` and `data.split` say how to read a text, a table, and {"train": [...], ...}.
    """
    try:
        yield from READERS[kind(file)](file, label, ledger, data)
    except RowError as error:
        raise DataError(f"{label}: {error}") from None


def known_suffixes() -> str:
    """Return the suffixes of files of rows, for errors."""
    return f"{', '.join(READERS)}, each also with {', '.join(COMPRESSIONS)}, and .zip"


def _paragraphs(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield each paragraph as one document: blank lines separate documents, single line breaks are kept."""
    paragraph: list[str] = []
    number = 0
    with open_text(file, label, ledger, data) as pieces:
        for number, line in enumerate(lines(pieces), 1):
            if line.strip():
                paragraph.append(line.replace("\r\n", "\n").removesuffix("\n"))
            elif paragraph:
                yield f"{label}:{number - len(paragraph)}", {"text": "\n".join(paragraph)}
                paragraph = []
    if paragraph:
        yield f"{label}:{number + 1 - len(paragraph)}", {"text": "\n".join(paragraph)}


def _yaml(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    with open_bytes(file, label) as stream:
        text = stream.read(untrusted.MOST_YAML_BYTES + 1)
    untrusted.check_yaml(text, label, DataError)
    return chatterbot.conversations(text, label, ledger)


READERS: dict[str, Callable[[File, str, Ledger, config.Data], Iterator[Record]]] = {
    ".jsonl": json_files.records, ".ndjson": json_files.records, ".json": json_files.records,
    ".csv": csv_files.records, ".tsv": csv_files.records,
    ".parquet": arrow_files.parquet_records, ".arrow": arrow_files.arrow_records, ".feather": arrow_files.arrow_records,
    ".txt": _paragraphs, ".yml": _yaml, ".yaml": _yaml,
}  # fmt: skip
