"""Files of rows: JSON lines, JSON, CSV, Parquet, plain text and ChatterBot YAML, each row with its place.

    chat.jsonl:12        physical line, also of .csv (where the row starts) and .yml
    chat.json:row 3      counted from 1, also of .parquet

Text is strict UTF-8; a byte order mark is accepted at the start of a file. Readers never skip a row silently:
a bad one goes into the ledger with place, field, reason and an excerpt.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from lora_ft.data import chatterbot, jsonl, parquet, text
from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.errors import DataError
from lora_ft.io import untrusted


def read_file(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of one file by its suffix; `label` stands for the file in places. Raises DataError."""
    try:
        yield from READERS[path.suffix.lower()](path, label, ledger)
    except OSError as error:
        raise DataError(f"{label}: cannot be read: {error.strerror or excerpt(error)}") from error


def _yaml(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
    data = path.read_bytes()
    untrusted.check_yaml(data, label, DataError)
    return chatterbot.conversations(text.decode(data, label), label, ledger)


READERS: dict[str, Callable[[Path, str, Ledger], Iterator[Record]]] = {
    ".jsonl": jsonl.lines, ".ndjson": jsonl.lines, ".json": jsonl.rows, ".csv": text.table, ".tsv": text.table,
    ".parquet": parquet.rows, ".txt": text.paragraphs, ".yml": _yaml, ".yaml": _yaml,
}  # fmt: skip
