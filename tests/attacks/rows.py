"""Data: folders and files of rows that would be read elsewhere, or unpack to more than any machine holds."""

import json
from collections.abc import Callable

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from attacks import Attack, Place
from lora_ft import config
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import records
from lora_ft.errors import DataError, LoraFtError, SecurityError


def _read(place: Place, name: str = "") -> list[object]:
    ledger = Ledger()
    path = str(place.folder / name) if name else str(place.folder)
    rows: list[object] = list(records(path, "data.path", config.Data(), ledger))
    ledger.raise_bad()
    return rows


def _paths(place: Place) -> None:
    target = place.outside / "model.safetensors"
    rows = [{"prompt": f"file://{target}", "completion": str(target)}, {"image": {"path": str(target), "bytes": None}}]
    (place.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _link(place: Place) -> None:
    (place.outside / "rows.jsonl").write_text('{"text": "a"}\n')
    (place.folder / "rows.jsonl").symlink_to(place.outside / "rows.jsonl")


def _dictionary(place: Place) -> None:
    """Less than a kilobyte that names one text of 64 KiB 20,000 times."""
    indices = pyarrow.array([0] * 20_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 2**16]))
    parquet.write_table(pyarrow.table({"text": column}), place.folder / "rows.parquet", compression="zstd")


def _page(place: Place) -> None:
    column = pyarrow.array(["x" * 2**17] * 17)
    parquet.write_table(pyarrow.table({"text": column}), place.folder / "rows.parquet",
                        compression="zstd", use_dictionary=False)  # fmt: skip


def _nested_dictionary(place: Place) -> None:
    inner = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 0], pyarrow.int32()), pyarrow.array(["x"]))
    column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2], pyarrow.int32()), inner)
    parquet.write_table(pyarrow.table({"text": column}), place.folder / "rows.parquet")


def _read_hub(place: Place) -> None:
    """A dataset of the hub whose column of images names a file of this machine; datasets would open it."""
    target = str(place.outside / "model.safetensors")
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    found = datasets.Dataset.from_dict({"text": ["a"], "image": [{"path": target, "bytes": None}]}, features=features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)
        ((_, values),) = records("evil/images", "data.path", config.Data(), Ledger())
    assert values["image"]["path"] == target


def _text(name: str, text: str) -> Callable[[Place], None]:
    return lambda place: (place.folder / name).write_text(text) and None


_ROWS: list[tuple[str, Callable[[Place], None], Callable[[Place], object], type[LoraFtError] | None, str]] = [
    ("rows that name files", _paths, lambda p: _read(p, "rows.jsonl"), None, ""),
    ("rows that are a link", _link, _read, SecurityError, "outside of its folder"),
    ("rows of a dictionary", _dictionary, _read, SecurityError, "unpacks to more than"),
    ("rows in a small page", _page, _read, SecurityError, "would unpack to"),
    ("rows of a dictionary in lists", _nested_dictionary, _read, DataError, "a dictionary inside of"),
    ("rows nested without end", _text("rows.jsonl", '{"a":' * 100_000), _read, DataError, "nested"),
    ("conversations with a tag", _text("rows.yml", "conversations: !!python/name:os.system\n"), _read,
     SecurityError, "is not plain data"),
    ("conversations of 1 MiB", _text("rows.yml", "# " + "x" * 2**20), _read, SecurityError, "larger than 1 MiB"),
    ("rows in an archive", _text("rows.gz", "\x1f\x8b"), lambda p: _read(p, "rows.gz"), DataError, "no kind"),
    ("pictures of the hub", lambda p: None, _read_hub, None, ""),
]  # fmt: skip

ATTACKS = [Attack(*row) for row in _ROWS]
