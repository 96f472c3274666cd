"""Roles, contents and texts as people store them: each is read as the usual form is, and counted."""

import json
import math

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny import tiny_tokenizer

from lora_ft.config import Data
from lora_ft.data import formats
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import Ledger
from lora_ft.errors import DataError

QA = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def read(*rows, **settings):
    """Return the rows of values, as if these were the lines of a file, and the counts of what was converted."""
    ledger = Ledger()
    records = [(f"f.jsonl:{n}", values) for n, values in enumerate(rows, 1)]
    _, found, _ = formats.rows(records, Data(path="f.jsonl", **settings), ledger)
    ledger.raise_bad()
    return found, dict(ledger.converted)


def pair(user, assistant):
    return {"conversations": [{"from": user, "value": "2+2?"}, {"from": assistant, "value": "4"}]}


@pytest.mark.parametrize("user", ["User", "USER ", "Human", "prompter"])
@pytest.mark.parametrize(
    "assistant", ["bot", "chatgpt", "ChatGPT", "Assistant", " GPT", "ai", "AI", "chatbot", "Model"]
)
def test_other_names_of_roles_are_read_and_counted(user, assistant):
    (row,), counts = read(pair(user, assistant))
    assert row.messages == QA
    assert counts == {
        f"messages of {user.strip()} read as messages of user": 1,
        f"messages of {assistant.strip()} read as messages of assistant": 1,
    }


def test_usual_names_of_roles_are_not_counted():
    (row, *_), counts = read(pair("human", "gpt"), pair("user", "model"))
    assert (row.messages, counts) == (QA, {})


@pytest.mark.parametrize("role", ["robot", "assistant:", "", "userassistant", 7, None, ["user"]])
def test_an_unknown_role_is_refused_with_the_known_ones(role):
    with pytest.raises(DataError, match=r"role must be one of system, developer, user, .*bot, .*, got "):
        read(pair("user", role))


@pytest.mark.parametrize(
    ("content", "counts"),
    [
        (["2+2?"], {"contents given as lists of texts": 1}),
        (["2+", "2?"], {"contents given as lists of texts": 1}),
        (["2+", {"type": "text", "text": "2?"}], {"contents given as lists of texts": 1}),
        ([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}], {}),
        ([{"type": "input_text", "text": "2+2?"}], {}),
        ([{"type": "output_text", "text": "2+2?", "annotations": []}], {}),
        ([{"text": "2+2?"}], {}),
        ([{"type": None, "text": "2+2?", "image_url": None}], {}),
        ({"type": "text", "text": "2+2?"}, {"contents given as one text part": 1}),
    ],
)
def test_text_parts_are_joined_as_they_are(content, counts):
    (row,), found = read({"messages": [{"role": "user", "content": content}, QA[1]]})
    assert (row.messages, found) == (QA, counts)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "file", "refusal"])
def test_parts_that_are_not_text_are_refused_with_their_type(kind):
    parts = [{"type": "text", "text": "2+2?"}, {"type": kind, kind: {"url": "a.png"}}]
    with pytest.raises(
        DataError, match=rf"messages\[0\]: content has a part of type {kind}: only text can be trained on"
    ):
        read({"messages": [{"role": "user", "content": parts}, QA[1]]})


def test_nulls_beside_the_usual_keys_are_ignored():
    (row,), counts = read({"messages": [
        {"role": "user", "from": None, "content": "2+2?", "value": None, "tool_calls": None, "function_call": None},
        {"role": None, "from": "gpt", "content": None, "value": "4", "weight": None, "name": None},
    ]})  # fmt: skip
    assert (row.messages, counts) == (QA, {})


NUMBERS = "numbers, true or false read as text"


@pytest.mark.parametrize(
    ("value", "text"), [(4, "4"), (0, "0"), (-7, "-7"), (True, "true"), (False, "false"), (2.5, "2.5"), (1e-7, "1e-07")]
)
@pytest.mark.parametrize("row", [
    {"messages": [QA[0], {"role": "assistant", "content": None}]},
    {"prompt": "2+2?", "completion": None},
    {"instruction": "2+2?", "output": None},
    {"text": None},
])  # fmt: skip
def test_a_number_is_read_as_its_json_text(row, value, text):
    row = json.loads(json.dumps(row).replace("null", json.dumps(value)))
    (found,), counts = read(row)
    assert (found.answer, counts) == (text, {NUMBERS: 1})
    with pytest.raises(DataError, match=r"data\.strict=true refuses"):
        ledger = Ledger(strict=True)
        formats.rows([("f:1", row)], Data(path="f"), ledger)


def test_numbers_of_other_columns_are_read_as_text():
    row = {"instruction": 1, "input": 2, "output": "3", "system": 4, "history": [[5, 6]]}
    (found,), counts = read(row)
    assert [m["content"] for m in found.messages] == ["4", "5", "6", "1\n2", "3"]
    assert counts == {NUMBERS: 5}
    (found,), _ = read(row | {"history": json.dumps([[5, "6"]])})
    assert [m["content"] for m in found.messages] == ["4", "5", "6", "1\n2", "3"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match=r"completion: must be text or a finite number, got -?(nan|inf)"):
        read({"prompt": "2+2?", "completion": value})


@pytest.mark.parametrize("value", [1.0, -3.0, 1e22])
def test_a_whole_decimal_has_two_meanings_and_templates_decide(value):
    with pytest.raises(
        DataError, match=r"completion: .* may be a decimal, or an integer .*data\.prompt and data\.answer"
    ):
        read({"prompt": "2+2?", "completion": value})
    (row,), counts = read({"prompt": "2+2?", "completion": value}, prompt="{prompt}", answer="{completion}")
    assert (row.answer, counts) == (str(value), {})


def test_integers_that_pandas_stored_beside_an_empty_cell_are_not_taken_for_decimals(tmp_path):
    table = pa.table({"prompt": ["2+2?", "3+3?"], "completion": pa.array([4.0, None])})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError) as caught:
        prepare(Data(path=str(tmp_path / "rows.parquet")), tiny_tokenizer())
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "row 1: completion: 4.0 may be a decimal, or an integer" in lines[1]
    assert "row 2: completion: must be text, got null" in lines[2]
