"""Where rows come from: a file, a folder of files of one kind, a folder inside a package, or a hub dataset.

data.path=chat.jsonl   data.path=rows/   data.path=package:chatterbot_corpus/data/english   data.path=org/name

The files of a folder may be named for splits: train-00000-of-00002.parquet, my_val.jsonl. Then data.split chooses.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from lora_ft import config
from lora_ft.data.files import READERS, read_file
from lora_ft.data.rows import Ledger, Record, excerpt
from lora_ft.errors import DataError, ResourceError, SecurityError
from lora_ft.io import untrusted

_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

ALL_SPLITS = "all"
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def is_local(path: str) -> bool:
    """Whether this is a place on this machine, where the settings of hub datasets mean nothing."""
    return path.startswith("package:") or Path(path).expanduser().exists()


def records(path: str, key: str, data: config.Data, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows at `path`, the value of the setting `key`; a folder's files in order of their names.

    Raises DataError (a missing or mixed place), ResourceError (a package or hub dataset that is not to be
    had here) or SecurityError (a path that leaves its package, a link that leaves its folder).
    """
    if not path:
        raise DataError(f"{key} is empty")  # and not the current folder
    if path.startswith("package:"):
        folder = _inside_package(path, key)
        for file in _files(folder, path, key, data.split):
            yield from read_file(file, file.name, ledger)
    elif (local := Path(path).expanduser()).exists():
        for file in _files(local, path, key, data.split):
            if file != local:  # what the user names may be a link, what a folder holds may not
                untrusted.check_place(file, local)
            yield from read_file(file, str(file), ledger)
    elif _HUB_ID.fullmatch(path) and local.suffix.lower() not in READERS and not path.startswith("."):
        yield from _hub(path, key, data)
    else:
        raise DataError(f"{key}: there is no file or folder {path}")


def split_name(split: str) -> str:
    """The usual name of a split: val -> validation."""
    return _SPLITS.get(split, split)


def folder_splits(path: str, key: str) -> set[str]:
    """The splits that the files at `path` are named for. Empty for a file, a hub dataset and other folders."""
    place = _inside_package(path, key) if path.startswith("package:") else Path(path).expanduser()
    if not path or not place.is_dir():
        return set()
    return {split for file in _readable(place) if (split := _split_of(file))}


def _split_of(file: Path) -> str | None:
    """The split that a word of the file's name stands for; None if no word does or words for two splits are there."""
    found = {_SPLITS[word] for word in re.split(r"[\W\d_]+", file.stem.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _readable(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS and not f.name.startswith("."))


def _of_split(files: list[Path], split: str, path: str, key: str) -> list[Path]:
    """The files of a folder that are named for `split`, or all of them if no name tells of a split."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    others = by_split.pop(None, [])
    if split == ALL_SPLITS or not by_split:
        return files
    setting = "data.eval_split" if key.startswith("data.eval") else "data.split"
    if others:
        named = [file for file in files if file not in others]
        raise DataError(
            f"{key}: the folder {path} names some files for splits ({_listed(named)}) and others not "
            f"({_listed(others)}): give one file, rename files, or read all of them with {setting}={ALL_SPLITS}"
        )
    if split_name(split) not in by_split:
        found = " or ".join(sorted(map(str, by_split)))
        raise DataError(f"{key}: the folder {path} has no files of the split {split}: choose {setting}={found}")
    return by_split[split_name(split)]


def _listed(files: list[Path]) -> str:
    return excerpt(", ".join(file.name for file in files))


def _files(place: Path, path: str, key: str, split: str) -> list[Path]:
    if not place.is_dir():
        if place.suffix.lower() not in READERS:
            raise DataError(f"{key}: {path} is of no kind that is read: {', '.join(READERS)}")
        return [place]
    files = _of_split(_readable(place), split, path, key)
    kinds = sorted({f.suffix.lower() for f in files})
    if not files:
        raise DataError(f"{key}: the folder {path} holds no file that is read: {', '.join(READERS)}")
    if len(kinds) > 1:
        raise DataError(f"{key}: the folder {path} mixes kinds of files: {', '.join(kinds)}")
    return files


def _inside_package(path: str, key: str) -> Path:
    """The place that `package:NAME/PLACE` names; the package is found, not imported."""
    if not (match := _PACKAGE.fullmatch(path)):
        raise DataError(f"{key}: {path} is not of the form package:NAME/FOLDER")
    name, inner = match.groups()
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pip = f"pip install {name.replace('_', '-')}"
        raise ResourceError(f"{key}: the package {name} is not installed: {pip}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    place = (root / inner).resolve()
    if not place.is_relative_to(root):
        raise SecurityError(f"{key}: {path} leaves its package")
    if not place.exists():
        raise DataError(f"{key}: the package {name} has no {inner}")
    return place


def _hub(path: str, key: str, data: config.Data) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(path, data.name, split=data.split, revision=data.revision)
    # OSError covers the hub client's HTTP errors, its offline mode and a dataset that does not exist;
    # ValueError is how datasets reports an unknown split or configuration.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ResourceError(
            f"{key}: {path} is no file or folder here, and not to be had from the hub ({excerpt(error)}): "
            f"check the name, data.name, data.split and the network, or give a file"
        ) from None
    if isinstance(rows, datasets.Dataset):
        # As they are stored: an image's or a sound's row holds a path, which datasets would open, wherever it leads.
        batches = rows.with_format("arrow").iter(1000)
        rows = (untrusted.without_filled_nulls(values) for batch in batches for values in batch.to_pylist())
    for number, values in enumerate(rows, 1):
        yield f"{path}:row {number}", values
