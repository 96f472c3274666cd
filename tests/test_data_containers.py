"""Files as people have them: compressed, in archives, as Arrow, and as JSON documents of other forms."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from lora_ft.config import Data
from lora_ft.data import json_text, read
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import records
from lora_ft.errors import DataError

ROWS: list[dict[str, Any]] = [{"prompt": f"What is {n}?", "completion": f"é {n}"} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = ("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)).encode()


def read_all(path: Path, **values: Any) -> tuple[list[tuple[str, Any]], dict[str, int]]:
    """Return the records at a path with sources relative to its folder, and what was converted."""
    ledger = Ledger(values.pop("strict", False))
    found = list(records(str(path), "data.path", Data(path=str(path), **values), ledger))
    ledger.raise_bad()
    return [(source.removeprefix(f"{path.parent}/"), row) for source, row in found], dict(ledger.converted)


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES), ("a.csv", CSV), ("A.JSON", json.dumps(ROWS).encode()), ("a.parquet", parquet_bytes(ROWS)),
    ("a.txt", b"one\n\ntwo"),
])  # fmt: skip
def test_compressed_file_gives_the_rows_of_the_file(tmp_path, suffix, name, content):
    plain, _ = read_all(write(tmp_path, name, content))
    compressed, converted = read_all(write(tmp_path, f"{name}.{suffix}", COMPRESS[suffix](content)), strict=True)
    assert compressed == [(source.replace(name, f"{name}.{suffix}"), row) for source, row in plain]
    assert len(plain) >= 2 and not converted


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_parts_one_after_the_other_are_all_read(tmp_path, suffix):
    parts = LINES.splitlines(keepends=True)
    content = b"".join(map(COMPRESS[suffix], parts))
    assert [row for _, row in read_all(write(tmp_path, f"a.jsonl.{suffix}", content))[0]] == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda data: b"no" + data, lambda data: data[:20]])
def test_damaged_compressed_file_is_reported(tmp_path, suffix, damage):
    path = write(tmp_path, f"a.jsonl.{suffix}", damage(COMPRESS[suffix](LINES * 50)))
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}: cannot be read: .+"):
        read_all(path)


def test_file_whose_name_hides_its_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.gz cannot be read as rows; known suffixes are \.jsonl, .*\.gz"):
        read_all(write(tmp_path, "rows.gz", gzip.compress(LINES)))


def archive(folder: Path, members: dict[str, bytes], name: str = "rows.zip") -> Path:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)
    return folder / name


@pytest.mark.parametrize("members", [
    {"rows.jsonl": LINES},
    {"README.md": b"# Rows", "__MACOSX/._rows.jsonl": b"\0", ".hidden.jsonl": b"no", "rows.jsonl": LINES},
    {"data/rows.jsonl": LINES},
    {"data/b.jsonl.gz": gzip.compress(LINES)},
    {"rows.parquet": parquet_bytes(ROWS)},
    {"a.jsonl": LINES[: LINES.index(b"\n") + 1], "b.jsonl": LINES[LINES.index(b"\n") + 1 :]},
])  # fmt: skip
def test_archive_is_read_like_a_folder(tmp_path, members):
    path = archive(tmp_path, members)
    found, converted = read_all(path, strict=True)
    assert [row for _, row in found] == ROWS and not converted
    assert all(source.startswith("rows.zip/") and source[-1].isdigit() for source, _ in found)
    assert list(tmp_path.iterdir()) == [path], "nothing is written"


def test_archive_may_have_splits(tmp_path):
    path = archive(tmp_path, {"train.jsonl": LINES, "val.csv": b"prompt,completion\nx,y\n"})
    assert [row for _, row in read_all(path)[0]] == ROWS
    assert read_all(path, split="validation")[0] == [("rows.zip/val.csv:2", {"prompt": "x", "completion": "y"})]
    assert sum(read.read(Data(path=str(path))).is_eval) == 1, "the validation rows are the eval rows"


def test_damaged_or_encrypted_archive_is_reported(tmp_path):
    data = bytearray(archive(tmp_path, {"a.jsonl": LINES}).read_bytes())
    with pytest.raises(DataError, match=r"bad\.zip: cannot be read: .*zip"):
        read_all(write(tmp_path, "bad.zip", bytes(data[:-9])))
    data[6] |= 1  # flag of encryption, in the header of the member and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(DataError, match=r"locked\.zip/a\.jsonl: cannot be read: .*encrypted"):
        read_all(write(tmp_path, "locked.zip", bytes(data)))


@pytest.mark.parametrize("member", ["../outside/rows.jsonl", "/etc/rows.jsonl", "a/../../rows.jsonl"])
def test_name_of_a_member_that_leads_out_of_the_archive_is_only_a_name(tmp_path, member):
    (tmp_path / "inner").mkdir()
    write(tmp_path, "outside/rows.jsonl", b"not these")
    write(tmp_path, "rows.jsonl", b"nor these")
    with pytest.raises(DataError, match=r"rows\.zip has no file of rows"):
        read_all(archive(tmp_path / "inner", {member: LINES}))


def test_archive_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.zip has no file of rows"):
        read_all(archive(tmp_path, {"a.xlsx": b"x"}))


def test_pointer_of_git_lfs_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.arrow"):
        with pytest.raises(DataError, match=rf"{name[:1]}\..*: is a pointer of Git LFS.*git lfs pull"):
            read_all(write(tmp_path, name, pointer))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt", "a.parquet", "b.jsonl.gz"])
@pytest.mark.parametrize("suffix", [*COMPRESS, "zip"])
def test_file_whose_name_hides_its_compression_is_named(tmp_path, name, suffix):
    packed = COMPRESS[suffix](LINES) if suffix != "zip" else archive(tmp_path, {"rows.jsonl": LINES}).read_bytes()
    content = gzip.compress(packed) if name.endswith(".gz") else packed  # compressed twice
    with pytest.raises(DataError, match=rf"{name}: is .* give it the suffix \.{suffix}"):
        read_all(write(tmp_path, name, content))


UNEVEN = [{"turns": [{"a": 1}, {"b": [None, 2]}], "note": None}, {"turns": [{}], "note": "é"}] * 120


def arrow(path: Path, rows: list[dict[str, Any]], *, is_stream: bool, batch: int) -> Path:
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("batch", [7, 100, 1000])
def test_arrow_file_and_stream_keep_rows_and_numbers(tmp_path, is_stream, batch):
    path = arrow(tmp_path / "a.arrow", UNEVEN, is_stream=is_stream, batch=batch)
    assert read_all(path)[0] == [(f"a.arrow:row {number}", row) for number, row in enumerate(UNEVEN, 1)]


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_feather_file_is_read(tmp_path, compression):
    feather.write_feather(pa.Table.from_pylist(UNEVEN), str(tmp_path / "a.feather"), compression)
    assert [row for _, row in read_all(tmp_path / "a.feather")[0]] == UNEVEN


@pytest.mark.parametrize(("content", "message"), [
    (b"nonsense, and more of it", r"a\.arrow:row 1: file: not readable as Arrow"),
    (b"ARROW1\0\0 and no more", r"a\.arrow:row 1: file: not readable as Arrow"),
    (b"", r"a\.arrow:row 1: file: not readable as Arrow"),
    (b"FEA1....", "Feather file of version 1"),
])  # fmt: skip
def test_damaged_arrow_file_is_reported(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_all(write(tmp_path, "a.arrow", content))


# JSON: each form, in a file with either suffix, gives the same rows.
PRETTY = "".join(json.dumps(row, indent=1) + "\n" for row in ROWS)
FORMS = {
    "lines": (LINES.decode(), ""),
    "list": (json.dumps(ROWS), "list"),
    "indented list": ("\n\n" + json.dumps(ROWS, indent=2) + "\n", "list"),
    "list with an object a line": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]", "list"),
    "objects on several lines": (PRETTY, "several lines"),
    "objects with commas": (PRETTY.replace("}\n", "},\n"), "several lines"),
    "lines with commas": (LINES.decode().replace("}\n", "},\n"), "comma at the end"),
    "all on one line": (LINES.decode().replace("\n", ""), "several objects"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_json_gives_the_same_rows_with_either_suffix(tmp_path, form, suffix):
    text, counted = FORMS[form]
    path = write(tmp_path, "a" + suffix, text)
    found, converted = read_all(path)
    assert [row for _, row in found] == ROWS
    is_conversion = bool(counted) and not (counted == "list" and suffix == ".json")
    assert len(converted) == is_conversion and (not converted or counted in next(iter(converted)))
    if is_conversion:
        with pytest.raises(DataError, match=r"data\.strict=true refuses"):
            read_all(path, strict=True)
    else:
        assert read_all(path, strict=True)[0] == found


def test_objects_on_several_lines_have_the_line_of_their_brace(tmp_path):
    lines = ("\n" + PRETTY).split("\n")
    found, _ = read_all(write(tmp_path, "a.jsonl", "\n" + PRETTY))
    assert [lines[int(source.rpartition(":")[2]) - 1] for source, _ in found] == ["{"] * len(ROWS)
    assert all(int(b[0].rpartition(":")[2]) - int(a[0].rpartition(":")[2]) == 4 for a, b in pairwise(found))


def test_a_bad_first_line_does_not_change_how_lines_are_read(tmp_path):
    for first in ('{"text": "a",', '{"text": "go', "{", '{"text": [', "text", '{"text": }'):
        with pytest.raises(DataError, match=r"1 bad row:\n  .*a\.jsonl:1: column \d+: not JSON"):
            read_all(write(tmp_path, "a.jsonl", first + "\n" + LINES.decode()))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from("aéb"), st.text('a "\\\n{}[]é😀', max_size=30) | st.integers(), min_size=1),
        min_size=1,
        max_size=8,
    ),
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
)  # fmt: skip
def test_json_in_pieces_is_decoded_as_a_whole(tmp_path_factory, rows, piece, indent, is_ascii):
    """The same rows at every size of the pieces in which a file is decoded, however a value is cut."""
    document = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    path = write(tmp_path_factory.mktemp("json"), "a.json", document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_ft.data.text_files._CHUNK", piece)
        patch.setattr(json_text, "_PIECE", piece)
        assert [row for _, row in read_all(path)[0]] == rows


def test_numbers_of_a_list_are_not_cut(monkeypatch):
    monkeypatch.setattr(json_text, "_PIECE", 1)
    text = json_text.JsonText(iter("[123456, -1.5e10]"))
    text.skip("[")
    assert text.value("a") == 123456 and text.next_character() == ","
    text.skip(",")
    assert text.value("a") == -1.5e10 and text.next_character() == "]"


COLUMNS = {"prompt": [row["prompt"] for row in ROWS], "completion": [row["completion"] for row in ROWS]}
NUMBERED = {name: {str(n): value for n, value in enumerate(column)} for name, column in COLUMNS.items()}


@pytest.mark.parametrize("document", [COLUMNS, NUMBERED])
@pytest.mark.parametrize("indent", [None, 2])
def test_columns_in_json_become_rows(tmp_path, document, indent):
    path = write(tmp_path, "a.json", json.dumps(document, indent=indent))
    found, converted = read_all(path)
    assert found == [(f"a.json:row {number}", row) for number, row in enumerate(ROWS, 1)]
    assert converted == {"files of columns read as rows": 1}
    with pytest.raises(DataError, match=r"columns read as rows.*data\.strict=true"):
        read_all(path, strict=True)


@pytest.mark.parametrize("uneven", [
    {**COLUMNS, "completion": ["a"]}, {**COLUMNS, "more": []}, {**NUMBERED, "more": {"0": "a"}},
    {**NUMBERED, "more": {str(n + 1): "a" for n in range(len(ROWS))}},
])  # fmt: skip
def test_columns_of_different_rows_are_refused(tmp_path, uneven):
    with pytest.raises(DataError, match=r"a\.json: columns must have the same number of rows, got prompt 5, "):
        read_all(write(tmp_path, "a.json", json.dumps(uneven)))


@pytest.mark.parametrize("document", [
    {"prompt": "a", "completion": "b"}, {"prompt": ["a"], "version": 1}, {"messages": [{"role": "user"}]},
    {"train": [{"a": 1}], "other": [{"a": 1}], "n": 1}, {"a": {"x": "y"}}, {}, "text", 7,
])  # fmt: skip
def test_json_document_without_rows_is_refused(tmp_path, document):
    with pytest.raises(DataError, match=r"a\.json: must be a list of objects, .*\"train\".* columns"):
        read_all(write(tmp_path, "a.json", json.dumps(document)))


@pytest.mark.parametrize("part", [ROWS, COLUMNS])
def test_splits_in_one_json_file(tmp_path, part):
    other = [{"prompt": "x", "completion": "y"}]
    path = write(tmp_path, "a.json", json.dumps({"train": part, "dev": other, "test": other * 2}))
    assert read_all(path)[0] == [(f"a.json:train row {number}", row) for number, row in enumerate(ROWS, 1)]
    assert read_all(path, split="validation")[0] == [("a.json:dev row 1", other[0])]
    assert len(read_all(path, split="test")[0]) == 2
    assert len(read_all(path, split="all")[0]) == len(ROWS) + 3
    found = read.read(Data(path=str(path)))
    assert (len(found.rows), sum(found.is_eval)) == (len(ROWS) + 1, 1), "the rows of dev are the eval rows"


def test_a_missing_split_of_a_json_file_is_reported(tmp_path):
    path = write(tmp_path, "a.json", json.dumps({"test": ROWS, "dev": ROWS}))
    with pytest.raises(DataError, match=r"a\.json: has no rows of the split train: it has dev, test"):
        read_all(path)


def test_a_lone_surrogate_is_found_in_each_form(tmp_path):
    for name, text in {
        "a.jsonl": '{"text": "\\ud83d"}',
        "b.json": '[{"text": "\\ud83d"}]',
        "c.json": '{"text": ["\\ud83d"]}',
        "d.jsonl": '{\n"text": "\\ud83d"}',
    }.items():
        with pytest.raises(DataError, match=rf"1 bad row:\n  .*{name}:.*: text: holds half of a surrogate pair"):
            read_all(write(tmp_path, name, text))
