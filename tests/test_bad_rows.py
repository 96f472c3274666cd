"""Generated bad rows, class by class: each is named with file, line, field, reason and excerpt, and no other is.

A class says what is planted and what is to be said of it. Every file holds good rows as well; what is blamed has to be
what was planted, all of it, and without the bad rows the file has to train.
"""

import csv
import io
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
from lora_ft.data import jsonl
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import LONGEST_EXCERPT, MOST_BAD_ROWS, is_blank
from lora_ft.errors import DataError

TOKENIZER = tiny_tokenizer()
PLANTED = MOST_BAD_ROWS - 1  # the last one that does not stop the reading
FILES_OF_A_CLASS = 1
LONG_LINE = 2**20

# As many examples whoever runs it, and the same ones; a failure is shown as it was found.
fixed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=FILES_OF_A_CLASS,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

TEXT = st.text(
    'abZ 019 "\\/<>&{}[]:,%\n\t\r\x00\x1b\x7f\x85é€\u202e\u2028\u200b\ufeff😀你', min_size=1, max_size=9
).filter(lambda text: not is_blank(text))
BLANK = st.text(" \n\t\r\u2003\u200b\ufeff\x00\u2028", max_size=4)
WORD = st.text("abcdefgh", min_size=1, max_size=5)
NUMBER = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
NO_TEXT = NUMBER | st.lists(TEXT, max_size=2) | st.dictionaries(WORD, TEXT, max_size=2)
CONTROL = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|pad|>"])


def dump(values: Any) -> bytes:
    return json.dumps(values).encode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def chats(*messages: st.SearchStrategy[Any], **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries({"messages": st.tuples(*messages).map(list), **columns}).map(dump)


def columns(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries(values).map(dump)


USER, SAID = TEXT.map(user), TEXT.map(said)

ARGUMENTS = r"messages\[1\]\.tool_calls\[0\]\.arguments"


def calls(arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return chats(
        USER, arguments.map(lambda a: said("a") | {"tool_calls": [{"function": {"name": "f", "arguments": a}}]})
    )


# Files: from pieces, some of them bad, to a path and the places of the bad ones.

Pieces = list[tuple[bool, Any]]


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


def txt_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    return lines_file(folder, [(bad, piece + b"\n") for bad, piece in pieces], "rows.txt")


def yaml_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    return lines_file(folder, pieces, "topic.yml", b"conversations:\n")


def json_file(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
    path = folder / "rows.json"
    path.write_bytes(b"[" + b",\n".join(piece for _, piece in pieces) + b"]")
    return path, [f"{path}:row {n}" for n, (bad, _) in enumerate(pieces, 1) if bad]


def parquet_file(schema: pa.Schema) -> Callable[[Path, Pieces], tuple[Path, list[str]]]:
    def write(folder: Path, pieces: Pieces) -> tuple[Path, list[str]]:
        path = folder / "rows.parquet"
        columns = []
        for column in schema:
            values = [piece[column.name] for _, piece in pieces]
            if column.type == pa.string():  # bytes that are no UTF-8 get in as damaged files have them
                encoded = [v.encode() if isinstance(v, str) else v for v in values]
                columns.append(
                    pa.Array.from_buffers(pa.string(), len(values), pa.array(encoded, pa.binary()).buffers())
                )
            else:
                columns.append(pa.array(values, column.type))
        parquet.write_table(pa.Table.from_arrays(columns, schema=schema), path)
        return path, [f"{path}:row {n}" for n, (bad, _) in enumerate(pieces, 1) if bad]

    return write


TABLE = {"prompt": "{a}", "answer": "{b}"}
GOOD_CHAT = chats(USER, SAID)
GOOD_PAIR = columns(prompt=TEXT, completion=TEXT)
GOOD_ALPACA = columns(instruction=TEXT, output=TEXT)
GOOD_TEXT = columns(text=st.just("good text"))
GOOD_SHARED = st.tuples(TEXT, TEXT).map(
    lambda t: dump({"conversations": [{"from": "human", "value": t[0]}, {"from": "gpt", "value": t[1]}]})
)
GOOD_CSV = st.tuples(WORD, WORD).map(lambda t: f"{t[0]},{t[1]}".encode())
GOOD_TXT = WORD.map(lambda word: f"{word}\n  and more".encode())
GOOD_YAML = st.tuples(WORD, WORD).map(lambda t: f'- - "{t[0]}"\n  - "{t[1]}"'.encode())
TEXTS_TABLE = parquet_file(pa.schema([("prompt", pa.string()), ("completion", pa.string())]))
NUMBERS_TABLE = parquet_file(pa.schema([("a", pa.string()), ("b", pa.float64())]))
TIMES_TABLE = parquet_file(pa.schema([("a", pa.string()), ("b", pa.timestamp("s"))]))
CHATS_TABLE = parquet_file(
    pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
)
GOOD_ROW = st.fixed_dictionaries({"prompt": WORD, "completion": WORD})
GOOD_NUMBERS = st.fixed_dictionaries({"a": WORD, "b": st.floats(allow_nan=False, allow_infinity=False)})
GOOD_TIMES = st.fixed_dictionaries({"a": WORD, "b": st.integers(0, 10**9)})
GOOD_STRUCTS = st.tuples(USER, SAID).map(lambda t: {"messages": list(t)})


@dataclass(frozen=True)
class Class:
    """bad: what is planted. fault: a pattern of `field: reason`. good: what stands beside it."""

    bad: st.SearchStrategy[Any]
    fault: str
    good: st.SearchStrategy[Any] = GOOD_CHAT
    write: Callable[[Path, Pieces], tuple[Path, list[str]]] = lines_file
    settings: dict[str, Any] = field(default_factory=dict)


def cut(line: bytes, at: int) -> bytes:
    return line[: 1 + at % (len(line) - 1)]


def inserted(line: bytes, at: int, piece: bytes) -> bytes:
    """The piece somewhere in the text of {"text": "good text"}."""
    at = 10 + at % 9
    return line[:at] + piece + line[at:]


def within(template: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(lambda values: (template % values).encode())


ROLE_LIST = r"system, developer, user, human, .*, observation"
ANY = st.integers(0, 999)
NOT_JSON = r"column \d+: not JSON: .+?"
CLASSES = {
    # What is no JSON, or not the JSON of a row.
    "cut": Class(st.builds(cut, GOOD_CHAT, ANY), NOT_JSON),
    "two objects in a line": Class(st.builds(lambda a, b: a + b" " + b, GOOD_CHAT, GOOD_CHAT), NOT_JSON),
    "Python's quotes": Class(within("{'text': '%s'}", WORD), NOT_JSON, GOOD_TEXT),
    "a comma too many": Class(within('{"text": "%s",}', WORD), NOT_JSON, GOOD_TEXT),
    "a comma too few": Class(within('{"text": "%s" "id": 1}', WORD), NOT_JSON, GOOD_TEXT),
    "a key without quotes": Class(within('{%s: "a"}', WORD), NOT_JSON, GOOD_TEXT),
    "a comment": Class(within("// %s", WORD), NOT_JSON, GOOD_TEXT),
    "Python's constants": Class(within('{"text": %s}', st.sampled_from(["None", "True", "nan"])), NOT_JSON, GOOD_TEXT),
    "a raw control character": Class(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\0", b"\t", b"\x1b", b"\x1f"])), NOT_JSON, GOOD_TEXT
    ),
    "UTF-16": Class(GOOD_TEXT.map(lambda line: line.decode().encode("utf-16-le")), NOT_JSON, GOOD_TEXT),
    "a byte order mark inside of the file": Class(
        WORD.map(lambda w: b' \xef\xbb\xbf{"text": "%s"}' % w.encode()), NOT_JSON, GOOD_TEXT
    ),
    "zeros": Class(st.integers(1, 99).map(bytes), NOT_JSON, GOOD_TEXT),
    "no UTF-8": Class(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\xff", b"\xe9", b"\xc3", b"\x80", b"\xf5\x80"])),
        r"line: not UTF-8 at byte \d+",
        GOOD_TEXT,
    ),
    "an encoded surrogate": Class(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\xed\xa0\x80", b"\xed\xbf\xbf"])),
        r"line: not UTF-8 at byte \d+",
        GOOD_TEXT,
    ),
    "an overlong encoding": Class(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\xc0\x80", b"\xe0\x80\x80"])),
        r"line: not UTF-8 at byte \d+",
        GOOD_TEXT,
    ),
    "half a surrogate pair": Class(
        st.builds(inserted, GOOD_TEXT, ANY, st.sampled_from([b"\\ud83d", b"\\uDC00", b"\\udfff\\ud800"])),
        "text: holds half a surrogate pair, which is no character",
        GOOD_TEXT,
    ),
    "half a surrogate pair in a key": Class(
        within('{"text": "a", "\\ud83d%s": 1}', WORD),
        r"\\ud83d[a-h]+: holds half a surrogate pair, .*character",
        GOOD_TEXT,
    ),
    "deep lists": Class(
        st.integers(65, 10**4).map(lambda n: b'{"text": ' + b"[" * n + b"]" * n + b"}"),
        "row: nested more than 64 deep",
        GOOD_TEXT,
    ),
    "deep objects": Class(
        st.integers(65, 10**4).map(lambda n: b'{"a":' * n + b"1" + b"}" * n), "row: nested more than 64 deep", GOOD_TEXT
    ),
    "deep and never closed": Class(st.integers(65, 10**4).map(lambda n: b"[{" * n), "row: nested more than 64 deep"),
    "a key twice": Class(
        within('{"text": "a", "text": "%s"}', WORD), "text: key occurs twice in one object", GOOD_TEXT
    ),
    "a role twice": Class(
        within('{"messages": [{"role": "user", "role": "%s", "content": "a"}]}', WORD),
        "role: key occurs twice in one object",
    ),
    "an ugly key twice": Class(
        TEXT.map(lambda t: b"{%b: 1, %b: 2}" % (dump(t * 99), dump(t * 99))),
        ".{1,120}: key occurs twice in one object",
    ),
    "no number": Class(
        within('{"text": %s}', st.sampled_from(["NaN", "Infinity", "-Infinity"])),
        "number: [-NaInfity]+ is not JSON",
        GOOD_TEXT,
    ),
    "a number beyond floats": Class(
        within('{"text": %s}', st.integers(309, 9999).map(lambda n: f"-1e{n}")),
        r"number: -1e\d+ is too large",
        GOOD_TEXT,
    ),
    "a number of too many digits": Class(
        within('{"text": %s}', st.integers(4301, 6000).map(lambda n: "7" * n)),
        r"number: of \d{4} digits is too large",
        GOOD_TEXT,
    ),
    "no object": Class(
        (NUMBER | TEXT | st.none() | st.lists(TEXT, max_size=3)).map(dump), "row: must be an object with columns"
    ),
    "an empty object": Class(st.sampled_from([b"{}", b" { }", b"{\t}"]), "row: must be an object with columns"),
    "a line too long": Class(st.integers(LONG_LINE, LONG_LINE + 99).map(lambda n: b"x" * n), "line: longer than 1 MiB"),
    # Chats.
    "messages missing": Class(columns(id=NUMBER), "messages: is missing"),
    "messages null": Class(columns(messages=st.none()), "messages: must be a list of messages, got null"),
    "messages of another type": Class(
        columns(messages=NUMBER | TEXT | st.dictionaries(WORD, TEXT)),
        r"messages: must be a list of messages, got (int|float|bool|text|object)",
    ),
    "messages empty": Class(columns(messages=st.just([])), "messages: is empty"),
    "a message of another type": Class(
        chats(USER, NUMBER | TEXT | st.none() | st.lists(TEXT, max_size=2)),
        r"messages\[1\]: must be an object, got \w+",
    ),
    "no role": Class(
        chats(USER, TEXT.map(lambda t: {"content": t})), rf"messages\[1\]: role None is none of {ROLE_LIST}"
    ),
    "an unknown role": Class(
        chats(st.tuples(WORD, TEXT).map(lambda t: {"role": "x" + t[0] * 99, "content": t[1]}), SAID),
        rf"messages\[0\]: role 'x.{{1,120}} is none of {ROLE_LIST}",
    ),
    "a role that is no text": Class(
        chats(st.tuples(NO_TEXT, TEXT).map(lambda t: {"role": t[0], "content": t[1]})),
        rf"messages\[0\]: role .{{1,120}} is none of {ROLE_LIST}",
    ),
    "no content": Class(
        chats(USER, st.just({"role": "assistant"})), r"messages\[1\]: the content of assistant is missing"
    ),
    "content null": Class(chats(st.just(user(None)), SAID), r"messages\[0\]: the content of user is missing"),
    "content of another type": Class(
        chats((NUMBER | st.dictionaries(WORD, TEXT)).map(user), SAID),
        r"messages\[0\]: content must be text, got (int|float|bool|object)",
    ),
    "parts that are no text": Class(
        chats(
            st.lists(st.sampled_from([{"type": "image_url"}, {"type": "text", "text": 1}, "a", None]), min_size=1).map(
                user
            ),
            SAID,
        ),
        r"messages\[0\]: content must be text, got list",
    ),
    "an empty answer": Class(chats(USER, BLANK.map(said)), r"messages\[1\]: the content of assistant is empty"),
    "an empty question": Class(chats(BLANK.map(user), SAID), r"messages\[0\]: the content of user is empty"),
    "an answer without parts": Class(
        chats(USER, st.just(said([]))), r"messages\[1\]: the content of assistant is empty"
    ),
    "an answer first": Class(chats(SAID, USER, SAID), "message 1: assistant may not come first"),
    "two questions": Class(chats(USER, USER, SAID), "message 2: user may not come after user"),
    "two answers": Class(chats(USER, SAID, SAID), "message 3: assistant may not come after assistant"),
    "a system message in the middle": Class(
        chats(USER, TEXT.map(lambda t: {"role": "system", "content": t}), SAID),
        "message 2: system may not come after user",
    ),
    "a tool that nobody called": Class(
        chats(USER, TEXT.map(lambda t: {"role": "tool", "content": t}), SAID), "message 2: tool may not come after user"
    ),
    "no answer at the end": Class(
        chats(USER, SAID, USER), "message 3: the chat must end with the assistant's answer, ends with user"
    ),
    "a weight between": Class(
        chats(
            USER,
            (st.floats(0.01, 0.99) | TEXT | st.integers(2, 10**99) | st.lists(TEXT)).map(
                lambda w: said("a") | {"weight": w}
            ),
        ),
        r"messages\[1\]: weight must be 0 or 1, got .{0,120}",
    ),
    "a flag that is no boolean": Class(
        chats(
            USER,
            st.builds(
                lambda k, v: said("a") | {k: v},
                st.sampled_from(["train", "loss"]),
                TEXT | st.integers() | st.floats(0, 9) | st.lists(TEXT),
            ),
        ),
        r"messages\[1\]: (train|loss) must be true or false, got .{0,120}",
    ),
    "nothing to learn": Class(
        chats(
            USER,
            st.builds(
                lambda t, f: said(t) | f, TEXT, st.sampled_from([{"weight": 0}, {"train": False}, {"loss": False}])
            ),
        ),
        "messages: no answer of the row is learned: weight, train or loss excludes each that data.train_on selects",
    ),
    "tools of another type": Class(
        chats(USER, SAID, tools=NUMBER | TEXT | st.dictionaries(WORD, TEXT)), r"tools: must be a list, got \w+"
    ),
    "a tool of another type": Class(
        chats(USER, SAID, tools=st.lists(NUMBER | TEXT | st.none(), min_size=1)),
        r"tools\[0\]: must be an object, got \w+",
    ),
    "calls of another type": Class(
        chats(USER, (TEXT | st.integers(1, 9)).map(lambda c: said("a") | {"tool_calls": c})),
        r"messages\[1\]: tool_calls must be a list, got (text|int)",
    ),
    "calls of nothing": Class(
        chats(USER, (NO_TEXT | BLANK).map(lambda n: said(None) | {"tool_calls": [{"function": {"name": n}}]})),
        r"messages\[1\]: tool_calls must be objects with the name of a function",
    ),
    "calls of the user": Class(
        chats(USER.map(lambda m: m | {"tool_calls": [{"name": "add"}]}), SAID),
        r"messages\[0\]: tool_calls belong to the assistant, not to user",
    ),
    "arguments that are no JSON": Class(
        calls(TEXT.map(lambda t: f"{{'{t}': 1}}")), rf"{ARGUMENTS}: is not JSON: .+ at character 2"
    ),
    "arguments that are no object": Class(
        calls(NUMBER | st.lists(TEXT) | NUMBER.map(json.dumps) | TEXT.map(json.dumps) | st.just('"{}"')),
        rf"{ARGUMENTS}: must be an object or the JSON text of one, got \w+",
    ),
    "arguments with a key twice": Class(
        calls(st.just('{"a": 1, "a": 2}')), f"{ARGUMENTS}: a: key occurs twice in one object"
    ),
    "a system column that is no text": Class(chats(USER, SAID, system=NO_TEXT), r"system: must be text, got \w+"),
    "control tokens in a question": Class(
        chats(st.builds(lambda a, c, b: user(a + c + b), TEXT, CONTROL, TEXT), SAID),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control tokens in an answer": Class(
        chats(USER, st.builds(lambda a, c: said(a * 99 + c), TEXT, CONTROL)),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control tokens in a call": Class(
        chats(USER, CONTROL.map(lambda c: said("a") | {"tool_calls": [{"name": "f", "arguments": {"x": c}}]})),
        r"content: holds the control token <\|\w+\|>",
    ),
    "control tokens in a tool": Class(
        chats(USER, SAID, tools=CONTROL.map(lambda c: [{"name": "f", "description": f"Say {c}"}])),
        r"tools: holds the control token <\|\w+\|>",
    ),
    "tools that the template does not write": Class(
        chats(USER, SAID, tools=WORD.map(lambda name: [{"type": "function", "function": {"name": f"{name}_7"}}])),
        "chat template: leaves out the tool [a-h]+_7",
    ),
    "calls that the template does not write": Class(
        chats(USER, WORD.map(lambda name: said("a") | {"tool_calls": [{"name": f"{name}_7"}]})),
        "chat template: leaves out the answer's call of [a-h]+_7",
    ),
    "thoughts that the template does not write": Class(
        chats(
            USER,
            st.tuples(WORD, st.sampled_from(["thinking", "reasoning_content"])).map(
                lambda t: said("a") | {t[1]: t[0] * 9}
            ),
        ),
        "chat template: changes the answer or leaves it out",
    ),
    # Other formats.
    "rows of another format": Class(GOOD_PAIR | GOOD_ALPACA, "messages: is missing"),
    "chats among pairs": Class(GOOD_CHAT, "prompt: is missing", GOOD_PAIR),
    "completion missing": Class(columns(prompt=TEXT), "completion: is missing", GOOD_PAIR),
    "completion null": Class(
        columns(prompt=TEXT, completion=st.none()), "completion: must be text, got null", GOOD_PAIR
    ),
    "completion of another type": Class(
        columns(prompt=TEXT, completion=NO_TEXT), r"completion: must be text, got \w+", GOOD_PAIR
    ),
    "completion empty": Class(columns(prompt=TEXT, completion=BLANK), "completion: is empty", GOOD_PAIR),
    "prompt empty": Class(columns(prompt=BLANK, completion=TEXT), "prompt: is empty", GOOD_PAIR),
    "a prompt in messages alone": Class(
        columns(prompt=st.tuples(USER).map(list), completion=TEXT),
        "completion: must be a list of messages, got text",
        GOOD_PAIR,
    ),
    "output missing": Class(columns(instruction=TEXT), "output: is missing", GOOD_ALPACA),
    "input of another type": Class(
        columns(instruction=TEXT, output=TEXT, input=NO_TEXT), r"input: must be text, got \w+", GOOD_ALPACA
    ),
    "history of another form": Class(
        columns(
            instruction=TEXT,
            output=TEXT,
            history=st.integers(1, 9) | st.lists(st.lists(TEXT, max_size=1), min_size=1) | st.just([["a", ""]]),
        ),
        r"history: must be a list of \[instruction, answer\]",
        GOOD_ALPACA,
    ),
    "text of another type": Class(columns(text=NO_TEXT | st.none()), r"text: must be text, got \w+", GOOD_TEXT),
    "text that is blank": Class(columns(text=BLANK), "text: is empty", GOOD_TEXT),
    "text renamed and missing": Class(
        columns(other=TEXT, body=st.none()),
        "body: must be text, got null",
        columns(body=TEXT),
        settings={"columns": {"text": "body"}},
    ),
    "an unknown speaker": Class(
        TEXT.map(lambda t: dump({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": t}]})),
        rf"conversations\[1\]: role 'bing' is none of {ROLE_LIST}",
        GOOD_SHARED,
    ),
    "nothing said": Class(
        TEXT.map(lambda t: dump({"conversations": [{"from": "human", "value": t}, {"from": "gpt"}]})),
        r"conversations\[1\]: the content of gpt is missing",
        GOOD_SHARED,
    ),
    # Tables.
    "a field too few": Class(WORD.map(str.encode), "row: 1 fields where the header has 2", GOOD_CSV, csv_file),
    "a field too many": Class(within("%s,a,b", WORD), "row: 3 fields where the header has 2", GOOD_CSV, csv_file),
    "text behind a quote": Class(within('"%s"b,c', WORD), "row: ',' expected after '\"'", GOOD_CSV, csv_file),
    "an empty cell": Class(
        within("%s,%s", WORD, st.sampled_from(["", " ", '"\n"'])), "completion: is empty", GOOD_CSV, csv_file
    ),
    "a cell of NUL": Class(within("%s,b\0c", WORD), "completion: holds NUL", GOOD_CSV, csv_file),
    "a cell that is no UTF-8": Class(
        WORD.map(lambda w: b"caf\xe9," + w.encode()), "prompt: is not UTF-8", GOOD_CSV, csv_file
    ),
    "a cell of control tokens": Class(
        within("%s,a%s", WORD, CONTROL), r"content: holds the control token <\|\w+\|>", GOOD_CSV, csv_file
    ),
    "a null in Parquet": Class(
        st.just({"prompt": "a", "completion": None}), "completion: must be text, got null", GOOD_ROW, TEXTS_TABLE
    ),
    "no UTF-8 in Parquet": Class(
        st.just({"prompt": b"a\xff", "completion": "b"}), "prompt: not UTF-8 at byte 2", GOOD_ROW, TEXTS_TABLE
    ),
    "a blank in Parquet": Class(
        BLANK.map(lambda b: {"prompt": b, "completion": "b"}), "prompt: is empty", GOOD_ROW, TEXTS_TABLE
    ),
    "no number in Parquet": Class(
        st.sampled_from([float("nan"), float("inf")]).map(lambda n: {"a": "a", "b": n}),
        "b: is (nan|inf), which is no value",
        GOOD_NUMBERS,
        NUMBERS_TABLE,
        TABLE,
    ),
    "a year beyond Python's": Class(
        st.integers(10**12, 10**15).map(lambda n: {"a": "a", "b": n}),
        "b: cannot be read: .+?",
        GOOD_TIMES,
        TIMES_TABLE,
        TABLE,
    ),
    "messages of Parquet null": Class(
        st.just({"messages": None}), "messages: must be a list of messages, got null", GOOD_STRUCTS, CHATS_TABLE
    ),
    "messages of Parquet without content": Class(
        USER.map(lambda m: {"messages": [m, said(None)]}),
        r"messages\[1\]: the content of assistant is missing",
        GOOD_STRUCTS,
        CHATS_TABLE,
    ),
    # Files that are read whole.
    "no object in a list": Class(
        (NUMBER | TEXT | st.none()).map(dump), "row: must be an object with columns", GOOD_TEXT, json_file
    ),
    "a key twice in a list": Class(
        within('{"text": "a", "text": "%s"}', WORD), "text: key occurs twice in one object", GOOD_TEXT, json_file
    ),
    "no number in a list": Class(
        within('{"text": "%s", "a": [NaN]}', WORD), "number: NaN is not JSON", GOOD_TEXT, json_file
    ),
    "half a surrogate pair in a list": Class(
        within('{"text": "\\ud800%s"}', WORD), "text: holds half a surrogate pair, .+?", GOOD_TEXT, json_file
    ),
    "a paragraph of NUL": Class(within("%s\0", WORD), "text: holds NUL", GOOD_TXT, txt_file),
    "a paragraph that is no UTF-8": Class(
        WORD.map(lambda w: w.encode() + b"\xff"), "text: is not UTF-8", GOOD_TXT, txt_file
    ),
    "no lines in YAML": Class(
        within("- - %s: 1\n  - b", WORD), "conversations: must be lists of lines", GOOD_YAML, yaml_file
    ),
    "an empty line in YAML": Class(
        within("- - %s\n  - ' '", WORD), r"messages\[1\]: the content of assistant is empty", GOOD_YAML, yaml_file
    ),
}


def blamed(path: Path, **settings: Any) -> list[str]:
    """The lines of the error that a file of rows ends in."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setattr(jsonl, "MOST_LINE_BYTES", LONG_LINE)
        prepare(Data(path=str(path), eval_fraction=0, **settings), TOKENIZER)
    assert caught.value.exit_code == 4
    head, *lines = str(caught.value).split("\n")
    assert head == (f"{len(lines)} bad rows:" if len(lines) > 1 else "1 bad row:")
    return lines


def check_blame(lines: list[str], places: list[str], faults: list[str]) -> None:
    """Each line is `place: field: reason: excerpt` for what was planted, in the order of the file."""
    assert [line[2:].split(": ")[0] for line in lines] == places
    for line, place, fault in zip(lines, places, faults, strict=True):
        match = re.match(rf"  {re.escape(place)}: (?:{fault}): (?=.)", line)
        assert match, line
        assert len(line) - match.end() <= LONGEST_EXCERPT
        assert len(line) <= len(place) + 3 * LONGEST_EXCERPT + 100
        assert line.isprintable()


def test_there_are_a_thousand_bad_rows_of_a_hundred_classes_or_more():
    assert len(CLASSES) >= 100
    assert len(CLASSES) * PLANTED >= 1000, "a class that is one line only still plants it so often"


@pytest.mark.closes("F01", "F02", "F03", "F04", "F09", "A26")
@pytest.mark.parametrize("name", CLASSES)
@fixed
@given(data=st.data())
def test_bad_rows_are_each_named_with_place_field_reason_and_excerpt_and_good_ones_are_not(
    name, data, tmp_path_factory
):
    given = CLASSES[name]
    bad = data.draw(st.lists(given.bad, min_size=PLANTED, max_size=PLANTED))
    good = data.draw(st.lists(given.good, min_size=PLANTED + 1, max_size=PLANTED + 9))
    # More good rows than bad ones: a format is what most rows have.
    pieces = data.draw(st.permutations([(True, piece) for piece in bad] + [(False, piece) for piece in good]))
    path, places = given.write(tmp_path_factory.mktemp("class"), pieces)
    check_blame(blamed(path, **given.settings), places, [given.fault] * PLANTED)


# Classes whose good neighbours are chats in lines of JSON, so that they can share a file.
SHARED = sorted(name for name, c in CLASSES.items() if c.good is GOOD_CHAT and name != "a line too long")


@pytest.mark.closes("F01", "F03")
@settings(fixed, max_examples=30)
@given(data=st.data())
def test_whatever_is_wrong_one_error_lists_all_of_it_and_the_other_rows_are_trained(data, tmp_path_factory):
    good = data.draw(st.lists(GOOD_CHAT, min_size=PLANTED + 1, max_size=PLANTED + 9))
    names = data.draw(st.lists(st.sampled_from(SHARED), min_size=1, max_size=PLANTED))
    planted = [(name, data.draw(CLASSES[name].bad)) for name in names]
    order = data.draw(st.permutations([*planted, *(("", line) for line in good)]))
    folder = tmp_path_factory.mktemp("mixed")
    path, places = lines_file(folder, [(bool(name), line) for name, line in order])
    check_blame(blamed(path), places, [CLASSES[name].fault for name, _ in order if name])

    path, _ = lines_file(folder, [(False, b"" if name else line) for name, line in order])
    dataset = prepare(Data(path=str(path), eval_fraction=0.3), TOKENIZER)
    trained = {row.source for row in dataset.train + dataset.eval}
    assert trained == {f"{path}:{n}" for n, (name, _) in enumerate(order, 1) if not name}
    assert dataset.report.rows == len(good) == dataset.report.train_documents + dataset.report.eval_documents


@pytest.mark.closes("F05")
@settings(fixed, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=20), st.integers(30, 90), st.booleans())
def test_rows_in_are_rows_trained_and_rows_counted_as_left_out(tmp_path_factory, words, max_length, deduplicate):
    rows = [{"prompt": "again " * count, "completion": "yes"} for count in (1, *words)]
    path, _ = lines_file(tmp_path_factory.mktemp("counted"), [(False, dump(row)) for row in rows])
    data = Data(path=str(path), eval_fraction=0, max_length=max_length, too_long=TooLong.drop, deduplicate=deduplicate)
    report = prepare(data, TOKENIZER).report
    assert report.train_documents + report.eval_documents + sum(report.left_out.values()) == len(rows)


@pytest.mark.closes("F01")
def test_beyond_twenty_bad_rows_reading_stops_and_says_so(tmp_path):
    path, places = lines_file(tmp_path, [(True, b'{"text": 1}')] * 30 + [(False, b'{"text": "a"}')] * 31)
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(path)), TOKENIZER)
    head, *lines = str(caught.value).split("\n")
    assert head == "20 bad rows (stopped there):"
    check_blame(lines, places[:20], ["text: must be text, got int"] * 20)


def test_a_quote_that_is_never_closed_is_named_with_the_line_that_opens_it(tmp_path):
    path, places = csv_file(tmp_path, [(False, b"a,b"), (True, b"c"), (True, b'"open,d'), (False, b"e,f")])
    faults = ["row: 1 fields where the header has 2", "row: unexpected end of data"]
    check_blame(blamed(path), places, faults)


@pytest.mark.closes("F02")
@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1]), "int"),
        (pa.array([1.5]), "float"),
        (pa.array([True]), "bool"),
        (pa.array([b"a"]), "bytes"),
        (pa.array([["a"]]), "list"),
        (pa.array([{"a": "b"}]), "object"),
        (pa.array([0], pa.date32()), "date"),
        (pa.array([0], pa.timestamp("ms")), "datetime"),
        (pa.array([1]).cast(pa.decimal128(20)), "Decimal"),
        (pa.nulls(1), "null"),
        (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "list"),
    ],
)
def test_a_column_of_another_type_in_parquet_is_named_and_not_made_text(tmp_path, column, kind):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    check_blame(blamed(path), [f"{path}:row 1"], [f"text: must be text, got {kind}"])


def whole_files(folder: Path) -> list[Path]:
    """A good file of each kind."""
    chat = dump({"messages": [user("a é"), said("b")], "tools": None})
    pair = {"prompt": "a é", "completion": "b"}
    return [
        lines_file(folder, [(False, chat)] * 3)[0],
        csv_file(folder, [(False, b'"a, \xc3\xa9",b')] * 3)[0],
        txt_file(folder, [(False, b"a \xc3\xa9\nb")] * 3)[0],
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
def test_a_file_damaged_anywhere_is_read_or_is_a_located_error(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("damaged")
    for path in whole_files(folder):
        data = path.read_bytes()
        for part, taken, added in edits:
            at = int(part * len(data))
            data = data[:at] + added + data[at + taken :]
        path.write_bytes(data)
        try:
            prepare(Data(path=str(path), eval_fraction=0), TOKENIZER)
        except DataError as error:
            assert path.name in str(error) or "there is no row" in str(error)
            assert str(error).replace("\n", "").isprintable()


def test_an_answer_of_signs_that_this_python_does_not_know_is_an_answer(tmp_path):
    """Emoji newer than Python's tables are unassigned to it; fonts give private-use characters a shape."""
    seen = ["\U0001fa77", "\U0001fae8", "\ue000", "\U0010fffd", "\U0003fff0", "\u0301", "!"]
    path, _ = lines_file(tmp_path, [(False, dump({"prompt": sign, "completion": sign})) for sign in seen])
    assert len(prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train) == len(seen)
    unseen = "\0\t\x7f\x85\xad\u200b\u202e\ufeff\u2028\u2029 \xa0\u2003\u3000"
    assert all(map(is_blank, ["", unseen, *unseen])) and not is_blank(unseen + "\U0001fa77")


@pytest.mark.closes("F04")
def test_text_is_trained_as_it_was_written_composed_or_not(tmp_path):
    texts = ["é", "e\u0301", "a\r\nb", "nul \x00 inside", "\ufeffmark", "a\u2028b"]
    path, _ = lines_file(tmp_path, [(False, dump({"text": text})) for text in texts])
    rows = prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train
    assert [TOKENIZER.decode(row.ids) for row in rows] == [text + "<|im_end|>" for text in texts]


def test_a_csv_row_ends_where_its_fields_do(tmp_path):
    """Rows in are rows out, whatever a cell holds."""
    out = io.StringIO()
    cells = ["plain", "two\nlines", 'a "quote"', "comma, and", "last"]
    csv.writer(out, lineterminator="\n").writerows([["prompt", "completion"], *([c, c] for c in cells)])
    path = tmp_path / "rows.csv"
    path.write_text(out.getvalue())
    rows = prepare(Data(path=str(path), eval_fraction=0), TOKENIZER).train
    assert [row.source.rpartition(":")[2] for row in rows] == ["2", "3", "6", "7", "8"]
