"""Rows given in Python: stored in the run folder, where evaluation and a resumed run find them. No torch here.

cfg = with_rows(cfg, folder, rows, eval_rows)      # cfg.data.path = folder/rows.jsonl
write_rows(folder, rows, eval_rows)
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_ft.errors import CheckpointError, ConfigError, DataError
from lora_ft.io import arrow, durable
from lora_ft.runs import EVAL_ROWS, ROWS, exists


def with_rows(cfg: Any, folder: Path, rows: Any, eval_rows: Any) -> Any:
    """Return a deep copy of a config whose data are the rows that `write_rows` stores in the run folder.

    A run that is resumed without rows and data uses the stored rows. Raises ConfigError for rows of a wrong type.
    """
    for argument, given in (("rows", rows), ("eval_rows", eval_rows)):
        if isinstance(given, str | Path | Mapping):
            kind = type(given).__name__
            raise ConfigError(f"{argument} must be a list of dicts or a datasets.Dataset, got {kind}")
    cfg = copy.deepcopy(cfg)
    for key, given, name in (("path", rows, ROWS), ("eval_path", eval_rows, EVAL_ROWS)):
        stored = cfg.resume and not getattr(cfg.data, key) and (folder / name).is_file()
        if given is not None or stored:
            setattr(cfg.data, key, str(folder / name))
    return cfg


def write_rows(folder: Path, rows: Any, eval_rows: Any) -> None:
    """Write rows (dicts or a datasets.Dataset) as JSON lines; raises DataError for a row that is not JSON.

    Raises CheckpointError if the run has begun to train with other rows, which a resumed run cannot change.
    """
    for name, given in ((ROWS, rows), (EVAL_ROWS, eval_rows)):
        if given is None:
            continue
        text, path = "".join(_json_lines(given, name)), folder / name
        if path.is_file() and exists(folder) and path.read_text("utf-8") != text:
            raise CheckpointError(f"{path} holds other rows: a resumed run cannot change its rows")
        durable.write_text(path, text)


def _json_lines(rows: Any, name: str) -> Iterator[str]:
    if hasattr(rows, "with_format"):  # datasets: the stored values, without decoding images or audio
        rows = (row for batch in rows.with_format("arrow").iter(1000) for row in arrow.values_of(batch))
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"a row must be a dict, got {type(row).__name__}")
            line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
            line.encode("utf-8")  # fails for a lone surrogate
            yield line
        except (TypeError, ValueError) as error:
            raise DataError(f"{name.partition('.')[0]}[{number - 1}] cannot be stored as JSON: {error}") from None
