"""Read Arrow's tables: .parquet, .arrow and .feather files, and streams of the same as `datasets` saves them.

`io/arrow.py` converts their values.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_ft import config
from lora_ft.data.json_text import parse_json
from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.data.streams import COMPRESSIONS, File, open_bytes
from lora_ft.errors import DataError
from lora_ft.io import arrow

_BATCH = 100
_BUFFER = 2**20


def parquet_records(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield the rows of a Parquet file, read through a buffer of 1 MiB for each column."""
    from pyarrow import parquet

    def batches(source: Any) -> Iterator[Any]:
        with parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as table:
            yield table.schema_arrow
            yield from table.iter_batches(batch_size=_BATCH)

    with _opened(file, label) as source:
        yield from _rows(batches(source), "Parquet", label, ledger)


def arrow_records(file: File, label: str, ledger: Ledger, data: config.Data) -> Iterator[Record]:
    """Yield the rows of a file or stream in Arrow's IPC format; a batch of the file is in memory at a time."""
    from pyarrow import ipc

    def batches(source: Any) -> Iterator[Any]:
        start = source.read(6)
        source.seek(0)
        if start.startswith(b"FEA1"):
            raise DataError(f"{label}: is a Feather file of version 1: write it again as version 2 or Parquet")
        if start == b"ARROW1":
            with ipc.open_file(source) as table:
                yield table.schema
                yield from (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            with ipc.open_stream(source) as stream:
                yield stream.schema
                yield from stream

    with _opened(file, label) as source:
        yield from _rows(batches(source), "Arrow", label, ledger)


@contextmanager
def _opened(file: File, label: str) -> Iterator[Any]:
    """Open a file in which a reader can seek: a compressed one or a member of an archive is read whole."""
    import pyarrow

    with open_bytes(file, label) as stream:
        if isinstance(file, Path) and file.suffix.lower() not in COMPRESSIONS:
            with pyarrow.OSFile(str(file)) as source:
                yield source
        else:
            yield pyarrow.BufferReader(stream.read())


def _rows(found: Iterable[Any], format_name: str, label: str, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows of a schema and the batches after it as Python's own values."""
    import pyarrow

    first = 1  # number of the first row of the batch
    batches = iter(found)
    try:
        names = next(batches).names
        if len(set(names)) < len(names):
            raise DataError(f"{label}: two columns have the same name: {excerpt(names)}")
        for whole in batches:
            for start in range(0, whole.num_rows, _BATCH):
                batch = whole.slice(start, _BATCH)
                try:
                    rows = arrow.values_of(batch, parse_json)
                # Values that Python cannot represent: text that is not UTF-8, years beyond 9999.
                except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
                    batch_rows = f"{label}:row {first} to row {first + batch.num_rows - 1}"
                    raise DataError(f"{batch_rows}: a value cannot be read: {excerpt(error)}") from None
                for number, values in enumerate(rows, first):
                    yield f"{label}:row {number}", values
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        ledger.add_bad(f"{label}:row {first}", "file", f"not readable as {format_name}", error)
