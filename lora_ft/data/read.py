"""Settings in, checked rows out, each on its side of the split: all that needs no tokenizer.

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
    """Rows as they were read. hashes: of their content. is_eval: True for each row of the eval set.

    duplicates: rows equal to an earlier one but for case and blanks. unused: columns that nothing reads.
    from_cache: names of the cached files that their examples were loaded from.
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


def read(data: config.Data) -> Rows:
    """Read, check and split the rows of `data`; raises the errors of `prepare` but for those of a tokenizer.

    Bad rows stay in the ledger until the others were rendered too, so that one error lists all of them.
    """
    _check_splits(data)
    if eval_split(data) != data.eval_split:
        log.info(f"{data.path}: the eval rows are its validation files, and data.eval_fraction is not used")
        data = replace(data, eval_split=eval_split(data))
    ledger = Ledger()
    found, rows, unused = formats.rows(records(data.path, "data.path", data, ledger), data, ledger)
    rows, hashes, duplicates = _unique(rows, data, ledger)
    if data.eval_path or data.eval_split:
        key, apart = _apart(data)
        _, extra, more_unused = formats.rows(records(apart.path, key, apart, ledger), apart, ledger)
        extra, extra_hashes, more = _unique(extra, data, ledger)
        split.refuse_leaks(rows, extra, hashes, extra_hashes)
        is_eval = [False] * len(rows) + [True] * len(extra)
        unused = list(dict.fromkeys(unused + more_unused))
        return Rows(found, rows + extra, hashes + extra_hashes, is_eval, duplicates + more, unused, ledger)
    return Rows(found, rows, hashes, split.choose_eval(hashes, data.eval_fraction), duplicates, unused, ledger)


def read_eval(data: config.Data, trained: Rows | None) -> Rows:
    """Read every row of `data.path` as an eval row; DataError if one is a training row of `trained`."""
    found = read(replace(data, eval_fraction=0.0, eval_path=None, eval_split=None))
    if trained:
        learned = [h for h, is_eval in zip(trained.hashes, trained.is_eval, strict=True) if not is_eval]
        split.refuse_leaks(trained.training_rows, found.rows, learned, found.hashes)
    return replace(found, is_eval=[True] * len(found.rows))


def eval_split(data: config.Data) -> str | None:
    """The split of the eval rows: data.eval_split, or by default the validation files of the folder of train files."""
    if data.eval_split or data.eval_path or not data.eval_fraction or split_name(data.split) != "train":
        return data.eval_split
    return "validation" if {"train", "validation"} <= folder_splits(data.path, "data.path") else None


def _check_splits(data: config.Data) -> None:
    """ConfigError for settings of hub datasets and folders with splits where the rows come from neither."""
    apart = data.eval_path or data.path
    named = folder_splits(apart, "data.eval_path" if data.eval_path else "data.path")
    if data.eval_split and is_local(apart) and not named:
        raise ConfigError(
            f"data.eval_split={data.eval_split} is a split of a hub dataset or folder, and {apart} has none: "
            "evaluate on a file with data.eval_path, or on a part with data.eval_fraction"
        )
    if data.eval_path and named and not data.eval_split:
        raise ConfigError(
            f"data.eval_path={apart} has files of the splits {', '.join(sorted(named))}: choose data.eval_split"
        )
    if not all(is_local(path) for path in (data.path, data.eval_path) if path):
        return
    default = config.Data()
    for name in ("name", "revision"):
        if (value := getattr(data, name)) != getattr(default, name):
            raise ConfigError(f"data.{name}={value} is a setting of hub datasets, and {data.path} is none")
    if data.split not in (default.split, ALL_SPLITS) and not folder_splits(data.path, "data.path"):
        raise ConfigError(f"data.split={data.split} is a split of a hub dataset or folder, and {data.path} has none")


def _unique(rows: list[Row], data: config.Data, ledger: Ledger) -> tuple[list[Row], list[bytes], int]:
    """Rows, their content hashes and the number of duplicates, which `data.deduplicate` leaves out, counted."""
    hashes = [split.content_hash(row) for row in rows]
    first = {h: i for i, h in reversed(list(enumerate(hashes)))}
    duplicates = len(rows) - len(first)
    if not data.deduplicate:
        return rows, hashes, duplicates
    ledger.left_out["equal to an earlier row"] += duplicates
    kept = sorted(first.values())
    return [rows[i] for i in kept], [hashes[i] for i in kept], duplicates


def _apart(data: config.Data) -> tuple[str, config.Data]:
    """The setting that names the source of the eval rows, and the settings to read them with."""
    if data.eval_path:
        return "data.eval_path", replace(data, path=data.eval_path, split=data.eval_split or data.split)
    return "data.eval_split", replace(data, split=str(data.eval_split))
