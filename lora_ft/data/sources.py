"""Where rows come from: a file, a folder of files of one kind, a folder inside a package, or a hub dataset.

data.path=chat.jsonl   data.path=rows/   data.path=package:chatterbot_corpus/data/english   data.path=org/name
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
        for file in _files(folder, path, key):
            yield from read_file(file, file.name, ledger)
    elif (local := Path(path).expanduser()).exists():
        for file in _files(local, path, key):
            if file != local:  # what the user names may be a link, what a folder holds may not
                untrusted.check_place(file, local)
            yield from read_file(file, str(file), ledger)
    elif _HUB_ID.fullmatch(path) and local.suffix.lower() not in READERS and not path.startswith("."):
        yield from _hub(path, key, data)
    else:
        raise DataError(f"{key}: there is no file or folder {path}")


def _files(place: Path, path: str, key: str) -> list[Path]:
    if not place.is_dir():
        if place.suffix.lower() not in READERS:
            raise DataError(f"{key}: {path} is of no kind that is read: {', '.join(READERS)}")
        return [place]
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in READERS and not f.name.startswith("."))
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
        rows = (values for batch in rows.with_format("arrow").iter(1000) for values in batch.to_pylist())
    for number, values in enumerate(rows, 1):
        yield Record(f"{path}:row {number}", values)
