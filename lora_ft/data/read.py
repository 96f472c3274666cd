"""Read the rows that the settings name, check them, and split them into training and eval rows. No tokenizer needed.

read(Data(path="chat.jsonl")) -> Rows(format, rows=[Row ...], is_eval=[False, True, ...], ...)
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.config import Format
from lora_ft.data import cache, split
from lora_ft.data.joined import Chained
from lora_ft.data.labels import AUTO
from lora_ft.data.parsing import append_rows
from lora_ft.data.row_store import RowWriter, StoredRows
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import ALL_SPLITS, folder_splits, is_local, split_name
from lora_ft.errors import ConfigError

log = logging.getLogger("lora_ft")

EQUAL_TO_EARLIER = "equal to an earlier row"  # a reason to leave rows out


@dataclass(frozen=True)
class Rows:
    """Rows before tokenization.

    is_eval: True for each row of the eval set. duplicates: number of rows that differ from an earlier one in case and
    whitespace at most. unused: columns that are not read. from_cache: names of the cache files that the examples were
    loaded from. written: rows by the added token in a prompt or text, once the rows are encoded (data/encoding.py).
    """

    format: Format
    rows: StoredRows
    is_eval: NDArray[np.bool_]
    duplicates: int
    unused: list[str]
    ledger: Ledger
    from_cache: list[str] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)

    @property
    def training_rows(self) -> StoredRows:
        return self.rows.select(np.flatnonzero(~self.is_eval))

    @property
    def eval_rows(self) -> StoredRows:
        return self.rows.select(np.flatnonzero(self.is_eval))


def read(data: config.Data) -> Rows:
    """Read, check and split the rows of `data`. Raises the errors of `prepare` that do not depend on a tokenizer.

    Bad rows stay in the ledger until the other rows are rendered, so that one error lists all of them.
    """
    _check_splits(data)
    if (found_split := eval_split(data)) != data.eval_split:
        log.info(f"eval rows: the validation files of {data.path}; data.eval_fraction is not used")
        data = replace(data, eval_split=found_split)
    if data.stream and data.eval_fraction and not (data.eval_path or data.eval_split):
        raise ConfigError(
            "data.stream=true reads rows only once they are trained on, so no fraction of them can be held out: set "
            "data.eval_path to a file of eval rows, or data.eval_fraction=0"
        )
    if data.stream and data.labels == AUTO and not (data.eval_path or data.eval_split):
        raise ConfigError(
            "data.stream=true reads rows only once they are trained on, so data.labels=auto can only find labels in "
            "eval rows, and there are none: name the labels, as in data.labels=[negative,positive], or set "
            "data.eval_path"
        )
    ledger, writer = Ledger(data.strict), RowWriter(cache.folder())
    found, unused = append_rows("data.path", _first_block(data) if data.stream else data, writer, ledger)
    data = replace(data, stream=False)
    trained = writer.count
    if data.eval_path:
        eval_data = replace(data, path=data.eval_path, split=data.eval_split or data.split)
        unused += append_rows("data.eval_path", eval_data, writer, ledger)[1]
    elif data.eval_split:
        unused += append_rows("data.eval_split", replace(data, split=str(data.eval_split)), writer, ledger)[1]
    rows = writer.finish()
    sides = np.arange(trained), np.arange(trained, len(rows))
    hashes = rows.hashes
    kept = [side[split.first_of_equal(hashes[side])] for side in sides]
    duplicates = len(rows) - sum(map(len, kept))
    if data.deduplicate:
        ledger.left_out[EQUAL_TO_EARLIER] += duplicates
        sides = kept[0], kept[1]
        rows = rows.select(np.concatenate(sides))
    if not (data.eval_path or data.eval_split):
        is_eval = split.choose_eval(rows.hashes, data.eval_fraction)
    else:
        is_eval = np.arange(len(rows)) >= len(sides[0])
    read_rows = Rows(found, rows, is_eval, duplicates, list(dict.fromkeys(unused)), ledger)
    if data.eval_path or data.eval_split:
        refuse_leaks([read_rows], [read_rows])
    return read_rows


def _first_block(data: config.Data) -> config.Data:
    """Return the settings that read the first block of a stream."""
    return replace(data, max_rows=min(data.shuffle_buffer, data.max_rows or data.shuffle_buffer))


def read_eval(data: config.Data) -> Rows:
    """Read every row of `data.path` as an eval row."""
    found = read(replace(data, eval_fraction=0.0, eval_path=None, eval_split=None, stream=False))
    return replace(found, is_eval=np.ones(len(found.rows), np.bool_))


def refuse_leaks(trained: Sequence[Rows], evaluated: Sequence[Rows]) -> None:
    """Raise DataError if an eval row of the second rows is a training row of the first."""
    train, eval_ = [rows.training_rows for rows in trained], [rows.eval_rows for rows in evaluated]
    split.refuse_leaks(
        Chained([rows.sources for rows in train]),
        Chained([rows.sources for rows in eval_]),
        np.concatenate([rows.hashes for rows in train]),
        np.concatenate([rows.hashes for rows in eval_]),
    )


def eval_split(data: config.Data) -> str | None:
    """Return the split of the eval rows: data.eval_split, or by default a folder's validation files."""
    if data.eval_split or data.eval_path or not data.eval_fraction or split_name(data.split) != "train":
        return data.eval_split
    return "validation" if {"train", "validation"} <= folder_splits(data.path, "data.path") else None


def _check_splits(data: config.Data) -> None:
    """Raise ConfigError for settings of hub datasets and of folders with splits if the rows come from neither."""
    path, key = (data.eval_path, "data.eval_path") if data.eval_path else (data.path, "data.path")
    splits = folder_splits(path, key)
    if data.eval_split and is_local(path) and not splits:
        raise ConfigError(
            f"data.eval_split={data.eval_split} needs a hub dataset or a folder with files named for splits, and "
            f"{path} is neither: set data.eval_path to a file of eval rows, or data.eval_fraction"
        )
    if data.eval_path and splits and not data.eval_split:
        raise ConfigError(
            f"data.eval_path={path} has files of the splits {', '.join(sorted(splits))}: set data.eval_split"
        )
    if not all(is_local(path) for path in (data.path, data.eval_path) if path):
        return
    default = config.Data()
    for name in ("name", "revision"):
        if (value := getattr(data, name)) != getattr(default, name):
            raise ConfigError(f"data.{name}={value} is a setting of hub datasets, and {data.path} is a local path")
    if data.split not in (default.split, ALL_SPLITS) and not folder_splits(data.path, "data.path"):
        raise ConfigError(
            f"data.split={data.split} needs a hub dataset or a folder with files named for splits, and {data.path} is "
            "neither"
        )
