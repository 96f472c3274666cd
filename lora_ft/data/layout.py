"""Find the files of rows in a folder, or in a .zip archive, which is read like a folder.

    rows/a.jsonl rows/b.jsonl                        files of one format
    rows/train.jsonl rows/my_val.jsonl               files named for splits
    clone/README.md clone/data/train-00000.parquet   a hub dataset as git clones it: the folder inside that has rows
    clone/train/0.parquet clone/test/0.parquet       folders named for splits
    saved/state.json saved/data-00000.arrow          datasets.save_to_disk; with dataset_dict.json: a folder a split

Files that only describe a dataset (dataset_info.json, README.txt) are not rows.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_ft.data.files import READERS, known_suffixes
from lora_ft.data.rows import Ledger, excerpt
from lora_ft.data.split_names import ALL_SPLITS, split_in, split_name
from lora_ft.data.streams import COMPRESSIONS, File, kind, open_bytes
from lora_ft.errors import DataError, SecurityError
from lora_ft.io import untrusted

ARCHIVE = ".zip"
_DEEPEST = 3  # clone/data/CONFIGURATION/SPLIT
_MOST_SHOWN = 10
_DESCRIPTIONS = re.compile(
    r"(dataset_infos?|dataset_dict|dataset-metadata|croissant)\.json|(readme|licen[sc]e|notice|requirements)\b.*"
)

Splits = dict[File, str | None]
"""Files of rows, in the order in which they are read, with the split that each is named for."""


def folder(local: Path) -> File | None:
    """Return a folder, or an archive as one; None for a file. Raises DataError for a damaged archive."""
    if local.is_dir():
        return local
    if local.suffix.lower() != ARCHIVE or not local.is_file():
        return None
    try:
        return zipfile.Path(local)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{local}: cannot be read: {excerpt(error)}") from None


def files_by_split(inside: File, path: str, key: str, ledger: Ledger, depth: int = 0) -> Splits:
    """Return the files of rows in a folder; empty without such files.

    Raises DataError for several folders with rows that are not named for splits.
    """
    inner: list[File] = [*inside.iterdir()]
    inner.sort(key=lambda file: file.name)
    names = {file.name: file for file in inner}
    if dictionary := names.get("dataset_dict.json"):
        found = [(split, inside / _inner_name(split, dictionary)) for split in _object(dictionary).get("splits", [])]
        return {file: split_name(split) for split, part in found for file in _saved(part)}
    if "state.json" in names and any(kind(file) == ".arrow" for file in inner):
        return dict.fromkeys(_saved(inside))
    readable = [file for file in inner if kind(file) in READERS and not file.name.startswith(".") and not file.is_dir()]
    described = [file for file in readable if _DESCRIPTIONS.fullmatch(file.name.lower())]
    for file in described:
        ledger.convert(file.name, "files beside the rows that describe them, not read")
    if rows := [file for file in readable if file not in described]:
        _refuse_copies(rows, path, key)
        return {file: split_in(_name(file)) for file in rows}
    return _of_subfolders(inner, path, key, ledger, depth)


def _of_subfolders(inner: list[File], path: str, key: str, ledger: Ledger, depth: int) -> Splits:
    parts: dict[File, Splits] = {}
    for part in inner if depth < _DEEPEST else ():
        if part.name.startswith((".", "__")) or not (opened := folder(part) if isinstance(part, Path) else part):
            continue
        if opened.is_dir() and (found := files_by_split(opened, path, key, ledger, depth + 1)):
            parts[part] = found
    splits = {part: split_in(part.name) for part in parts}
    if len(parts) > 1 and not all(splits.values()):
        shown = ", ".join([part.name for part in parts][:_MOST_SHOWN]) + (", ..." if len(parts) > _MOST_SHOWN else "")
        raise DataError(
            f"{key}: the folder {path} has rows in {len(parts)} folders that are not named for splits "
            f"({excerpt(shown)}): choose one with {key}={next(iter(parts))}"
        )
    return {file: splits[part] or split for part, found in parts.items() for file, split in found.items()}


def _saved(inside: File) -> Iterator[File]:
    """Yield the files of a dataset that `datasets` saved, as its state.json lists them."""
    state = _object(inside / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{inside}: state.json selects some of the rows by an index: load the folder with datasets.load_from_disk "
            "and save it again"
        )
    listed = state.get("_data_files")
    for entry in listed if isinstance(listed, list) else []:
        name = _inner_name(entry.get("filename") if isinstance(entry, dict) else None, inside / "state.json")
        if not (inside / name).exists():
            raise DataError(f"{inside}: state.json names {excerpt(name)}, which is missing: copy the whole folder")
        yield inside / name


def _inner_name(name: object, listed_in: File) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise SecurityError(f"{listed_in} names {excerpt(name)}, which is nothing in its folder")
    return name


def _object(file: File) -> dict[str, Any]:
    with open_bytes(file, str(file)) as stream:
        return untrusted.parsed_object(stream.read(untrusted.MOST_JSON_BYTES), file, DataError)


def _refuse_copies(files: list[File], path: str, key: str) -> None:
    """Refuse rows.jsonl beside rows.jsonl.gz, which would be read twice."""
    seen: dict[str, str] = {}
    for file in files:
        if (other := seen.setdefault(_name(file), file.name)) != file.name:
            raise DataError(
                f"{key}: in the folder {path}, {other} and {file.name} are one file by their names: give one of them"
            )


def _name(file: File) -> str:
    """Return the name of a file without the suffix of its compression."""
    suffix = Path(file.name).suffix
    return file.name.removesuffix(suffix) if suffix.lower() in COMPRESSIONS else file.name


def of_split(splits: Splits, split: str, path: str, key: str) -> list[File]:
    """Return the files to read, all of one format: those named for `split`, or all if none is named for any split."""
    files = _chosen(splits, split, path, key)
    suffixes = sorted({kind(file) for file in files})
    if not files:
        raise DataError(f"{key}: the folder {path} has no file of rows; known suffixes are {known_suffixes()}")
    if len(suffixes) > 1:
        raise DataError(f"{key}: the folder {path} mixes file formats ({', '.join(suffixes)}): give one file")
    return files


def _chosen(splits: Splits, split: str, path: str, key: str) -> list[File]:
    named = [file for file, of in splits.items() if of]
    if split == ALL_SPLITS or not named:
        return list(splits)
    setting = "data.eval_split" if key.startswith("data.eval") else "data.split"
    if others := [file for file, of in splits.items() if not of]:
        raise DataError(
            f"{key}: in the folder {path} some files are named for splits ({_listed(named)}) and others are not "
            f"({_listed(others)}): give one file, rename files, or read all of them with {setting}={ALL_SPLITS}"
        )
    if chosen := [file for file, of in splits.items() if of == split_name(split)]:
        return chosen
    known = " or ".join(sorted({of for of in splits.values() if of}))
    raise DataError(f"{key}: the folder {path} has no files of the split {split}: choose {setting}={known}")


def _listed(files: list[File]) -> str:
    return excerpt(", ".join(file.name for file in files))
