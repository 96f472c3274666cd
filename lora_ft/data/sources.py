"""Find rows: in a file, a folder of files, a folder inside a package, or a hub dataset.

data.path=chat.jsonl   data.path=rows/   data.path=package:chatterbot_corpus/data/english   data.path=org/name

Files of a folder may be named for splits (train-00000-of-00002.parquet, my_val.jsonl); data.split then chooses.
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
    """Return True for a path on this machine, to which the settings of hub datasets do not apply."""
    return path.startswith("package:") or Path(path).expanduser().exists()


def records(path: str, key: str, data: config.Data, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows at `path`, the value of the setting `key`; the files of a folder are sorted by name.

    Raises DataError if there are no rows at the path, ResourceError if a package is not installed or a hub dataset
    cannot be loaded, SecurityError for a path that leads out of its package or a link that leads out of its folder.
    """
    if not path:
        raise DataError(f"{key} is empty: give a file, a folder or a hub id")  # Path("") is the current folder
    if path.startswith("package:"):
        for file in _files(_inside_package(path, key), path, key, data.split):
            yield from read_file(file, file.name, ledger)
    elif (local := Path(path).expanduser()).exists():
        for file in _files(local, path, key, data.split):
            if file != local:  # the path that the user gives may be a link, a file found in a folder may not
                untrusted.check_place(file, local)
            yield from read_file(file, str(file), ledger)
    elif _HUB_ID.fullmatch(path) and local.suffix.lower() not in READERS and not path.startswith("."):
        yield from _hub(path, key, data)
    else:
        raise DataError(f"{key}: there is no file or folder {path}")


def split_name(split: str) -> str:
    """Return the usual name of a split: val -> validation."""
    return _SPLITS.get(split, split)


def folder_splits(path: str, key: str) -> set[str]:
    """Return the splits that files of the folder `path` are named for; empty if `path` is not a local folder."""
    folder = _inside_package(path, key) if path.startswith("package:") else Path(path).expanduser()
    if not path or not folder.is_dir():
        return set()
    return {split for file in _readable(folder) if (split := _split_of(file))}


def _split_of(file: Path) -> str | None:
    """Return the split that a word of the file's name names; None if no word does, or words name two splits."""
    found = {_SPLITS[word] for word in re.split(r"[\W\d_]+", file.stem.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def _readable(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS and not f.name.startswith("."))


def _files(local: Path, path: str, key: str, split: str) -> list[Path]:
    """Return the files to read, all of one format."""
    if not local.is_dir():
        if local.suffix.lower() not in READERS:
            raise DataError(f"{key}: {path} cannot be read as rows; known suffixes are {', '.join(READERS)}")
        return [local]
    files = _of_split(_readable(local), split, path, key)
    suffixes = sorted({f.suffix.lower() for f in files})
    if not files:
        raise DataError(f"{key}: the folder {path} has no file of rows; known suffixes are {', '.join(READERS)}")
    if len(suffixes) > 1:
        raise DataError(f"{key}: the folder {path} mixes file formats ({', '.join(suffixes)}): give one file")
    return files


def _of_split(files: list[Path], split: str, path: str, key: str) -> list[Path]:
    """Return the files that are named for `split`, or all files if none is named for any split."""
    splits = {file: _split_of(file) for file in files}
    named = [file for file in files if splits[file]]
    if split == ALL_SPLITS or not named:
        return files
    setting = "data.eval_split" if key.startswith("data.eval") else "data.split"
    if others := [file for file in files if not splits[file]]:
        raise DataError(
            f"{key}: in the folder {path} some files are named for splits ({_listed(named)}) and others are not "
            f"({_listed(others)}): give one file, rename files, or read all of them with {setting}={ALL_SPLITS}"
        )
    if chosen := [file for file in files if splits[file] == split_name(split)]:
        return chosen
    known = " or ".join(sorted(map(str, set(splits.values()))))
    raise DataError(f"{key}: the folder {path} has no files of the split {split}: choose {setting}={known}")


def _listed(files: list[Path]) -> str:
    return excerpt(", ".join(file.name for file in files))


def _inside_package(path: str, key: str) -> Path:
    """Return the path that `package:NAME/PATH` names. The package is found without importing it."""
    if not (match := _PACKAGE.fullmatch(path)):
        raise DataError(f"{key}: {path} must have the form package:NAME/FOLDER")
    name, inner = match.groups()
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ResourceError(
            f"{key}: the package {name} is not installed; install it with: pip install {name.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = (root / inner).resolve()
    if not found.is_relative_to(root):
        raise SecurityError(f"{key}: {path} leads out of its package")
    if not found.exists():
        raise DataError(f"{key}: the package {name} has no {inner}")
    return found


def _hub(path: str, key: str, data: config.Data) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(path, data.name, split=data.split, revision=data.revision, streaming=data.stream)
    # The hub client's HTTP errors, its offline mode and a missing dataset are OSErrors; an unknown split or
    # configuration is a ValueError.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ResourceError(
            f"{key}: {path} is neither a local file or folder nor a hub dataset that can be loaded ({excerpt(error)}): "
            "check the name, data.name, data.split and the network, or give a file"
        ) from None
    if isinstance(rows, datasets.Dataset):
        # Arrow values are read as stored: for images and audio, `datasets` would open the file that a row names.
        batches = rows.with_format("arrow").iter(1000)
        rows = (untrusted.without_filled_nulls(values) for batch in batches for values in batch.to_pylist())
    for number, values in enumerate(rows, 1):
        yield f"{path}:row {number}", values
