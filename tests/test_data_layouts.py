"""Folders as people have them: saved and cloned datasets, splits in folders, files that only describe rows."""

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_ft import run_rows
from lora_ft.config import Data
from lora_ft.data import read
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import folder_splits, records
from lora_ft.errors import ConfigError, DataError, SecurityError


def rows(name: str, count: int = 3) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}", "completion": f"answer {n}"} for n in range(count)]


def texts(path: Path, **values: Any) -> list[str]:
    """Return the prompts of the rows at a path without their numbers, each name once."""
    ledger = Ledger(values.pop("strict", False))
    found = [row["prompt"] for _, row in records(str(path), "data.path", Data(path=str(path), **values), ledger)]
    ledger.raise_bad()
    return list(dict.fromkeys(prompt.rpartition(" ")[0] for prompt in found))


def write(folder: Path, *names: str) -> None:
    """Write files of rows, each with its own name in its prompts, in the format of its suffix."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows(name)), path)
        elif path.suffix == ".csv":
            path.write_text("prompt,completion\n" + "".join(f"{name} {n},answer {n}\n" for n in range(3)))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(name)))


@pytest.mark.parametrize("max_shard_size", [None, "1KB"])
def test_saved_dataset_is_read_from_the_files_that_its_state_lists(tmp_path, max_shard_size):
    found = datasets.Dataset.from_list(rows("saved", 200))
    found.save_to_disk(tmp_path / "saved", max_shard_size=max_shard_size)
    pa.ipc.new_stream(tmp_path / "saved" / "cache-1f.arrow", pa.schema([])).close()  # of a mapped copy
    ledger = Ledger(strict=True)
    read_rows = list(records(str(tmp_path / "saved"), "data.path", Data(), ledger))
    assert [row for _, row in read_rows] == found.to_list() and not ledger.converted
    source, number = read_rows[-1][0].split(":row ")
    tables = [pa.ipc.open_stream(file).read_all() for file in sorted((tmp_path / "saved").glob("data-*.arrow"))]
    assert source.endswith(".arrow") and int(number) == len(tables[-1])
    assert (len(tables) > 1) == bool(max_shard_size)


def test_saved_dictionary_has_its_splits(tmp_path):
    names = {"train": "a", "validation": "b", "test": "c"}
    datasets.DatasetDict({split: datasets.Dataset.from_list(rows(name)) for split, name in names.items()}).save_to_disk(
        tmp_path / "saved"
    )
    assert texts(tmp_path / "saved", strict=True) == ["a"]
    assert texts(tmp_path / "saved", split="test") == ["c"]
    assert texts(tmp_path / "saved", split="all") == ["a", "b", "c"]
    assert folder_splits(str(tmp_path / "saved"), "data.path") == {"train", "validation", "test"}
    found = read.read(Data(path=str(tmp_path / "saved")))
    assert sum(found.is_eval) == 3 and all("validation" in row.source for row in found.rows[3:])


def test_saved_dictionary_with_splits_of_other_names(tmp_path):
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows(split)) for split in ("train_sft", "test_sft")}
    ).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no files of the split train: choose data\.split=test_sft or train_sft"):
        texts(tmp_path / "saved")
    assert texts(tmp_path / "saved", split="train_sft") == ["train_sft"]


def test_saved_rows_that_are_chosen_by_an_index_are_read_in_their_order_or_refused(tmp_path):
    found = datasets.Dataset.from_list(rows("a", 9)).select([5, 2])
    found.save_to_disk(tmp_path / "saved")
    assert [row for _, row in records(str(tmp_path / "saved"), "data.path", Data(), Ledger())] == found.to_list()
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(DataError, match=r"selects some of the rows by an index: load the folder .* and save it again"):
        texts(tmp_path / "saved")


@pytest.mark.parametrize(("name", "error", "message"), [
    ("../secret.arrow", SecurityError, "which is nothing in its folder"),
    ("/etc/passwd", SecurityError, "which is nothing in its folder"),
    ("data-7.arrow", DataError, "data-7.arrow, which is missing: copy the whole folder"),
])  # fmt: skip
def test_state_that_names_other_files_is_refused(tmp_path, name, error, message):
    datasets.Dataset.from_list(rows("a")).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(error, match=message):
        texts(tmp_path / "saved")


@pytest.mark.parametrize(("split", "error", "message"), [
    ("../train", SecurityError, "which is nothing in its folder"),
    (7, SecurityError, "which is nothing in its folder"),
    ("gone", DataError, "gone/state.json: cannot be read: No such file"),
])  # fmt: skip
def test_dictionary_that_lists_other_folders_is_refused(tmp_path, split, error, message):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows("a"))}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", split]}))
    with pytest.raises(error, match=message):
        texts(tmp_path / "saved")


MIXED = [
    {"prompt": "a", "messages": [{"role": "assistant", "arguments": {"x": 1, "y": None}}]},
    {"prompt": "b", "messages": [{"role": "assistant", "arguments": {"x": ["s", {"z": "1"}]}}]},
    {"prompt": "c", "messages": None},
]


def test_values_of_the_type_json_are_decoded_wherever_datasets_stores_them(tmp_path, monkeypatch):
    found = datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")
    found.save_to_disk(tmp_path / "saved")
    found.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)
    run_rows.write_rows(tmp_path, found, None)
    read_back = [
        [row for _, row in records(str(path), "data.path", Data(), Ledger())]
        for path in (tmp_path / "saved", tmp_path / "a.parquet", tmp_path / "rows.jsonl", "org/name")
    ]
    own = found.to_list()
    assert own[1]["messages"][0]["arguments"] == MIXED[1]["messages"][0]["arguments"], "the library decodes them too"
    expected = [dict(row) for row in MIXED]
    assert read_back == [expected] * 4


DESCRIPTIONS = ("README.md", ".gitattributes", "LICENSE", "dataset_infos.json", "LICENSE.txt", "data.py")


@pytest.mark.parametrize(("files", "train", "validation"), [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], []),
    (["data/train.jsonl", "data/val.jsonl", "data/nested/x.jsonl"], ["data/train.jsonl"], ["data/val.jsonl"]),
    (["train/0000.parquet", "train/0001.parquet", "valid/0000.parquet"],
     ["train/0000.parquet", "train/0001.parquet"], ["valid/0000.parquet"]),
    (["default/train/0.parquet", "default/dev/0.parquet"], ["default/train/0.parquet"], ["default/dev/0.parquet"]),
    (["plain_text/train-0.csv", "plain_text/test-0.csv"], ["plain_text/train-0.csv"], []),
    (["train.jsonl", "test.jsonl", "extra/other.jsonl"], ["train.jsonl"], []),
    (["rows/part-0.jsonl", "rows/part-1.jsonl"], ["rows/part-0.jsonl", "rows/part-1.jsonl"], []),
])  # fmt: skip
def test_cloned_hub_folder_is_read_by_split(tmp_path, files, train, validation):
    write(tmp_path, *files)
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git", "index.jsonl")
    for name in DESCRIPTIONS:
        (tmp_path / name).write_text("{}")
    assert texts(tmp_path) == train
    if validation:
        assert texts(tmp_path, split="validation") == validation
    if train != files:
        read_all = [file for file in files if "nested" not in file and "extra" not in file]
        assert texts(tmp_path, split="all") == sorted(read_all)


def test_descriptions_beside_rows_are_counted_and_refused_if_strict(tmp_path):
    write(tmp_path, "train.jsonl", "val.jsonl")
    for name in DESCRIPTIONS:
        (tmp_path / name).write_text("{}")
    found = read.read(Data(path=str(tmp_path)))
    assert found.ledger.converted["files beside the rows that describe them, not read"] == 2  # .json and .txt
    with pytest.raises(DataError, match=r"data\.path: the folder .*: LICENSE\.txt: needs .*data\.strict=true"):
        texts(tmp_path, strict=True)


def test_configurations_are_chosen_by_path(tmp_path):
    write(tmp_path, "en/train.jsonl", "de/train.jsonl", "fr/train.jsonl")
    with pytest.raises(DataError, match=r"rows in 3 folders .*\(de, en, fr\): choose one with data\.path=.*/de$"):
        texts(tmp_path)
    assert texts(tmp_path / "de") == ["de/train.jsonl"]
    write(tmp_path, *(f"language {n}/train.jsonl" for n in range(20)))
    with pytest.raises(DataError, match=r"rows in 23 folders .*, language 14, \.\.\.\)"):
        texts(tmp_path)


def test_archives_in_a_folder_are_folders(tmp_path):
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            archive.writestr("rows.jsonl", json.dumps({"prompt": f"{split} 0", "completion": "x"}))
    assert texts(tmp_path) == ["train"]
    assert texts(tmp_path, split="test") == ["test"]


def test_a_file_and_its_compressed_copy_are_refused(tmp_path):
    write(tmp_path, "rows.jsonl")
    write(tmp_path, "rows.jsonl.gz")
    with pytest.raises(DataError, match=r"rows\.jsonl and rows\.jsonl\.gz are one file by their names: give one"):
        texts(tmp_path)


def test_folder_without_rows_in_its_folders_is_refused(tmp_path):
    for deep in ("a/b/c/d/e", "empty", ".hidden", "__MACOSX"):
        (tmp_path / deep).mkdir(parents=True)
    write(tmp_path, "a/b/c/d/e/too_deep.jsonl", ".hidden/x.jsonl", "__MACOSX/x.jsonl")
    with pytest.raises(DataError, match="has no file of rows; known suffixes are"):
        texts(tmp_path)


def test_link_out_of_a_subfolder_is_refused_but_not_in_the_cache_of_the_hub(tmp_path):
    write(tmp_path, "outside/rows.jsonl", "hub/blobs/abc.jsonl")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "data" / "train.jsonl").symlink_to(tmp_path / "outside" / "rows.jsonl")
    with pytest.raises(SecurityError, match="outside of its folder"):
        texts(tmp_path / "clone")
    commit = tmp_path / "hub" / "snapshots" / "1f"
    (commit / "data").mkdir(parents=True)
    (commit / "data" / "train.jsonl").symlink_to("../../../blobs/abc.jsonl")
    assert texts(commit) == texts(commit / "data") == ["hub/blobs/abc.jsonl"]


def test_splits_need_a_folder_an_archive_or_a_file_that_has_them(tmp_path):
    write(tmp_path, "rows.jsonl")
    with pytest.raises(ConfigError, match=r"data\.split=test needs"):
        read.read(Data(path=str(tmp_path / "rows.jsonl"), split="test"))
