"""Tables and encodings as people have them: read where they have one meaning, else refused in one message."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft import config, validation
from lora_ft.config import Data
from lora_ft.data.rows import Ledger
from lora_ft.data.sources import records
from lora_ft.errors import ConfigError, DataError

ROWS = [{"prompt": f"Où est {n}?", "completion": f"Là, à {n}"} for n in range(4)]
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}


def read(path: Path, **values: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the rows of a file and what was converted; raise the errors in the ledger."""
    ledger = Ledger(values.pop("strict", False))
    found = [row for _, row in records(str(path), "data.path", Data(path=str(path), **values), ledger)]
    ledger.raise_bad()
    return found, dict(ledger.converted)


def write(folder: Path, content: bytes | str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(rows: list[dict[str, Any]], **dialect: Any) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter", NAMES)
@pytest.mark.parametrize(("name", "usual"), [("a.csv", ","), ("a.tsv", "\t")])
def test_delimiter_is_detected_and_counted(tmp_path, name, usual, delimiter, quoting):
    path = write(tmp_path, table(ROWS, delimiter=delimiter, quoting=quoting), name)
    counted = {} if delimiter == usual else {f"files with {NAMES[delimiter]} between fields": 1}
    assert read(path) == (ROWS, counted)
    assert read(path, delimiter=delimiter, strict=True) == (ROWS, {})  # what the user names is no conversion
    if counted:
        with pytest.raises(DataError, match=rf"a\.\wsv: .*{NAMES[delimiter]} between fields.*data\.strict=true"):
            read(path, strict=True)


TEXTS_OF_FIELDS = st.text('ab ,;|\t"\né', min_size=1)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(st.tuples(TEXTS_OF_FIELDS, TEXTS_OF_FIELDS), min_size=1, max_size=6),
    delimiter=st.sampled_from(list(NAMES)),
)  # fmt: skip
def test_a_delimiter_is_never_guessed_wrong(tmp_path_factory, rows, delimiter):
    """A table is read with the fields that were written, whatever delimiters are in its text."""
    expected = [{"one": a, "two": b} for a, b in rows]
    path = write(tmp_path_factory.mktemp("csv"), table(expected, delimiter=delimiter, lineterminator="\n"))
    assert read(path)[0] == expected


@pytest.mark.parametrize("name", ["semicolon", ";"])
def test_named_delimiters(tmp_path, name):
    path = write(tmp_path, "a,b;c\n1,2;3\n")
    assert read(path, delimiter=name)[0] == [{"a,b": "1,2", "c": "3"}]
    assert read(path)[0] == [{"a": "1", "b;c": "2;3"}], "the usual delimiter of the suffix fits"
    for tab in ("tab", "\\t", "\t"):
        assert read(write(tmp_path, "a\tb\n1\t2\n"), delimiter=tab)[0] == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("line", ["sep=;", "SEP=;", '"sep=;"'])
def test_first_line_may_name_the_delimiter(tmp_path, line):
    path = write(tmp_path, f"\ufeff{line}\r\na,b;c\r\n1,2;3\r\n4,5\r\n")
    with pytest.raises(DataError, match=r"1 bad row:\n  .*a\.csv:4: row: has 1 fields, the header has 2"):
        read(path)
    path = write(tmp_path, f"{line}\na,b;c\n1,2;3\n")
    assert read(path) == ([{"a,b": "1,2", "c": "3"}], {"files whose first line names the delimiter": 1})
    assert next(records(str(path), "data.path", Data(), Ledger()))[0] == f"{path}:3"
    assert read(path, delimiter=",")[0] == [{"a": "1", "b;c": "2;3"}], "the setting decides"


@pytest.mark.parametrize(("text", "message"), [
    ("a;b|c\n1;2|3\n", r"a\.csv:1: header: has 2 separated by semicolons, 2 separated by pipes, in all rows"),
    ("a;b\n1;2\n3\n", r"a\.csv:1: header: has 2 separated by semicolons, but some rows have more or fewer: set data"),
    ('a;b\n1;2\n"3" x;4\n', r"header: has 2 separated by semicolons, but some rows"),
])  # fmt: skip
def test_delimiter_that_is_not_certain_is_asked_for_in_one_message(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_rows_with_wrong_fields_are_listed_if_the_usual_delimiter_divides_the_header(tmp_path):
    with pytest.raises(DataError, match=r"2 bad rows:\n  .*:3: row: has 3 fields.*\n  .*:4: row: ',' expected"):
        read(write(tmp_path, 'a,b\n1,2\n1;2,3,4\n"1";2,3\n'))


def test_table_of_one_column_has_no_delimiter(tmp_path):
    assert read(write(tmp_path, 'text\none\n"two; three, four"\n')) == (
        [{"text": "one"}, {"text": "two; three, four"}],
        {},
    )


def test_a_long_row_at_the_end_of_the_compared_lines_is_not_cut(tmp_path):
    rows = [{"a": "x;y", "b": "one\n" * 7}] * 60
    assert read(write(tmp_path, table(rows, delimiter=";")))[0] == rows


SPACED = [
    ("prompt, completion\nWhat?, It is.\n", [{"prompt": "What?", "completion": "It is."}]),
    ('prompt, completion\n"a, b", "c, ""d"""\n', [{"prompt": "a, b", "completion": 'c, "d"'}]),
    (" prompt ,completion \nWhat? ,It is. \n", [{"prompt": "What?", "completion": "It is."}]),
    ("prompt ; completion\nWhat?;  It is.\n", [{"prompt": "What?", "completion": "It is."}]),
    ('"prompt", "completion"\n"a\n b", "c"\n', [{"prompt": "a\n b", "completion": "c"}]),
]


@pytest.mark.parametrize(("text", "rows"), SPACED)
def test_blanks_around_names_and_fields_are_dropped_and_counted(tmp_path, text, rows):
    path = write(tmp_path, text)
    found, converted = read(path)
    assert found == rows
    assert converted["files with blanks around columns' names, dropped there and around fields"] == 1
    with pytest.raises(DataError, match=r"data\.strict=true refuses"):
        read(path, strict=True)


def test_blanks_around_fields_are_kept_if_names_have_none(tmp_path):
    assert read(write(tmp_path, "a,b\n 1, 2 \n")) == ([{"a": " 1", "b": " 2 "}], {})


def test_names_that_are_equal_without_blanks_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: header: must name the columns, each differently"):
        read(write(tmp_path, "a, a\n1,2\n"))


LINES = "".join(f'{{"prompt": "{row["prompt"]}", "completion": "{row["completion"]}"}}\n' for row in ROWS)
TEXTS = {
    "a.csv": (table(ROWS), ROWS),
    "a.tsv": (table(ROWS, delimiter="\t"), ROWS),
    "a.jsonl": (LINES, ROWS),
    "a.json": ("[" + LINES.strip().replace("\n", ",") + "]", ROWS),
    "a.txt": ("Où?\n\nÀ côté", [{"text": "Où?"}, {"text": "À côté"}]),
}
MARKED = {"utf-16": "UTF-16", "utf-32": "UTF-32"}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
def test_byte_order_mark_names_the_encoding(tmp_path, name, encoding):
    text, rows = TEXTS[name]
    path = write(tmp_path, ("\ufeff" + text).encode(encoding), name)
    shown = encoding[:6].upper()
    assert read(path) == (rows, {} if encoding == "utf-8" else {f"files read as {shown}": 1})
    if encoding != "utf-8":
        with pytest.raises(DataError, match=rf"{name}: file: needs a conversion \(files read as {shown}\)"):
            read(path, strict=True)
        assert read(path, encoding=encoding[:6], strict=True) == (rows, {})
        with pytest.raises(DataError, match=rf"begins with the byte order mark of {shown}, which data.encoding=cp1252"):
            read(path, encoding="cp1252")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_zeros_of_the_first_letters_name_an_encoding_without_a_mark(tmp_path, name, encoding):
    text, rows = TEXTS[name]
    assert read(write(tmp_path, text.encode(encoding), name)) == (rows, {f"files read as {encoding[:6].upper()}": 1})


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp850"])
def test_eight_bit_file_is_refused_in_one_message_unless_its_encoding_is_named(tmp_path, name, encoding):
    text, rows = TEXTS[name]
    data = text.encode(encoding)
    path = write(tmp_path, data, name)
    first = next(i for i, byte in enumerate(data) if byte > 127)
    line = data[:first].count(b"\n") + 1
    with pytest.raises(
        DataError, match=rf"{name}:{line}: not UTF-8 text: byte 0x{data[first]:02x}; .*=cp1252"
    ) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert read(path, encoding=encoding, strict=True) == (rows, {})


def test_byte_that_the_named_encoding_does_not_have_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:3: not CP1252 text: byte 0x81; .* to its encoding$"):
        read(write(tmp_path, b"a,b\n1,2\n3,\x81\n"), encoding="cp1252")
    with pytest.raises(DataError, match=r"a\.csv:2: not UTF-8 text: byte 0x00; .* set data\.encoding to its encoding$"):
        read(write(tmp_path, b"a,b\n1,\x002\n3,\xff\n"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252", "shift_jis"])
def test_characters_are_not_cut_between_the_pieces_of_a_file(tmp_path, encoding, monkeypatch):
    rows = [{"a": "é" * n if encoding == "cp1252" else "あ" * n, "b": "x"} for n in range(1, 40)]
    if encoding == "shift_jis":
        rows = [{**row, "a": row["a"].replace("é", "あ")} for row in rows]
    path = write(tmp_path, table(rows).encode(encoding))
    for size in (1, 2, 3, 5, 64):
        monkeypatch.setattr("lora_ft.data.text_files._CHUNK", size)
        if size >= 4 or encoding != "utf-16":  # the mark is looked for in the first piece
            assert read(path, encoding=encoding)[0] == rows


@pytest.mark.parametrize("name", ["no-such-codec", "hex", "rot13", "undefined"])
def test_encoding_must_be_one_of_text(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"data\.encoding must be a text encoding such as .*, got {name}"):
        read(write(tmp_path, "a,b\n1,2\n"), encoding=name)


@pytest.mark.parametrize(("value", "is_good"), [
    (";", True), ("tab", True), ("\\t", True), ("pipe", True), ("^", True), ("ab", False), ("", False), ('"', False),
    ("\n", False),
])  # fmt: skip
def test_delimiter_must_be_a_character_or_a_name(value, is_good):
    if is_good:
        validation.validate_values(Data(delimiter=value))
        return
    with pytest.raises(ConfigError, match="delimiter must be of the form tab"):
        validation.validate_values(config.Data(delimiter=value))
