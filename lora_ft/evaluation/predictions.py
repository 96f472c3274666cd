"""Write predictions as a table: the columns of each row, its predicted label, and the probability of every label.

    text         prediction   probability   p_negative   p_positive
    great film   positive            0.97         0.03         0.97

The suffix of the file chooses the format: .csv, .jsonl or .parquet.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.errors import ConfigError, DataError
from lora_ft.evaluation.classification import Floats, decisions
from lora_ft.io import durable

Table = list[dict[str, Any]]


def check(out: str | None) -> Path:
    """Return the path to write; ConfigError if it is missing, exists, or has a suffix of another format."""
    if not out:
        raise ConfigError("out is empty: give the file of the predictions, out=predictions.csv (.jsonl, .parquet)")
    path = Path(out).expanduser()
    if path.suffix.lower() not in _WRITERS:
        raise ConfigError(f"out={out}: predictions are written as {', '.join(_WRITERS)}")
    if path.exists():
        raise ConfigError(f"out={out} exists: choose another file")
    return path


def chosen(probabilities: Floats, is_multi: bool) -> list[list[int]]:
    """Return the predicted labels of each row: the most probable one, or for is_multi those from 0.5 on."""
    return [np.flatnonzero(row).tolist() for row in decisions(probabilities, multi_label=is_multi)]


def table(
    rows: Sequence[dict[str, Any]], labels: Sequence[str], probabilities: Floats, is_multi: bool = False
) -> Table:
    """Add predictions to the columns of rows: a label with its probability, or for is_multi a list of labels.

    Raises DataError for a row that has one of the new columns.
    """
    names = [f"p_{label}" for label in labels]
    made = []
    for values, row, found_labels in zip(rows, probabilities.tolist(), chosen(probabilities, is_multi), strict=True):
        of_row = [labels[index] for index in found_labels]
        best: dict[str, Any] = {"prediction": of_row}
        if not is_multi:
            best = {"prediction": of_row[0], "probability": row[found_labels[0]]}
        found = best | dict(zip(names, row, strict=True))
        if taken := values.keys() & found.keys():
            raise DataError(f"predict: the rows have a column {min(taken)} already: rename or remove it")
        made.append(values | found)
    return made


def write(path: Path, rows: Table) -> None:
    """Write a table in the format of the path's suffix."""
    durable.make_folder(path.absolute().parent)
    durable.write_bytes(path, _WRITERS[path.suffix.lower()](rows))


def _csv(rows: Table) -> bytes:
    """Return rows as CSV; lists and mappings become JSON text."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: _json(value) if isinstance(value, list | dict) else value for name, value in row.items()}
        )
    return file.getvalue().encode("utf-8")


def _jsonl(rows: Table) -> bytes:
    return "".join(f"{_json(row)}\n" for row in rows).encode("utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _parquet(rows: Table) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        columns = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the rows have columns of mixed types, which Parquet cannot hold ({error}): out=FILE.jsonl can"
        ) from None
    file = io.BytesIO()
    parquet.write_table(columns, file)
    return file.getvalue()


_WRITERS: dict[str, Callable[[Table], bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
