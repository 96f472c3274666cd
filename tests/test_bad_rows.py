"""Generated bad rows: each is reported with file, line, field, reason and excerpt, and no good row is.

A case generates one type of bad row and gives the expected error. Every file also has good rows, which must train once
the bad rows are removed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import tiny_tokenizer

from lora_ft.config import Data, TooLong
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import LONGEST_EXCERPT, MOST_BAD_ROWS, is_blank
from lora_ft.errors import DataError

TOKENIZER = tiny_tokenizer()
NUM_BAD = MOST_BAD_ROWS - 1  # one more would stop the reading

# The same examples in every run; failures are not shrunk.
fixed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=2,  # the first one is the simplest, which repeats one row
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

TEXT = st.text(
    'abZ 019 "\\/<>&{}[]:,%\n\t\r\x00\x1b\x7f\x85é€\u202e\u2028\u200b\ufeff😀你', min_size=1, max_size=9
).filter(lambda text: not is_blank(text))
BLANK = st.text(" \n\t\r\u2003\u200b\ufeff\x00\u2028", max_size=4)
WORD = st.text("abcdefgh", min_size=1, max_size=5)
NUMBER = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
NOT_TEXT = NUMBER | st.lists(TEXT, max_size=2) | st.dictionaries(WORD, TEXT, max_size=2)
CONTROL = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|pad|>"])


def dump(values: Any) -> bytes:
    return json.dumps(values).encode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def chats(*messages: st.SearchStrategy[Any], **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries({"messages": st.tuples(*messages).map(list), **columns}).map(dump)


def columns(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries(values).map(dump)


USER, ASSISTANT = TEXT.map(user), TEXT.map(assistant)

ARGUMENTS = r"messages\[1\]\.tool_calls\[0\]\.arguments"


def calls(arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return chats(
        USER, arguments.map(lambda a: assistant("a") | {"tool_calls": [{"function": {"name": "f", "arguments": a}}]})
    )


Pieces = list[tuple[bool, Any]]
"""Rows of a file, each with True if it is bad. Writers return the path of the file and the sources of the bad rows."""


def lines_file(folder: Path, pieces: Pieces, name: str = "rows.jsonl", head: bytes = b"") -> tuple[Path, list[str]]:
    path = folder / name
    path.write_bytes(head + b"".join(piece + b"\n" for _, piece in pieces))
    numbers, number = [], 1 + head.count(b"\n")
    for bad, piece in pieces:
        if bad:
            numbers.append(f"{path}:{number}")
        number += 1 + piece.count(b"\n")
    return path, numbers


def csv_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    return lines_file(folder, pieces, "rows.csv", b"prompt,completion\n")


def yaml_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    return lines_file(folder, pieces, "topic.yml", b"conversations:\n")


def json_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    path = folder / "rows.json"
    path.write_bytes(b"[" + b",\n".join(piece for _, piece in pieces) + b"]")
    return path, [f"{path}:row {n}" for n, (bad, _) in enumerate(pieces, 1) if bad]


def parquet_file(schema: pa.Schema) -> Callable[[Path, Pieces], tuple[Path, list[str]]]:
    def write(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
        path = folder / "rows.parquet"
        columns = [pa.array([piece[column.name] for _, piece in pieces], column.type) for column in schema]
        parquet.write_table(pa.Table.from_arrays(columns, schema=schema), path)
        return path, [f"{path}:row {n}" for n, (bad, _) in enumerate(pieces, 1) if bad]

    return write


TABLE = {"prompt": "{a}", "answer": "{b}"}
GOOD_CHAT = chats(USER, ASSISTANT)
GOOD_PAIR = columns(prompt=TEXT, completion=TEXT)
GOOD_ALPACA = columns(instruction=TEXT, output=TEXT)
GOOD_TEXT = columns(text=st.just("good text"))
GOOD_SHARED = st.tuples(TEXT, TEXT).map(
    lambda t: dump({"conversations": [{"from": "human", "value": t[0]}, {"from": "gpt", "value": t[1]}]})
)
GOOD_CSV = st.tuples(WORD, WORD).map(lambda t: f"{t[0]},{t[1]}".encode())
GOOD_YAML = st.tuples(WORD, WORD).map(lambda t: f'- - "{t[0]}"\n  - "{t[1]}"'.encode())
TEXTS_TABLE = parquet_file(pa.schema([("prompt", pa.string()), ("completion", pa.string())]))
NUMBERS_TABLE = parquet_file(pa.schema([("a", pa.string()), ("b", pa.float64())]))
CHATS_TABLE = parquet_file(
    pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
)
GOOD_ROW = st.fixed_dictionaries({"prompt": WORD, "completion": WORD})
GOOD_NUMBERS = st.fixed_dictionaries({"a": WORD, "b": st.floats(allow_nan=False, allow_infinity=False)})
GOOD_STRUCTS = st.tuples(USER, ASSISTANT).map(lambda t: {"messages": list(t)})


@dataclass(frozen=True)
class Case:
    """bad: rows to add. error: a pattern of `field: reason`. good: the other rows of the file."""

    bad: st.SearchStrategy[Any]
    error: str
    good: st.SearchStrategy[Any] = GOOD_CHAT
    write: Callable[[Path, Pieces], tuple[Path, list[str]]] = lines_file
    settings: dict[str, Any] = field(default_factory=dict)


def cut(line: bytes, at: int) -> bytes:
    return line[: 1 + at % (len(line) - 1)]


def inserted(line: bytes, at: int, piece: bytes) -> bytes:
    """Insert a piece into the text of {"text": "good text"}."""
    at = 10 + at % 9
    return line[:at] + piece + line[at:]


def within(template: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(lambda values: (template % values).encode())


ROLES = r"system, developer, user, human, .*, observation"
ANY = st.integers(0, 999)
NOT_JSON = r"column \d+: not JSON: .+?"
CASES = {
    # Not JSON, or not the JSON of a row.
    "line is cut": Case(st.builds(cut, GOOD_CHAT, ANY), NOT_JSON),
    "two objects in a line": Case(st.builds(lambda a, b: a + b" " + b, GOOD_CHAT, GOOD_CHAT), NOT_JSON),
    "raw control character": Case(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\0", b"\t", b"\x1b", b"\x1f"])), NOT_JSON, GOOD_TEXT
    ),
    "UTF-16": Case(GOOD_TEXT.map(lambda line: line.decode().encode("utf-16-le")), NOT_JSON, GOOD_TEXT),
    "byte order mark inside the file": Case(
        WORD.map(lambda w: b' \xef\xbb\xbf{"text": "%s"}' % w.encode()), NOT_JSON, GOOD_TEXT
    ),
    "not UTF-8": Case(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\xff", b"\xe9", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])),
        r"line: not UTF-8 at byte \d+",
        GOOD_TEXT,
    ),
    "half a surrogate pair": Case(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\\ud83d", b"\\uDC00", b"\\udfff\\ud800"])),
        "text: holds half of a surrogate pair, which is not a character",
        GOOD_TEXT,
    ),
    "half a surrogate pair in a key": Case(
        within('{"text": "a", "\\ud83d%s": 1}', WORD), ".[a-h]+: holds half of a surrogate pair, .*character", GOOD_TEXT
    ),
    "nested too deeply": Case(st.integers(10**4, 10**5).map(lambda n: b"[" * n), "row: is nested too deeply"),
    "key twice": Case(within('{"text": "a", "text": "%s"}', WORD), "text: key occurs twice in one object", GOOD_TEXT),
    "role twice": Case(
        within('{"messages": [{"role": "user", "role": "%s", "content": "a"}]}', WORD),
        "role: key occurs twice in one object",
    ),
    "long key twice": Case(
        TEXT.map(lambda t: b"{%b: 1, %b: 2}" % (dump(t * 99), dump(t * 99))),
        ".{1,120}: key occurs twice in one object",
    ),
    "number of too many digits": Case(
        within('{"text": %s}', st.integers(4301, 6000).map(lambda n: "7" * n)),
        r"number: cannot be read: .*4300 digits.*",
        GOOD_TEXT,
    ),
    "not an object": Case(
        (NUMBER | TEXT | st.none() | st.lists(TEXT, max_size=3)).map(dump), "row: must be an object with columns"
    ),
    "empty object": Case(st.just(b" { }"), "row: must be an object with columns"),
    # Chats.
    "no messages": Case(columns(id=NUMBER), "messages: is missing"),
    "messages of another type": Case(
        columns(messages=NUMBER | TEXT | st.none() | st.dictionaries(WORD, TEXT)),
        r"messages: must be a list of messages, got (int|float|bool|text|object|null)",
    ),
    "empty messages": Case(columns(messages=st.just([])), "messages: is empty"),
    "message of another type": Case(
        chats(USER, NUMBER | TEXT | st.none() | st.lists(TEXT, max_size=2)),
        r"messages\[1\]: must be an object, got \w+",
    ),
    "no role": Case(
        chats(USER, TEXT.map(lambda t: {"content": t})), rf"messages\[1\]: role must be one of {ROLES}, got None"
    ),
    "unknown role": Case(
        chats(st.tuples(WORD | NOT_TEXT, TEXT).map(lambda t: {"role": f"x{t[0]}" * 99, "content": t[1]}), ASSISTANT),
        rf"messages\[0\]: role must be one of {ROLES}, got .{{1,120}}",
    ),
    "role of another type": Case(
        chats(st.tuples(NOT_TEXT, TEXT).map(lambda t: {"role": t[0], "content": t[1]})),
        rf"messages\[0\]: role must be one of {ROLES}, got .{{1,120}}",
    ),
    "no content": Case(
        chats(USER, st.just({"role": "assistant"}) | st.just(assistant(None))),
        r"messages\[1\]: the content of assistant is missing",
    ),
    "content of another type": Case(
        chats((NUMBER | st.dictionaries(WORD, TEXT)).map(user), ASSISTANT),
        r"messages\[0\]: content must be text, got (int|float|bool|object)",
    ),
    "content parts that are not text": Case(
        chats(
            st.lists(st.sampled_from([{"type": "image_url"}, {"type": "text", "text": 1}, "a", None]), min_size=1).map(
                user
            ),
            ASSISTANT,
        ),
        r"messages\[0\]: content must be text, got list",
    ),
    "blank answer": Case(
        chats(USER, (BLANK | st.just([])).map(assistant)), r"messages\[1\]: the content of assistant is empty"
    ),
    "blank question": Case(chats(BLANK.map(user), ASSISTANT), r"messages\[0\]: the content of user is empty"),
    "answer first": Case(chats(ASSISTANT, USER, ASSISTANT), "message 1: assistant may not be first"),
    "two questions": Case(chats(USER, USER, ASSISTANT), "message 2: user may not follow user"),
    "two answers": Case(chats(USER, ASSISTANT, ASSISTANT), "message 3: assistant may not follow assistant"),
    "later system message": Case(
        chats(USER, TEXT.map(lambda t: {"role": "system", "content": t}), ASSISTANT),
        "message 2: system may not follow user",
    ),
    "tool message without a call": Case(
        chats(USER, TEXT.map(lambda t: {"role": "tool", "content": t}), ASSISTANT),
        "message 2: tool may not follow user",
    ),
    "no answer at the end": Case(
        chats(USER, ASSISTANT, USER), "message 3: the chat must end with an assistant message, it ends with user"
    ),
    "weight between 0 and 1": Case(
        chats(
            USER,
            (st.floats(0.01, 0.99) | TEXT | st.integers(2, 10**99) | st.lists(TEXT)).map(
                lambda w: assistant("a") | {"weight": w}
            ),
        ),
        r"messages\[1\]: weight must be 0 or 1, got .{0,120}",
    ),
    "flag that is not a boolean": Case(
        chats(
            USER,
            st.builds(
                lambda k, v: assistant("a") | {k: v},
                st.sampled_from(["train", "loss"]),
                TEXT | st.integers() | st.floats(0, 9) | st.lists(TEXT),
            ),
        ),
        r"messages\[1\]: (train|loss) must be true or false, got .{0,120}",
    ),
    "no answer is learned": Case(
        chats(
            USER,
            st.builds(
                lambda t, f: assistant(t) | f, TEXT, st.sampled_from([{"weight": 0}, {"train": False}, {"loss": False}])
            ),
        ),
        "messages: no answer is learned: weight, train or loss excludes every answer that data.train_on selects",
    ),
    "tools of another type": Case(
        chats(USER, ASSISTANT, tools=NUMBER | TEXT | st.dictionaries(WORD, TEXT)), r"tools: must be a list, got \w+"
    ),
    "tool of another type": Case(
        chats(USER, ASSISTANT, tools=st.lists(NUMBER | TEXT | st.none(), min_size=1)),
        r"tools\[0\]: must be an object, got \w+",
    ),
    "tool calls of another type": Case(
        chats(USER, (TEXT | st.integers(1, 9)).map(lambda c: assistant("a") | {"tool_calls": c})),
        r"messages\[1\]: tool_calls must be a list, got (text|int)",
    ),
    "tool call without a name": Case(
        chats(USER, (NOT_TEXT | BLANK).map(lambda n: assistant(None) | {"tool_calls": [{"function": {"name": n}}]})),
        r"messages\[1\]: tool_calls must be objects with the name of a function",
    ),
    "tool calls of the user": Case(
        chats(USER.map(lambda m: m | {"tool_calls": [{"name": "add"}]}), ASSISTANT),
        r"messages\[0\]: tool_calls belong to the assistant, not to user",
    ),
    "arguments that are not JSON": Case(
        calls(TEXT.map(lambda t: f"{{'{t}': 1}}")), rf"{ARGUMENTS}: is not JSON: .+ at character 2"
    ),
    "arguments that are not an object": Case(
        calls(NUMBER | st.lists(TEXT) | NUMBER.map(json.dumps) | TEXT.map(json.dumps) | st.just('"{}"')),
        rf"{ARGUMENTS}: must be an object or the JSON text of one, got \w+",
    ),
    "arguments with a key twice": Case(
        calls(st.just('{"a": 1, "a": 2}')), f"{ARGUMENTS}: a: key occurs twice in one object"
    ),
    "system column of another type": Case(chats(USER, ASSISTANT, system=NOT_TEXT), r"system: must be text, got \w+"),
    "control token in a question": Case(
        chats(st.builds(lambda a, c, b: user(a + c + b), TEXT, CONTROL, TEXT), ASSISTANT),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control token in an answer": Case(
        chats(USER, st.builds(lambda a, c: assistant(a * 99 + c), TEXT, CONTROL)),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control token in a tool call": Case(
        chats(USER, CONTROL.map(lambda c: assistant("a") | {"tool_calls": [{"name": "f", "arguments": {"x": c}}]})),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control token in a tool": Case(
        chats(USER, ASSISTANT, tools=CONTROL.map(lambda c: [{"name": "f", "description": f"Say {c}"}])),
        r"tools: holds the control token <\|\w+\|>",
    ),
    "tool that the template drops": Case(
        chats(USER, ASSISTANT, tools=WORD.map(lambda name: [{"type": "function", "function": {"name": f"{name}_7"}}])),
        "chat template: drops the tool [a-h]+_7",
    ),
    "tool call that the template drops": Case(
        chats(USER, WORD.map(lambda name: assistant("a") | {"tool_calls": [{"name": f"{name}_7"}]})),
        "chat template: drops the answer's call of [a-h]+_7",
    ),
    "thoughts that the template drops": Case(
        chats(
            USER,
            st.tuples(WORD, st.sampled_from(["thinking", "reasoning_content"])).map(
                lambda t: assistant("a") | {t[1]: t[0] * 9}
            ),
        ),
        "chat template: changes or drops the answer",
    ),
    # Other formats.
    "pairs among chats": Case(GOOD_PAIR | GOOD_ALPACA, "messages: is missing"),
    "no completion": Case(columns(prompt=TEXT), "completion: is missing", GOOD_PAIR),
    "completion of another type": Case(
        columns(prompt=TEXT, completion=NOT_TEXT | st.none()), r"completion: must be text, got \w+", GOOD_PAIR
    ),
    "blank completion": Case(columns(prompt=TEXT, completion=BLANK), "completion: is empty", GOOD_PAIR),
    "blank prompt": Case(columns(prompt=BLANK, completion=TEXT), "prompt: is empty", GOOD_PAIR),
    "prompt of messages, completion of text": Case(
        columns(prompt=st.tuples(USER).map(list), completion=TEXT),
        "completion: must be a list of messages, got text",
        GOOD_PAIR,
    ),
    "no output": Case(columns(instruction=TEXT), "output: is missing", GOOD_ALPACA),
    "input of another type": Case(
        columns(instruction=TEXT, output=TEXT, input=NOT_TEXT), r"input: must be text, got \w+", GOOD_ALPACA
    ),
    "history of another form": Case(
        columns(
            instruction=TEXT,
            output=TEXT,
            history=st.integers(1, 9) | st.lists(st.lists(TEXT, max_size=1), min_size=1) | st.just([["a", ""]]),
        ),
        r"history: must be a list of \[instruction, answer\]",
        GOOD_ALPACA,
    ),
    "text of another type": Case(columns(text=NOT_TEXT | st.none()), r"text: must be text, got \w+", GOOD_TEXT),
    "blank text": Case(columns(text=BLANK), "text: is empty", GOOD_TEXT),
    "renamed column": Case(
        columns(other=TEXT, body=st.none()),
        "body: must be text, got null",
        columns(body=TEXT),
        settings={"columns": {"text": "body"}},
    ),
    "ShareGPT message without a value": Case(
        TEXT.map(lambda t: dump({"conversations": [{"from": "human", "value": t}, {"from": "gpt"}]})),
        r"conversations\[1\]: the content of gpt is missing",
        GOOD_SHARED,
    ),
    # CSV and Parquet.
    "field too few": Case(WORD.map(str.encode), "row: has 1 fields, the header has 2", GOOD_CSV, csv_file),
    "field too many": Case(within("%s,a,b", WORD), "row: has 3 fields, the header has 2", GOOD_CSV, csv_file),
    "text after a quote": Case(within('"%s"b,c', WORD), "row: ',' expected after '\"'", GOOD_CSV, csv_file),
    "blank cell": Case(
        within("%s,%s", WORD, st.sampled_from(["", " ", '"\n"'])), "completion: is empty", GOOD_CSV, csv_file
    ),
    "null in Parquet": Case(
        st.just({"prompt": "a", "completion": None}), "completion: must be text, got null", GOOD_ROW, TEXTS_TABLE
    ),
    "NaN in Parquet": Case(
        st.sampled_from([float("nan"), float("inf")]).map(lambda n: {"a": "a", "b": n}),
        "b: must be text or a finite number, got (nan|inf)",
        GOOD_NUMBERS,
        NUMBERS_TABLE,
        TABLE,
    ),
    "message without content in Parquet": Case(
        USER.map(lambda m: {"messages": [m, assistant(None)]}),
        r"messages\[1\]: the content of assistant is missing",
        GOOD_STRUCTS,
        CHATS_TABLE,
    ),
    # Files that are read as a whole.
    "not an object in a list": Case(
        (NUMBER | TEXT | st.none()).map(dump), "row: must be an object with columns", GOOD_TEXT, json_file
    ),
    "half a surrogate pair in a list": Case(
        within('{"text": "\\ud800%s"}', WORD), "text: holds half of a surrogate pair, .+?", GOOD_TEXT, json_file
    ),
    "mapping in YAML": Case(
        within("- - %s: 1\n  - b", WORD), "conversations: must be lists of lines", GOOD_YAML, yaml_file
    ),
    "blank line in YAML": Case(
        within("- - %s\n  - ' '", WORD), r"messages\[1\]: the content of assistant is empty", GOOD_YAML, yaml_file
    ),
}


def errors(path: Path, **settings: Any) -> list[str]:
    """Return the lines of the error that a file of rows gives."""
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(path), eval_fraction=0, **settings), TOKENIZER)
    assert caught.value.exit_code == 4
    head, *lines = str(caught.value).split("\n")
    assert head == (f"{len(lines)} bad rows:" if len(lines) > 1 else "1 bad row:")
    return lines


def check_errors(lines: list[str], sources: list[str], patterns: list[str]) -> None:
    """Check that each line is `source: field: reason: excerpt` for the rows of `sources`, in the order of the file."""
    assert [line[2:].split(": ")[0] for line in lines] == sources
    for line, source, pattern in zip(lines, sources, patterns, strict=True):
        match = re.match(rf"  {re.escape(source)}: (?:{pattern}): (?=.)", line)
        assert match, line
        assert len(line) - match.end() <= LONGEST_EXCERPT
        assert len(line) <= len(source) + 3 * LONGEST_EXCERPT + 100
        assert line.isprintable()


@pytest.mark.closes("F01", "F02", "F03", "F04", "F09", "A26")
@pytest.mark.parametrize("name", CASES)
@fixed
@given(data=st.data())
def test_bad_rows_are_each_reported_and_good_ones_are_not(name, data, tmp_path_factory):
    case = CASES[name]
    bad = data.draw(st.lists(case.bad, min_size=NUM_BAD, max_size=NUM_BAD))
    good = data.draw(st.lists(case.good, min_size=NUM_BAD + 1, max_size=NUM_BAD + 9))
    # Good rows are the majority, since the format is the one of most rows.
    pieces = data.draw(st.permutations([(True, piece) for piece in bad] + [(False, piece) for piece in good]))
    path, sources = case.write(tmp_path_factory.mktemp("case"), pieces)
    check_errors(errors(path, **case.settings), sources, [case.error] * NUM_BAD)


# Cases whose good rows are chats in JSON lines, so that they can share a file.
CHAT_CASES = sorted(name for name, case in CASES.items() if case.good is GOOD_CHAT)


@pytest.mark.closes("F01", "F03")
@settings(fixed, max_examples=30)
@given(data=st.data())
def test_one_error_lists_bad_rows_of_all_types_and_the_other_rows_train(data, tmp_path_factory):
    good = data.draw(st.lists(GOOD_CHAT, min_size=NUM_BAD + 1, max_size=NUM_BAD + 9))
    names = data.draw(st.lists(st.sampled_from(CHAT_CASES), min_size=1, max_size=NUM_BAD))
    bad = [(name, data.draw(CASES[name].bad)) for name in names]
    order = data.draw(st.permutations([*bad, *(("", line) for line in good)]))
    folder = tmp_path_factory.mktemp("mixed")
    path, sources = lines_file(folder, [(bool(name), line) for name, line in order])
    check_errors(errors(path), sources, [CASES[name].error for name, _ in order if name])

    path, _ = lines_file(folder, [(False, b"" if name else line) for name, line in order])
    dataset = prepare(Data(path=str(path), eval_fraction=0.3), TOKENIZER)
    prepared = {row.source for row in dataset.train + dataset.eval}
    assert prepared == {f"{path}:{n}" for n, (name, _) in enumerate(order, 1) if not name}
    assert dataset.report.rows == len(good) == dataset.report.train_documents + dataset.report.eval_documents


@pytest.mark.closes("F05")
@settings(fixed, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=20), st.integers(30, 90), st.booleans())
def test_every_row_is_in_the_dataset_or_counted_as_left_out(tmp_path_factory, words, max_length, deduplicate):
    rows = [{"prompt": "again " * count, "completion": "yes"} for count in (1, *words)]
    path, _ = lines_file(tmp_path_factory.mktemp("counted"), [(False, dump(row)) for row in rows])
    data = Data(path=str(path), eval_fraction=0, max_length=max_length, too_long=TooLong.drop, deduplicate=deduplicate)
    report = prepare(data, TOKENIZER).report
    assert report.train_documents + report.eval_documents + sum(report.left_out.values()) == len(rows)


@pytest.mark.closes("F01")
def test_reading_stops_after_twenty_bad_rows(tmp_path):
    path, sources = lines_file(tmp_path, [(True, b'{"text": 1}')] * 30 + [(False, b'{"text": "a"}')] * 31)
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(path)), TOKENIZER)
    head, *lines = str(caught.value).split("\n")
    assert head == "20 bad rows (stopped there):"
    check_errors(lines, sources[:20], ["text: must be text, got int"] * 20)


def test_unclosed_quote_is_reported_at_the_line_that_opens_it(tmp_path):
    path, sources = csv_file(tmp_path, [(False, b"a,b"), (True, b"c"), (True, b'"open,d'), (False, b"e,f")])
    check_errors(errors(path), sources, ["row: has 1 fields, the header has 2", "row: unexpected end of data"])


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


@pytest.mark.closes("F02")
@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1]), "int"),
        (pa.array([b"a"]), "bytes"),
        (pa.array([["a"]]), "list"),
        (pa.array([{"a": "b"}]), "object"),
        (pa.array([0], pa.timestamp("ms")), "datetime"),
        (pa.nulls(1), "null"),
    ],
)
def test_parquet_column_of_another_type_is_refused_and_not_converted(tmp_path, column, kind):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    check_errors(errors(path), [f"{path}:row 1"], [f"text: must be text, got {kind}"])


def good_files(folder: Path) -> list[Path]:
    """Write a good file of each format."""
    chat = dump({"messages": [user("a é"), assistant("b")], "tools": None})
    pair = {"prompt": "a é", "completion": "b"}
    return [
        lines_file(folder, [(False, chat)] * 3)[0],
        csv_file(folder, [(False, b'"a, \xc3\xa9",b')] * 3)[0],
        lines_file(folder, [(False, b"a \xc3\xa9\nb\n")] * 3, "rows.txt")[0],
        yaml_file(folder, [(False, b"- - a\n  - b")] * 3)[0],
        json_file(folder, [(False, chat)] * 3)[0],
        TEXTS_TABLE(folder, [(False, pair)] * 3)[0],
    ]


@pytest.mark.closes("F01", "F09")
@settings(fixed, max_examples=60)
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
            assert path.name in str(error) or "there is no row" in str(error)
            assert str(error).replace("\n", "").isprintable()


def test_characters_unknown_to_this_python_are_not_blank(tmp_path):
    """Emoji newer than Python's tables are unassigned in them; private-use characters have glyphs in some fonts."""
    visible = ["\U0001fa77", "\U0001fae8", "\ue000", "\U0010fffd", "\U0003fff0", "\u0301", "!"]
    path, _ = lines_file(tmp_path, [(False, dump({"prompt": sign, "completion": sign})) for sign in visible])
    assert len(prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train) == len(visible)
    invisible = "\0\t\x7f\x85\xad\u200b\u202e\ufeff\u2028\u2029 \xa0\u2003\u3000"
    assert all(map(is_blank, ["", invisible, *invisible])) and not is_blank(invisible + "\U0001fa77")


@pytest.mark.closes("F04")
def test_text_is_not_normalized(tmp_path):
    texts = ["é", "e\u0301", "a\r\nb", "nul \x00 inside", "\ufeffmark", "a\u2028b"]
    path, _ = lines_file(tmp_path, [(False, dump({"text": text})) for text in texts])
    rows = prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train
    assert [TOKENIZER.decode(row.ids) for row in rows] == [text + "<|im_end|>" for text in texts]
