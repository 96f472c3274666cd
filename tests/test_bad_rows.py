"""Bad rows: each is reported with file, line, field, reason and excerpt, and no good row is."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import tiny_tokenizer

from lora_ft.config import Data, TooLong
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import LONGEST_EXCERPT, MOST_BAD_ROWS, is_blank
from lora_ft.errors import DataError

TOKENIZER = tiny_tokenizer()
# Long text with characters that JSON escapes, terminals interpret or fonts do not show.
UGLY = 'aZ "\\/<>{}[],\n\t\r\x00\x1b[31m\x7f\x85é€\u202e\u2028\u200b\ufeff😀你' * 20
BLANK = " \n\t\u2003\u200b\ufeff\x00"
END = "<|im_end|>"


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def call(arguments: Any) -> dict[str, Any]:
    return chat(user("a"), assistant("b", tool_calls=[{"function": {"name": "f", "arguments": arguments}}]))


ROLES = r"role must be one of system, developer, user, human, .*, function_call, tool_call, got"
CONTROL = re.escape(f"holds the control token {END}")
NO_TOOLS = ": tools and calls need a base whose chat template writes them, or another model.chat_template"
ARGUMENTS = r"messages\[1\]\.tool_calls\[0\]\.arguments"
NOT_JSON = r"column \d+: not JSON: .+?"
A, B = user("a"), assistant("b")

# A good row, and bad rows of its format by the error that each gives. Bytes are a line of the file, all else is JSON.
LINES = {
    NOT_JSON: [
        b'{"text": "go',
        b'{"text": "a"} {"text": "b"',
        b'{"text": "a"} 7',
        b'{"text": "a\tb"}',
        b"{'text': 'a'}",
        b' \xef\xbb\xbf{"text": "a"}',
    ],
    "text: holds half of a surrogate pair, which is not a character": [
        b'{"text": "\\ud83d"}',
        b'{"text": "\\udfff\\ud800"}',
    ],
    ".key: holds half of a surrogate pair, which is not a character": [b'{"text": "a", "\\ud83dkey": 1}'],
    "row: is nested too deeply": [b"[" * 10**5],
    "text: key occurs twice in one object": [b'{"text": "a", "text": "b"}'],
    ".{120}: key occurs twice in one object": [f'{{"{"k" * 999}": 1, "{"k" * 999}": 2}}'.encode()],
    "number: cannot be read: .*4300 digits.*": [b'{"text": %b}' % (b"7" * 4301)],
    "row: must be an object with columns": [[], 7, None, "text", {}],
    r"text: must be text, got \w+": [{"text": v} for v in (None, ["a"], {"a": "b"})],
    r"text: must be text or a finite number, got \w+": [{"text": v} for v in (math.nan, math.inf)],
    r"text: 7\.0 may be a decimal, or an integer that pandas stored beside empty cells: .+": [{"text": 7.0}],
    "text: is empty": [{"text": ""}, {"text": BLANK}],
}
CHATS = {
    "messages: is missing": [{"id": 7}, {"prompt": "a", "completion": "b"}],
    r"messages: must be a list of messages, got \w+": [{"messages": v} for v in (None, 7, "", "7", {})],
    r"messages: is not JSON: .+ at character \d+": [{"messages": v} for v in ("a", "[{'role': 'user'}]")],
    "messages: is empty": [chat()],
    r"messages\[1\]: must be an object, got \w+": [chat(A, v) for v in (None, 7, "b", [])],
    rf"messages\[0\]: {ROLES} .{{1,120}}": [
        chat({"content": "a"}, B),
        chat({"role": UGLY, "content": "a"}, B),
        chat({"role": ["user"], "content": "a"}, B),
    ],
    r"messages\[1\]: the content of assistant is missing": [chat(A, {"role": "assistant"}), chat(A, assistant(None))],
    r"messages\[1\]: the content of assistant is empty": [chat(A, assistant(v)) for v in ("", BLANK, [])],
    r"messages\[0\]: the content of user is empty": [chat(user(BLANK), B)],
    r"messages\[0\]: content must be text, got object": [chat(user(v), B) for v in ({}, {"text": 1})],
    r"messages\[0\]: content must be text or a list of text parts, got a list with \w+": [
        chat(user(v), B) for v in ([7], [None])
    ],
    r"messages\[0\]: content must be text, got a part whose text is \w+": [
        chat(user([{"type": "text", "text": 1}]), B)
    ],
    r"messages\[0\]: content has a part of type image_url: only text can be trained on": [
        chat(user([{"type": "image_url"}]), B),
        chat(user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]), B),
    ],
    "messages: no assistant message follows a user message; data.turns=drop leaves such rows out": [
        chat(A),
        chat(B),
        chat(B, A),
        chat({"role": "system", "content": "s"}, B),
    ],
    "message 2: tool may not follow user; data.turns=drop leaves such rows out": [
        chat(A, {"role": "tool", "content": "t"}, B),
    ],
    r"messages\[1\]: weight must be 0 or 1, got .{1,120}": [
        chat(A, assistant("b", weight=v)) for v in (0.5, 2, 10**99, UGLY, [])
    ],
    r"messages\[1\]: (train|loss) must be true or false, got .{1,120}": [
        chat(A, assistant("b", train=1)),
        chat(A, assistant("b", loss=UGLY)),
    ],
    "messages: no answer is learned: weight, train or loss excludes every answer that data.train_on selects": [
        chat(A, assistant("b", **flag)) for flag in ({"weight": 0}, {"train": False}, {"loss": False})
    ],
    r"tools: must be a list or the JSON text of one, got \w+": [chat(A, B, tools=v) for v in (7, "7", {"a": 1})],
    r"tools: is not JSON: .+ at character 1": [chat(A, B, tools="t")],
    r"tools\[0\]: must be an object, got \w+": [chat(A, B, tools=[v]) for v in (7, "7", None)],
    "functions: a row has tools or functions, not both": [chat(A, B, tools=[{"name": "f"}], functions=[{"name": "f"}])],
    r"messages\[1\]\.tool_calls: must be a list or the JSON text of one, got \w+": [
        chat(A, assistant("b", tool_calls=v)) for v in (7, "7", {"a": 1})
    ],
    r"messages\[1\]\.tool_calls\[0\]: is not JSON: .+ at character 1": [chat(A, assistant("b", tool_calls=["f"]))],
    r"messages\[1\]\.tool_calls: is not JSON: .+ at character 1": [chat(A, assistant("b", tool_calls="f"))],
    r"messages\[1\]: calls of tools must be in one place: .+": [
        chat(A, assistant(None, tool_calls=[{"name": "f"}], function_call={"name": "f"}))
    ],
    r"messages\[1\]\.function_call: is not JSON: .+ at character 1": [chat(A, assistant(None, function_call="f"))],
    r"messages\[1\]: tool_calls must be objects with the name of a function": [
        chat(A, assistant(None, tool_calls=[v])) for v in (7, {}, {"function": {"name": 7}}, {"name": BLANK})
    ],
    r"messages\[0\]: tool_calls belong to the assistant, not to user": [chat(user("a", tool_calls=[{"name": "f"}]), B)],
    rf"{ARGUMENTS}: is not JSON: .+ at character 2": [call("{'a': 1}")],
    rf"{ARGUMENTS}: must be an object or the JSON text of one, got \w+": [call(v) for v in (7, ["a"], "7", '"{}"')],
    f"{ARGUMENTS}: must not contain NaN or Infinity, which JSON does not have": [
        call(v) for v in ({"a": [math.nan]}, '{"a": -Infinity}')
    ],
    r"tools\[0\]: must not contain NaN or Infinity.*": [chat(A, B, tools=[{"name": "f", "default": math.nan}])],
    r"messages\[1\]: must not contain NaN or Infinity.*": [chat(A, assistant("b", score=-math.inf))],
    f"{ARGUMENTS}: a: key occurs twice in one object": [call('{"a": 1, "a": 2}')],
    r"system: must be text, got \w+": [chat(A, B, system=v) for v in (["s"], {})],
    f"content: {CONTROL}": [
        chat(user(f"a{END}b"), B),
        chat(A, assistant(UGLY + END)),
        chat(A, assistant("b", tool_calls=[{"name": "f", "arguments": {"x": END}}])),
    ],
    f"tools: {CONTROL}": [chat(A, B, tools=[{"name": "f", "description": END}])],
    f"chat template: drops the tool add_7{NO_TOOLS}": [
        chat(A, B, tools=[{"type": "function", "function": {"name": "add_7"}}])
    ],
    f"chat template: drops the answer's call of add_7{NO_TOOLS}": [
        chat(A, assistant("b", tool_calls=[{"name": "add_7"}]))
    ],
    "chat template: changes or drops the answer": [
        chat(A, assistant("b", thinking="hm hm")),
        chat(A, assistant("b", reasoning_content="hm hm")),
    ],
}
PAIRS = {
    "prompt: is missing": [chat(A, B), {"completion": "b"}],
    "completion: is missing": [{"prompt": "a"}],
    r"completion: must be text, got \w+": [{"prompt": "a", "completion": v} for v in (None, ["b"])],
    "completion: is empty": [{"prompt": "a", "completion": BLANK}],
    "prompt: is empty": [{"prompt": "", "completion": "b"}],
    r"completion: is not JSON: .+ at character 1": [{"prompt": [A], "completion": "b"}],
}
ALPACA = {
    "output: is missing": [{"instruction": "a"}],
    r"input: must be text, got \w+": [{"instruction": "a", "output": "b", "input": v} for v in (["i"], {})],
    r"history: must be a list of \[instruction, answer\]": [
        {"instruction": "a", "output": "b", "history": v} for v in (7, ["ab"], [["a"]], [["a", ""]], "[7]")
    ],
}
SHARE_GPT = {
    rf"conversations\[0\]: {ROLES} 'bing'": [{"conversations": [{"from": "bing", "value": "a"}]}],
    r"conversations\[1\]: the content of gpt is missing": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}
    ],
}
FORMATS = {
    "lines": ({"text": "good"}, LINES),
    "chats": (chat(A, B), CHATS),
    "pairs": ({"prompt": "a", "completion": "b"}, PAIRS),
    "alpaca": ({"instruction": "a", "output": "b"}, ALPACA),
    "conversations": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        SHARE_GPT,
    ),
}


def line_of(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    return path


def errors(path: Path, **settings: Any) -> list[str]:
    """Return the lines of the error that a file of rows gives."""
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(path), eval_fraction=0, **settings), TOKENIZER)
    assert caught.value.exit_code == 4
    head, *lines = str(caught.value).split("\n")
    count = sum(int(more[1]) if (more := re.match(r"    and (\d+) more: ", line)) else 1 for line in lines)
    assert head == (f"{count} bad rows:" if count > 1 else "1 bad row:")
    return lines


def check_errors(lines: list[str], expected: list[tuple[str, str]]) -> None:
    """Check the lines of bad rows against pairs of a source and a pattern of field and reason.

    A line is `source: field: reason: excerpt`. The other rows with that field and reason follow in one line.
    """
    found: dict[str, str] = {}
    source = shown = ""
    for line in lines:
        assert line.isprintable()
        if more := re.match(r"    and (\d+) more: (.+)", line):
            listed = re.sub(r"line (?=\d)", "", more[2]).split(", ")
            assert len(listed) == int(more[1]) < 6, line
            found |= {f"{source.rpartition(':')[0]}:{place}": shown for place in listed}
            continue
        source, shown = line[2:].split(": ")[0], line
        found[source] = shown
    assert sorted(found) == sorted(source for source, _ in expected)
    for source, pattern in expected:
        match = re.match(rf"  [^ ]+(?: \d+)?: (?:{pattern}): (?=.)", found[source])
        assert match, (found[source], pattern)
        assert len(found[source]) - match.end() <= LONGEST_EXCERPT
        assert len(found[source]) <= len(source) + 3 * LONGEST_EXCERPT + 200


@pytest.mark.closes("F01", "F02", "F03", "F04", "F09", "A26")
@pytest.mark.parametrize("name", FORMATS)
def test_bad_rows_are_each_reported_and_the_other_rows_train(name, tmp_path):
    good, by_error = FORMATS[name]
    bad = [(pattern, row) for pattern, rows in by_error.items() for row in rows]
    for start in range(0, len(bad), MOST_BAD_ROWS - 1):
        part = bad[start : start + MOST_BAD_ROWS - 1]
        # Good rows are the majority, since the format is the one of most rows.
        rows = [line for _, row in part for line in (good, row)] + [good]
        path = write(tmp_path, rows)
        check_errors(errors(path), [(f"{path}:{2 * n}", pattern) for n, (pattern, _) in enumerate(part, 1)])
        path = write(tmp_path, [b"" if n % 2 else row for n, row in enumerate(rows)])
        prepared = prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train
        assert [row.source for row in prepared] == [f"{path}:{n}" for n in range(1, len(rows) + 1, 2)]


def test_a_renamed_column_is_reported_by_its_name_in_the_file(tmp_path):
    path = write(tmp_path, [{"body": "a"}, {"body": None}])
    check_errors(errors(path, columns={"text": "body"}), [(f"{path}:2", "body: must be text, got null")])


@pytest.mark.closes("F01")
def test_csv_rows_are_reported_by_their_first_line(tmp_path):
    rows = [b"prompt,completion", b"a,b", b"a", b"a,b,c", b'"two\nlines",b', b'"a"b,c', b'a," "', b'"open,d', b"e,f"]
    path = write(tmp_path, rows, "rows.csv")
    expected = [
        (3, "row: has 1 fields, the header has 2"),
        (4, "row: has 3 fields, the header has 2"),
        (7, "row: ',' expected after '\"'"),
        (8, "completion: is empty"),
        (9, "row: unexpected end of data"),
    ]
    check_errors(errors(path), [(f"{path}:{line}", pattern) for line, pattern in expected])


@pytest.mark.closes("F01", "F04")
def test_rows_of_a_json_list_are_reported_by_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a"}, 7, {"text": "\\ud800"}]')
    expected = [
        (f"{path}:row 2", "row: must be an object with columns"),
        (f"{path}:row 3", "text: holds half of a surrogate pair, which is not a character"),
    ]
    check_errors(errors(path), expected)


@pytest.mark.closes("F01")
def test_yaml_conversations_are_reported_by_line(tmp_path):
    path = write(tmp_path, [b"conversations:", b"- - a", b"  - b", b"- - c: 1", b"- - d", b"  - ' '"], "topic.yml")
    expected = [
        (f"{path}:4", "conversations: must be lists of lines"),
        (f"{path}:5", r"messages\[1\]: the content of assistant is empty"),
    ]
    check_errors(errors(path), expected)


@pytest.mark.closes("F02")
@pytest.mark.parametrize(
    ("values", "settings", "pattern"),
    [
        ({"prompt": ["a"] * 3, "completion": ["b", None, "b"]}, {}, "completion: must be text, got null"),
        ({"a": ["a"] * 3, "b": [1.0, float("nan"), 2.0]}, {"prompt": "{a}", "answer": "{b}"}, "b: .* number, got nan"),
        (
            {"messages": [[A, B], [A, assistant(None)], [A, B]]},
            {},
            r"messages\[1\]: the content of assistant is missing",
        ),
    ],
)
def test_parquet_rows_are_reported_by_number(tmp_path, values, settings, pattern):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table(values), path)
    check_errors(errors(path, **settings), [(f"{path}:row 2", pattern)])


@pytest.mark.closes("F02")
@pytest.mark.parametrize(
    ("column", "type_name"),
    [
        (pa.array([1], pa.decimal128(5)), "Decimal"),
        (pa.array([b"a"]), "bytes"),
        (pa.array([["a"]]), "list"),
        (pa.array([{"a": "b"}]), "object"),
        (pa.array([0], pa.timestamp("ms")), "datetime"),
        (pa.nulls(1), "null"),
    ],
)
def test_parquet_columns_of_another_type_are_refused_and_not_converted(tmp_path, column, type_name):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    check_errors(errors(path), [(f"{path}:row 1", f"text: must be text, got {type_name}")])


@pytest.mark.closes("F01", "F04")
@pytest.mark.parametrize(
    "column",
    [
        pa.Array.from_buffers(pa.string(), 250, pa.array([b"a"] * 220 + [b"\xff"] * 30).buffers()),
        pa.array([0] * 220 + [10**14] * 30, pa.timestamp("s")),
    ],
    ids=["not UTF-8", "year beyond 9999"],
)
def test_parquet_values_that_python_cannot_represent_are_reported(tmp_path, column):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:row 201 to row 250: a value cannot be read: .+"):
        prepare(Data(path=str(path)), TOKENIZER)


@pytest.mark.closes("F05")
@pytest.mark.parametrize("deduplicate", [True, False])
def test_every_row_is_in_the_dataset_or_counted_as_left_out(tmp_path, deduplicate):
    rows = [{"prompt": "again " * count, "completion": "yes"} for count in (1, 2, 2, 40, 41, 41)]
    data = Data(eval_fraction=0, max_length=60, too_long=TooLong.drop, deduplicate=deduplicate)
    data.path = str(write(tmp_path, rows))
    report = prepare(data, TOKENIZER).report
    assert report.train_documents == (2 if deduplicate else 3)
    assert report.train_documents + sum(report.left_out.values()) == len(rows)


@pytest.mark.closes("F01")
def test_reading_stops_after_twenty_bad_rows(tmp_path):
    path = write(tmp_path, [{"text": []}] * 30 + [{"text": "a"}] * 31)
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(path)), TOKENIZER)
    head, *lines = str(caught.value).split("\n")
    assert head == "20 bad rows (stopped there):"
    assert lines == [
        f"  {path}:1: text: must be text, got list: {{'text': []}}",
        "    and 19 more: line 2, line 3, line 4, line 5, line 6, ...",
    ]


def test_one_error_in_many_rows_is_one_message_in_the_order_of_the_rows(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, [chat(A, assistant("b", weight=7)), chat(A, B), chat(A, B, A, assistant("b", weight=7))], name)
    path = write(tmp_path, [chat(A, B)] * 2 + [chat(A, assistant(""))], "a9.jsonl")
    lines = errors(tmp_path)
    assert [line.split(": {")[0] for line in lines] == [
        f"  {path}:3: messages[1]: the content of assistant is empty",
        f"  {tmp_path}/a.jsonl:1: messages[1]: weight must be 0 or 1, got 7",
        f"    and 3 more: line 3, {tmp_path}/b.jsonl:1, {tmp_path}/b.jsonl:3",
    ]


def good_files(folder: Path) -> list[Path]:
    """Write a good file of each format."""
    row = chat(user("a é"), assistant("b"), tools=None)
    (folder / "rows.json").write_text(json.dumps([row] * 3), "utf-8")
    parquet.write_table(pa.Table.from_pylist([{"prompt": "a é", "completion": "b"}] * 3), folder / "rows.parquet")
    return [
        write(folder, [row] * 3),
        write(folder, [b"prompt,completion", *[b'"a, \xc3\xa9",b'] * 3], "rows.csv"),
        write(folder, [b"a \xc3\xa9", b"b", b""] * 3, "rows.txt"),
        write(folder, [b"conversations:", *[b"- - a", b"  - b"] * 3], "topic.yml"),
        folder / "rows.json",
        folder / "rows.parquet",
    ]


@pytest.mark.closes("F01", "F09")
@settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=4
    )
)
def test_a_damaged_file_is_read_or_gives_a_located_error(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("damaged")
    for path in good_files(folder):
        data = path.read_bytes()
        for part, removed, added in edits:
            at = int(part * len(data))
            data = data[:at] + added + data[at + removed :]
        path.write_bytes(data)
        try:
            prepare(Data(path=str(path), eval_fraction=0), TOKENIZER)
        except DataError as error:
            assert path.name in str(error)
            assert str(error).replace("\n", "").isprintable()


def test_characters_unknown_to_this_python_are_not_blank(tmp_path):
    """Emoji newer than Python's tables are unassigned in them; private-use characters have glyphs in some fonts."""
    visible = ["\U0001fa77", "\U0001fae8", "\ue000", "\U0010fffd", "\U0003fff0", "\u0301", "!"]
    path = write(tmp_path, [{"prompt": sign, "completion": sign} for sign in visible])
    assert len(prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train) == len(visible)
    invisible = "\0\t\x7f\x85\xad\u200b\u202e\ufeff\u2028\u2029 \xa0\u2003\u3000"
    assert all(map(is_blank, ["", invisible, *invisible])) and not is_blank(invisible + "\U0001fa77")


@pytest.mark.closes("F04")
def test_text_is_not_normalized(tmp_path):
    texts = ["é", "e\u0301", "a\r\nb", "nul \x00 inside", "\ufeffmark", "a\u2028b", UGLY]
    path = write(tmp_path, [{"text": text} for text in texts])
    rows = prepare(Data(path=str(path), eval_fraction=0, max_length=10_000), TOKENIZER).train
    assert [TOKENIZER.decode(row.ids) for row in rows] == [text + END for text in texts]
