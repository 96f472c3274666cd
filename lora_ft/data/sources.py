"""Find rows: in a file, a folder or archive of files, a folder inside a package, or a hub dataset.

data.path=chat.jsonl   data.path=rows/   data.path=rows.zip   data.path=package:chatterbot_corpus/data/english
data.path=org/name   data.path=cache:tasks/topic

Files of a folder may be named for splits (train-00000-of-00002.parquet, my_val.jsonl); data.split then chooses.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from lora_ft import config
from lora_ft.data import json_documents, layout, where
from lora_ft.data.files import READERS, known_suffixes, read_file
from lora_ft.data.rows import Ledger, Record, RowError, excerpt, printable
from lora_ft.data.split_names import ALL_SPLITS as ALL_SPLITS
from lora_ft.data.split_names import split_name as split_name
from lora_ft.data.streams import File, kind
from lora_ft.errors import DataError, ResourceError, SecurityError
from lora_ft.io import arrow, durable, untrusted

_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
_CACHE = re.compile(r"cache:([\w-]+)/(.+)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(path: str) -> bool:
    """Return True for a path on this machine, to which the settings of hub datasets do not apply."""
    return _named(path) or Path(path).expanduser().exists()


def records(path: str, key: str, data: config.Data, ledger: Ledger) -> Iterator[Record]:
    """Yield the rows at `path`, the value of the setting `key`, that `data.where` selects, in the order of the files.

    Raises DataError if there are no rows at the path, ConfigError for a `data.where` that selects none, ResourceError
    if a package is not installed or a hub dataset cannot be loaded, SecurityError for a path that leads out of its
    package or a link that leads out of its folder.
    """
    found = _records(path, key, data, ledger)
    yield from where.selected(found, data.where, path, ledger) if data.where else found


def _records(path: str, key: str, data: config.Data, ledger: Ledger) -> Iterator[Record]:
    if not path:
        raise DataError(f"{key} is empty: give a file, a folder or a hub id")  # Path("") is the current folder
    if _named(path):
        for file in _files(_place(path, key), path, key, data.split, ledger):
            yield from read_file(file, file.name, ledger, data)
    elif (local := Path(path).expanduser()).exists():
        root = _snapshot(local)
        for file in _files(local, path, key, data.split, ledger):
            if isinstance(file, Path) and file != local:  # the user's own path may be a link, a file found may not
                untrusted.check_place(file, root)
            yield from read_file(file, printable(str(file)), ledger, data)
    elif _HUB_ID.fullmatch(path) and not _is_readable(local) and not path.startswith("."):
        yield from _hub(path, key, data)
    else:
        raise DataError(f"{key}: there is no file or folder {path}")


def folder_splits(path: str, key: str) -> set[str]:
    """Return the splits of a local folder or archive, or of a file like {"train": [...], "test": [...]}."""
    local = _place(path, key) if _named(path) else Path(path).expanduser()
    if not path or not local.exists():
        return set()
    if inside := layout.folder(local):
        return {split for split in layout.files_by_split(inside, path, key, Ledger()).values() if split}
    return json_documents.splits(local) if kind(local) == ".json" else set()


def _is_readable(file: Path) -> bool:
    return kind(file) in READERS or file.suffix.lower() == layout.ARCHIVE


def _files(local: Path, path: str, key: str, split: str, ledger: Ledger) -> list[File]:
    """Return the files to read, all of one format."""
    counted = Ledger() if key == "data.eval_split" else ledger  # its folder is that of data.path, which counted it
    try:
        if inside := layout.folder(local):
            return layout.of_split(layout.files_by_split(inside, path, key, counted), split, path, key)
    except RowError as error:
        raise DataError(f"{key}: the folder {path}: {error}") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror or excerpt(error)}") from error
    if not _is_readable(local):
        raise DataError(f"{key}: {path} cannot be read as rows; known suffixes are {known_suffixes()}")
    return [local]


def _snapshot(local: Path) -> Path:
    """Return the folder that links in `local` may not leave: the commit's, for a folder in the hub's cache."""
    absolute = local.absolute()
    return next((folder for folder in (absolute, *absolute.parents) if folder.parent.name == "snapshots"), local)


def _named(path: str) -> bool:
    """Return True for a path inside a package or the cache."""
    return path.startswith(("package:", "cache:"))


def _place(path: str, key: str) -> Path:
    """Return the path on this machine that `package:NAME/PATH` or `cache:KIND/PATH` names."""
    return _inside_package(path, key) if path.startswith("package:") else _inside_cache(path, key)


def _inside_cache(path: str, key: str) -> Path:
    """Return the path that `cache:KIND/PATH` names, in the folder of lora_ft in the user's cache."""
    if not (match := _CACHE.fullmatch(path)):
        raise DataError(f"{key}: {path} must have the form cache:KIND/FOLDER")
    kind, inner = match.groups()
    root = durable.cache_folder(kind).resolve()
    found = (root / inner).resolve()
    if not found.is_relative_to(root):
        raise SecurityError(f"{key}: {path} leads out of the cache")
    if not found.exists():
        made = f"; make it: python benchmarks/tasks/make_rows.py {inner.partition('/')[0]}" if kind == "tasks" else ""
        raise DataError(f"{key}: there is no {path} ({found}){made}")
    return found


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
    if isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        # Arrow values are read as stored: for images and audio, `datasets` would open the file that a row names.
        batches = rows.with_format("arrow").iter(1000)
        rows = (values for batch in batches for values in arrow.values_of(batch))
    number = 0
    try:
        for number, values in enumerate(rows, 1):
            yield f"{path}:row {number}", values
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ResourceError(f"{key}: {path} cannot be read after row {number}: {excerpt(error)}") from None
