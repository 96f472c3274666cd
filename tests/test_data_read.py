"""Reading: every row has its source, and every error names the file and line."""

import csv
import json
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_ft.config import Data
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import records
from lora_ft.errors import DataError, ResourceError, SecurityError


def read(path, **settings):
    """Return the records at a path as (source, values); raise the errors in the ledger."""
    ledger = Ledger()
    found = list(records(str(path), "data.path", Data(path=str(path), **settings), ledger))
    ledger.raise_bad()
    return found


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Quotes, escapes, separators that do not end lines, a character beyond 16 bits.
TEXTS = st.text('a "\\\n\r\t\x00\x7fé€\u2028\ufeff😀{}', max_size=8)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**20) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.closes("F01", "F04")
@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), JSON_VALUES, min_size=1), max_size=6), st.data())
def test_valid_json_lines_are_read_with_their_line_numbers(tmp_path_factory, rows, data):
    lines, expected = [], []
    for values in rows:
        lines += [""] * data.draw(st.integers(0, 2))
        lines.append(json.dumps(values, ensure_ascii=data.draw(st.booleans())))
        expected.append((len(lines), values))
    text = data.draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    path = write(tmp_path_factory.mktemp("jsonl"), "a.jsonl", data.draw(st.sampled_from(["", "\ufeff"])) + text)
    assert read(path) == [(f"{path}:{line}", values) for line, values in expected]


def test_json_may_be_a_list_an_object_with_data_or_lines(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    for document in (rows, {"version": 1, "data": rows}):
        path = write(tmp_path, "a.json", json.dumps(document, indent=1))
        assert read(path) == [(f"{path}:row {n}", values) for n, values in enumerate(rows, 1)]
    path = write(tmp_path, "lines.json", '{"text": "a"}\n\n{"text": "b"}\n')
    assert read(path) == [(f"{path}:1", rows[0]), (f"{path}:3", rows[1])]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('[{"text": "a"},\n {"text" "b"}]', r"a\.json:2: column 10: not JSON"),
        ('{"text": "a"}', "must be a list of objects"),
        ("[" * 10**5, r"a\.json:row 1: row: is nested too deeply"),
        ('[{"text": "a"}, {"text": "b", "text": "c"}]', r"a\.json:row 2: text: key occurs twice in one object: .*'c'"),
        ('[{"n": %s}]' % ("7" * 5000), r"a\.json:row 1: number: cannot be read: .*4300 digits"),
        ('{"n": 1, "n": 2}', r"a\.json: n: key occurs twice"),
        ('[{"text": "a"}] 7', r"a\.json:1: column 17: not JSON: Extra data"),
        ('[{"text": "a"}\n {"text": "b"}]', r"a\.json:2: column 2: not JSON: Expecting ','"),
        ('[{"text": "a"},\n\n {"text": "b"', r"a\.json:3: column 14: not JSON: Expecting ',' delimiter"),
        ("", r"a\.json:1: column 1: not JSON"),
    ],
)
def test_invalid_json_is_reported_with_its_position(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, "a.json", document))


def test_csv_rows_keep_their_fields_and_first_lines(tmp_path):
    path = tmp_path / "a.csv"
    rows = [["one", "a,b"], ["two\nlines", 'with "quotes"'], ["form\x0cfeed \u2028", "x" * 200_000], ["", "last"]]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *rows])
    found = read(path)
    assert [list(values.values()) for _, values in found] == rows
    assert [source for source, _ in found] == [f"{path}:{line}" for line in (2, 3, 5, 6)]


def test_a_csv_may_have_one_column_without_a_name(tmp_path):
    assert read(write(tmp_path, "a.csv", ",text,label\n0,a,b\n1,c,d\n"))[1][1] == {"": "1", "text": "c", "label": "d"}


def test_an_empty_path_does_not_mean_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", '{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.path is empty"):
        read("")


def test_tsv_fields_are_separated_by_tabs(tmp_path):
    assert read(write(tmp_path, "a.tsv", "q\ta\n1,5\t2\n"))[0][1] == {"q": "1,5", "a": "2"}


@pytest.mark.closes("F01", "F04")
@pytest.mark.parametrize("text", ["a,a\n1,2\n", ",\n1,2\n", ""])
def test_a_csv_header_must_name_the_columns(tmp_path, text):
    with pytest.raises(DataError, match=r"a\.csv:1: header"):
        read(write(tmp_path, "a.csv", text))


@pytest.mark.closes("F01", "F04")
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.json", "a.jsonl"])
@pytest.mark.parametrize("damage", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0"])
def test_a_file_that_is_not_utf8_text_is_reported_with_the_line(tmp_path, name, damage):
    with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 text: byte 0x{damage[0]:02x}; convert the file"):
        read(write(tmp_path, name, b"text\nb" + damage + b"\nc"))


@pytest.mark.closes("F02")
def test_parquet_rows_keep_types_and_have_numbers(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}, {"messages": [], "n": None}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert read(path) == [(f"{path}:row 1", rows[0]), (f"{path}:row 2", rows[1])]


# Each row lacks keys that the other has, which Arrow fills with nulls: it has one schema for all rows.
UNEVEN = [
    {"turns": [{"role": "user", "content": "a"}, {"calls": [{"name": "f", "arguments": {"x": 1}}]}], "note": None},
    {"turns": [{"calls": [{"name": "g", "arguments": {"y": [None, 2]}}], "role": "tool"}, {}], "note": "b"},
]


def test_nulls_that_arrow_fills_in_are_dropped_from_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(UNEVEN), path)
    assert [values for _, values in read(path)] == UNEVEN


def test_nulls_that_arrow_fills_in_are_dropped_from_hub_rows(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(UNEVEN))
    assert [values for _, values in read("org/name")] == UNEVEN


def test_nulls_in_json_files_are_kept(tmp_path):
    row = {"turns": [{"role": "user", "content": None, "more": {"x": None}}]}
    assert read(write(tmp_path, "a.jsonl", json.dumps(row)))[0][1] == row
    assert read(write(tmp_path, "a.json", json.dumps([row])))[0][1] == row


def test_a_damaged_parquet_file_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet:row 1: file: not readable as Parquet"):
        read(write(tmp_path, "a.parquet", b"PAR1 but not Parquet"))


def test_plain_text_is_one_document_per_paragraph(tmp_path):
    path = write(tmp_path, "a.txt", "\r\n\r\none\r\n  still one\r\n \t\r\n\r\ntwo\r\n")
    assert read(path) == [(f"{path}:3", {"text": "one\n  still one"}), (f"{path}:7", {"text": "two"})]


def test_files_of_a_folder_are_read_in_order_and_have_one_format(tmp_path):
    write(tmp_path, "b.jsonl", '{"text": "b"}')
    write(tmp_path, "a.jsonl", '{"text": "a"}')
    write(tmp_path, "README.md", "not rows")
    assert [values["text"] for _, values in read(tmp_path)] == ["a", "b"]
    write(tmp_path, "c.csv", "text\nc")
    with pytest.raises(DataError, match=r"mixes file formats \(\.csv, \.jsonl\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        {"train": ["train"], "validation": ["validation"], "test": ["test"]},
        {"train": ["train-00000-of-00002", "train-00001-of-00002"], "validation": ["dev-00000-of-00001"], "test": []},
        {"train": ["my_train"], "validation": ["my_val", "other.valid"], "test": ["my_test1"]},
        {"train": ["Training"], "validation": ["qa eval"], "test": ["testing"]},
    ],
)
def test_splits_of_a_folder_are_found_by_file_names(tmp_path, names):
    for name in (name for of_split in names.values() for name in of_split):
        write(tmp_path, f"{name}.jsonl", json.dumps({"text": name}))
    assert [values["text"] for _, values in read(tmp_path)] == names["train"]
    for split in (split for split, files in names.items() if files):
        assert [values["text"] for _, values in read(tmp_path, split=split)] == names[split]
    everything = sorted(name for files in names.values() for name in files)
    assert sorted(values["text"] for _, values in read(tmp_path, split="all")) == everything
    assert read(tmp_path, split="val") == read(tmp_path, split="validation")


def test_splits_of_a_folder_may_have_different_formats(tmp_path):
    write(tmp_path, "train.jsonl", '{"text": "a"}')
    write(tmp_path, "test.csv", "text\nb")
    assert [values for _, values in read(tmp_path)] == [{"text": "a"}]
    with pytest.raises(DataError, match="mixes file formats"):
        read(tmp_path, split="all")


def test_a_folder_with_some_files_named_for_splits_is_refused(tmp_path):
    for name in ("notes", "test", "train_test"):  # the last names two splits
        write(tmp_path, f"{name}.jsonl", json.dumps({"text": name}))
    message = (
        r"named for splits \(test\.jsonl\) and others are not \(notes\.jsonl, train_test\.jsonl\): .*data\.split=all"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path)
    assert len(read(tmp_path, split="all")) == 3
    (tmp_path / "test.jsonl").unlink()
    assert len(read(tmp_path)) == 2, "no name contains a split"


def test_a_missing_split_is_reported_with_the_splits_of_the_folder(tmp_path):
    write(tmp_path, "test.jsonl", '{"text": "a"}')
    write(tmp_path, "dev.jsonl", '{"text": "a"}')
    with pytest.raises(DataError, match=r"has no files of the split train: choose data\.split=test or validation"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "no/such/folder", "./nothing", "/absolute", "~/none.csv"])
def test_a_missing_path_is_reported_with_its_setting(name):
    with pytest.raises(DataError, match=r"data\.path: there is no file or folder"):
        read(name)


def test_an_empty_folder_and_an_unknown_suffix_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no file of rows"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"rows\.xlsx cannot be read as rows"):
        read(write(tmp_path, "rows.xlsx", "x"))


def test_a_package_folder_is_read_without_importing_the_package():
    found = read("package:chatterbot_corpus/data/english")
    assert found[0][0] == "ai.yml:5"
    assert "chatterbot_corpus" not in sys.modules


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "package:no_such_package/x",
            ResourceError,
            "no_such_package is not installed; .* pip install no-such-package",
        ),
        ("package:chatterbot_corpus/data/klingon", DataError, "has no data/klingon"),
        ("package:chatterbot_corpus/../numpy", SecurityError, "leads out of its package"),
        ("package:chatterbot_corpus", DataError, "must have the form package:NAME/FOLDER"),
    ],
)
def test_a_package_path_that_cannot_be_read_is_reported(path, error, message):
    with pytest.raises(error, match=message):
        read(path)


def chatterbot(folder, text, name="topic.yml"):
    ledger = Ledger()
    path = write(folder, name, text)
    found = list(records(str(path), "data.path", Data(), ledger))
    ledger.raise_bad()
    chats = [[m["content"] for m in values["messages"]] for _, values in found]
    return chats, [source.rpartition(":")[2] for source, _ in found], dict(+ledger.left_out)


def test_chatterbot_lines_alternate_and_a_last_user_line_is_left_out(tmp_path):
    text = "conversations:\n- - Hi\n  - Hello\n- - Are you?\n  - Yes\n  - No\n- alone\n"
    chats, lines, left_out = chatterbot(tmp_path, text)
    assert chats == [["Hi", "Hello"], ["Are you?", "Yes"]]
    assert lines == ["2", "4"]
    assert left_out == {"user turns without an answer": 2}


def test_chatterbot_alternative_answers_become_separate_rows(tmp_path):
    chats, lines, left_out = chatterbot(tmp_path, "conversations:\n- - Sad?\n  - No\n  - Never\n", "emotion.yml")
    assert (chats, lines, left_out) == ([["Sad?", "No"], ["Sad?", "Never"]], ["3", "4"], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("categories: [a]\n", "must hold `conversations`"),
        ("- a\n", "must hold `conversations`"),
        ("conversations: [a\n", r"topic\.yml:2: not YAML"),
        ("conversations: " + "[" * 10**5 + "]" * 10**5, "nested more than 20 deep"),
        ("conversations:\n- - \x00\n", "not YAML"),
    ],
)
def test_invalid_chatterbot_files_are_reported(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        chatterbot(tmp_path, text)


def test_a_hub_dataset_is_loaded_with_its_settings(monkeypatch):
    import datasets

    def load_dataset(path, name, *, split, revision):
        assert (path, name, split, revision) == ("org/name", "small", "test", "abc")
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name", name="small", split="test", revision="abc") == [("org/name:row 1", {"text": "a"})]


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Unknown split"), FileNotFoundError("gone")])
def test_a_hub_dataset_that_cannot_be_loaded_is_reported(monkeypatch, error):
    import datasets

    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ResourceError, match=rf"data\.path: org/name is neither a local file .*{error}.*data\.split"
    ) as caught:
        read("org/name")
    assert "\n" not in str(caught.value)
