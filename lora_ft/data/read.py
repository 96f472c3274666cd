"""Read the rows that the settings name, check them, and split them into training and eval rows. No tokenizer needed.

read(Data(path="chat.jsonl")) -> Rows(format, rows=[Row ...], hashes=[...], is_eval=[False, True, ...], ...)
"""

import logging
from dataclasses import dataclass, field, replace

from lora_ft import config
from lora_ft.config import Format
from lora_ft.data import formats, split
from lora_ft.data.rows import Ledger, Row
from lora_ft.data.sources import ALL_SPLITS, folder_splits, is_local, records, split_name
from lora_ft.errors import ConfigError

log = logging.getLogger("lora_ft")


@dataclass(frozen=True)
class Rows:
    """Rows before tokenization.

    hashes: sha256 of each row's content. is_eval: True for each row of the eval set.
    duplicates: number of rows that differ from an earlier one in case and whitespace at most.
    unused: columns that are not read. from_cache: names of the cache files that the examples were loaded from.
    """

    format: Format
    rows: list[Row]
    hashes: list[bytes]
    is_eval: list[bool]
    duplicates: int
    unused: list[str]
    ledger: Ledger
    from_cache: list[str] = field(default_factory=list)

    @property
    def training_rows(self) -> list[Row]:
        return [row for row, is_eval in zip(self.rows, self.is_eval, strict=True) if not is_eval]

    @property
    def eval_rows(self) -> list[Row]:
        return [row for row, is_eval in zip(self.rows, self.is_eval, strict=True) if is_eval]


def read(data: config.Data) -> Rows:
    """Read, check and split the rows of `data`. Raises the errors of `prepare` that do not depend on a tokenizer.

    Bad rows stay in the ledger until the other rows are rendered, so that one error lists all of them.
    """
    _check_splits(data)
    if eval_split(data) != data.eval_split:
        log.info(f"eval rows: the validation files of {data.path}; data.eval_fraction is not used")
        data = replace(data, eval_split=eval_split(data))
    ledger = Ledger(data.strict)
    found, rows, unused = formats.rows(records(data.path, "data.path", data, ledger), data, ledger)
    rows, hashes, duplicates = _unique(rows, data, ledger)
    if not (data.eval_path or data.eval_split):
        return Rows(found, rows, hashes, split.choose_eval(hashes, data.eval_fraction), duplicates, unused, ledger)
    if data.eval_path:
        key, eval_data = "data.eval_path", replace(data, path=data.eval_path, split=data.eval_split or data.split)
    else:
        key, eval_data = "data.eval_split", replace(data, split=str(data.eval_split))
    _, eval_rows, more_unused = formats.rows(records(eval_data.path, key, eval_data, ledger), eval_data, ledger)
    eval_rows, eval_hashes, more_duplicates = _unique(eval_rows, data, ledger)
    split.refuse_leaks(rows, eval_rows, hashes, eval_hashes)
    return Rows(
        found,
        rows + eval_rows,
        hashes + eval_hashes,
        [False] * len(rows) + [True] * len(eval_rows),
        duplicates + more_duplicates,
        list(dict.fromkeys(unused + more_unused)),
        ledger,
    )


def read_eval(data: config.Data, trained: Rows | None) -> Rows:
    """Read every row of `data.path` as an eval row. Raises DataError if one is a training row of `trained`."""
    found = read(replace(data, eval_fraction=0.0, eval_path=None, eval_split=None))
    if trained:
        hashes = [h for h, is_eval in zip(trained.hashes, trained.is_eval, strict=True) if not is_eval]
        split.refuse_leaks(trained.training_rows, found.rows, hashes, found.hashes)
    return replace(found, is_eval=[True] * len(found.rows))


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


def _unique(rows: list[Row], data: config.Data, ledger: Ledger) -> tuple[list[Row], list[bytes], int]:
    """Return rows, their hashes and the number of duplicates, which are left out if `data.deduplicate` is true."""
    hashes = [split.content_hash(row) for row in rows]
    first = {h: i for i, h in reversed(list(enumerate(hashes)))}
    duplicates = len(rows) - len(first)
    if not data.deduplicate:
        return rows, hashes, duplicates
    ledger.left_out["equal to an earlier row"] += duplicates
    kept = sorted(first.values())
    return [rows[i] for i in kept], [hashes[i] for i in kept], duplicates
