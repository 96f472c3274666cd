"""Parquet files: rows as Python's own values, and not more of them than a file of this size plausibly unpacks to.

chat.parquet:row 3      counted from 1

Arrow has one schema for all rows: an object has the keys of all other objects in its place, null where it had none.
These nulls are dropped. A null that the author of the rows wrote into an object looks the same and is dropped as well.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_ft.data.rows import Ledger, Record, RowError, excerpt
from lora_ft.errors import DataError, SecurityError
from lora_ft.io import untrusted

# What a file may unpack to: so many times its size, and always so many bytes.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED = 2**30

# What pyarrow raises for a value that Python has no such thing for: bytes that are no text, years beyond 9999.
_NO_PLAIN_VALUE = (ValueError, OverflowError, LookupError, NotImplementedError)


def rows(path: Path, label: str, ledger: Ledger) -> Iterator[Record]:
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
                        yield f"{label}:row {number}", untrusted.without_filled_nulls(values)
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
