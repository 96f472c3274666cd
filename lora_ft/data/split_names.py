"""Names of splits, in files, folders and keys: train-00000-of-00002.parquet, my_val.jsonl, {"test": [...]}."""

import re

ALL_SPLITS = "all"
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_name(split: str) -> str:
    """Return the usual name of a split: val -> validation."""
    return _SPLITS.get(split, split)


def is_split(name: str) -> bool:
    """Return True for a name that is a split's and nothing else: dev, but not dev_2."""
    return name.lower() in _SPLITS


def split_in(name: str) -> str | None:
    """Return the split that a word of a name names; None if no word does, or words name two splits."""
    found = {_SPLITS[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None
