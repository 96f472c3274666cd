"""Attacks in data: links, paths and tags in files of rows that would make a reader open or run something else."""

import json
import zipfile
from collections.abc import Callable

import datasets
import pytest

from attacks import Attack, Paths
from lora_ft import config
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import records
from lora_ft.errors import DataError, LoraFtError, SecurityError


def _read(paths: Paths, name: str = "") -> list[object]:
    ledger = Ledger()
    path = str(paths.folder / name) if name else str(paths.folder)
    rows: list[object] = list(records(path, "data.path", config.Data(), ledger))
    ledger.raise_bad()
    return rows


def _file_names(paths: Paths) -> None:
    target = paths.outside / "model.safetensors"
    rows = [{"prompt": f"file://{target}", "completion": str(target)}, {"image": {"path": str(target), "bytes": None}}]
    (paths.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _link(paths: Paths) -> None:
    (paths.outside / "rows.jsonl").write_text('{"text": "a"}\n')
    (paths.folder / "rows.jsonl").symlink_to(paths.outside / "rows.jsonl")


def _read_hub(paths: Paths) -> None:
    """Read a hub dataset whose image column names a local file, which the library `datasets` would open."""
    target = str(paths.outside / "model.safetensors")
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"text": ["a"], "image": [{"path": target, "bytes": None}]}, features=features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
        ((_, values),) = records("evil/images", "data.path", config.Data(), Ledger())
    assert values["image"]["path"] == target


def _text(name: str, text: str) -> Callable[[Paths], None]:
    return lambda paths: (paths.folder / name).write_text(text) and None


def _archive(*members: str) -> Callable[[Paths], None]:
    """Write an archive whose members have these names."""

    def write(paths: Paths) -> None:
        with zipfile.ZipFile(paths.folder / "rows.zip", "w") as archive:
            for member in members:
                archive.writestr(member, '{"text": "a"}\n')

    return write


def _saved(paths: Paths) -> None:
    """Write a folder like one of datasets.save_to_disk whose state lists a file outside of it."""
    (paths.outside / "data.arrow").write_bytes(b"")
    (paths.folder / "data.arrow").write_bytes(b"")
    state = {"_data_files": [{"filename": f"../{paths.outside.name}/data.arrow"}]}
    (paths.folder / "state.json").write_text(json.dumps(state))


_ROWS: list[tuple[str, Callable[[Paths], None], Callable[[Paths], object], type[LoraFtError] | None, str]] = [
    ("rows that name files", _file_names, lambda p: _read(p, "rows.jsonl"), None, ""),
    ("rows that are a link", _link, _read, SecurityError, "outside of its folder"),
    ("rows nested too deeply", _text("rows.jsonl", '{"a":' * 100_000), _read, DataError, "nested too deeply"),
    ("conversations with a tag", _text("rows.yml", "conversations: !!python/name:os.system\n"), _read,
     SecurityError, "is not plain data"),
    ("conversations above 1 MiB", _text("rows.yml", "# " + "x" * 2**20), _read, SecurityError, "larger than 1 MiB"),
    ("rows in an archive", _text("rows.gz", "\x1f\x8b"), lambda p: _read(p, "rows.gz"), DataError, "cannot be read"),
    ("rows in an archive that lead out of it", _archive("../../outside/rows.jsonl", "/rows.jsonl"),
     lambda p: _read(p, "rows.zip"), DataError, "has no file of rows"),
    ("a saved dataset that lists other files", _saved, _read, SecurityError, "is nothing in its folder"),
    ("a list nested too deeply", _text("rows.json", "[" * 100_000), _read, DataError, "nested too deeply"),
    ("images of a hub dataset", lambda p: None, _read_hub, None, ""),
]  # fmt: skip

ATTACKS = [Attack(*row) for row in _ROWS]
