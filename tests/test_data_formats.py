"""Formats: detection by columns, the rows that each gives, and errors."""

import pytest

from lora_ft.config import Data, Format
from lora_ft.data import formats, parsing
from lora_ft.data.read import read as read_rows
from lora_ft.data.rows import Ledger
from lora_ft.errors import ConfigError, DataError


def parse(*rows, **settings):
    """Return the format and the rows of values, as if these were the lines of a file."""
    return read(*rows, **settings)[:2]


def unused(*rows, **settings):
    return read(*rows, **settings)[2]


def read(*rows, **settings):
    records = [(f"f.jsonl:{n}", values) for n, values in enumerate(rows, 1)]
    ledger = Ledger()
    data = Data(path="f.jsonl", **settings)
    layout = formats.Layout.of(records, data)
    found, parse, _ = layout.parser(data)
    made = list(formats.rows(records, parse, data, ledger))
    ledger.raise_bad()
    return found, made, layout.unused(layout.names, data)


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


QA = chat("2+2?", "4")
SHARE_GPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"messages": QA, "text": "x"}, Format.messages),
        ({"conversations": SHARE_GPT, "prompt": "p", "completion": "c"}, Format.conversations),
        ({"prompt": "2+2?", "completion": "4", "text": "x"}, Format.prompt_completion),
        ({"prompt": QA[:1], "completion": QA[1:]}, Format.prompt_completion),
        ({"instruction": "2+2?", "output": "4", "text": "x"}, Format.alpaca),
        ({"instruction": "2+2?", "input": "", "output": "4"}, Format.alpaca),
    ],
)
def test_a_format_is_detected_by_its_columns_and_all_give_the_same_chat(values, found):
    detected, (row,) = parse(values)
    assert detected is found
    assert row.messages == QA
    assert (row.answer, row.source) == ("4", "f.jsonl:1")


def test_text_is_a_format_without_messages():
    found, (row,) = parse({"text": "all of it", "id": 7})
    assert (found, row.messages, row.plain_prompt, row.answer) == (Format.text, [], "", "all of it")


def test_data_format_takes_precedence_over_detection():
    found, (row,) = parse({"messages": QA, "text": "x"}, format=Format.text)
    assert (found, row.answer) == (Format.text, "x")


def test_columns_renames_the_columns_of_a_file():
    _, (row,) = parse({"q": "2+2?", "a": "4"}, columns={"prompt": "q", "completion": "a"})
    assert row.messages == QA


def test_share_gpt_roles_become_the_roles_of_templates():
    turns = [("system", "s"), ("human", "u"), ("gpt", "a"), ("observation", "t"), ("model", "b"), ("user", "v"),
             ("assistant", "c"), ("function", "f"), ("gpt", "d")]  # fmt: skip
    _, (row,) = parse({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [m["role"] for m in row.messages] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert "".join(m["content"] for m in row.messages) == "suatbvcfd"


def test_a_system_column_does_not_replace_a_system_message():
    _, (row, own) = parse(
        {"conversations": SHARE_GPT, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Mine."}, *SHARE_GPT], "system": "Be brief."},
    )
    assert [m["content"] for m in row.messages] == ["Be brief.", "2+2?", "4"]
    assert [m["content"] for m in own.messages] == ["Mine.", "2+2?", "4"]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": QA},
        {"conversations": SHARE_GPT},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": QA[:1], "completion": QA[1:]},
        {"instruction": "2+2?", "output": "4"},
    ],
)
def test_a_system_column_becomes_the_first_message_in_every_format(values):
    system = {"role": "system", "content": "Be brief."}
    _, (row,), left = read({"system": "Be brief.", **values})
    assert row.messages == [system, *QA]
    assert left == []
    assert row.plain_prompt is None or row.plain_prompt.startswith("Be brief.\n\n")
    assert parse({"system": None, **values})[1][0].messages == QA


def test_a_system_column_shifts_the_indices_of_context_answers():
    prompt = chat("a", "b", "c")
    _, (row,) = parse({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}], "system": "s"})
    assert [row.messages[i]["content"] for i in row.context] == ["b"]


def test_unused_columns_are_listed():
    assert unused({"instruction": "a", "inputs": "lost", "output": "b"}) == ["inputs"]
    assert unused({"text": "a", "label": "b"}, {"text": "a", "label": "b", "": 0}) == ["label", "(unnamed)"]
    assert unused({"q": "a", "a": "b", "id": 1}, columns={"prompt": "q", "completion": "a"}) == ["id"]
    assert unused({"a": "x", "b": "y", "c": "z"}, prompt="{a}", answer="{b}") == ["c"]
    assert unused({"en": "x", "de": "y"}, columns={"source": "en"}, prompt="{source}", answer="{de}") == []


def test_openai_weights_parts_tools_and_tool_calls_are_read():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "4", "weight": 1},
    ]
    _, (row,) = parse({"messages": messages, "tools": [{"type": "function"}]})
    added = {"name": "add", "arguments": {"a": 2}}
    assert row.messages[:3] == [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": added}]},
    ]
    assert row.messages[3]["tool_call_id"] == "1"
    assert row.context == {2}
    assert row.tools == [{"type": "function"}]
    assert messages[2]["weight"] == 0 and call["function"]["arguments"] == '{"a": 2}', (
        "the caller's rows are not modified"
    )


def test_answers_in_a_conversational_prompt_are_context():
    _, (row,) = parse({"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]})
    assert row.context == {1}
    assert row.answer == "d"


def test_alpaca_rows_have_input_system_and_history_in_both_forms():
    values = {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Be brief.", "history": [["Hi", "Ho"]]}
    _, (row,) = parse(values)
    assert [m["content"] for m in row.messages] == ["Be brief.", "Hi", "Ho", "Add.\n2+2", "4"]
    assert row.plain_prompt == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHo\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n"
    )


@pytest.mark.closes("F02")
def test_the_format_is_that_of_most_rows():
    pair, chat_row = {"prompt": "a", "completion": "b"}, {"messages": QA}
    with pytest.raises(DataError, match=r"1 bad row:\n  f\.jsonl:1: prompt: is missing: .*2\+2"):
        parse(chat_row, pair, pair)
    with pytest.raises(DataError, match=r"1 bad row:\n  f\.jsonl:3: messages: is missing: .*completion"):
        parse(chat_row, chat_row, pair)
    assert parse(chat_row | pair, pair, pair)[0] is Format.prompt_completion, "the first row fits both formats"


def test_a_format_is_detected_if_every_row_lacks_a_column_of_it():
    with pytest.raises(DataError, match=r"2 bad rows:\n.*:1: completion: is missing.*\n.*:2: prompt: is missing"):
        parse({"prompt": "a"}, {"completion": "b"})


@pytest.mark.parametrize(
    ("whole", "settings", "message"),
    [
        ({"q": "a", "a": "b"}, {"columns": {"prompt": "q", "completion": "a"}}, "q: is missing"),
        ({"q": QA, "a": 0}, {"columns": {"messages": "q"}}, "q: is missing"),
        ({"q": "a", "a": "b"}, {"prompt": "{q}", "answer": "{a}"}, "q: is missing or null"),
        ({"q": "a", "a": "b"}, {"columns": {"s": "q"}, "prompt": "{s}", "answer": "{a}"}, "q: is missing or null"),
    ],
)
def test_a_missing_column_is_reported_by_its_name_in_the_file(whole, settings, message):
    first = {name: value for name, value in whole.items() if name != "q"}
    with pytest.raises(DataError, match=rf"1 bad row:\n  f\.jsonl:1: {message}"):
        parse(first, whole, **settings)


def test_an_optional_column_may_be_missing_from_the_first_row():
    _, rows = parse({"q": "a", "a": "b"}, {"q": "c", "a": "d", "s": "Be brief."},
                    columns={"prompt": "q", "completion": "a", "system": "s"})  # fmt: skip
    assert [len(row.messages) for row in rows] == [2, 3]


def test_a_renamed_column_does_not_fall_back_on_a_column_of_its_new_name():
    rows = [{"question": "a", "prompt": "not this", "completion": "b"}, {"prompt": "nor this", "completion": "b"}]
    with pytest.raises(DataError, match=r"f\.jsonl:2: question: is missing"):
        parse(*rows, columns={"prompt": "question"})


def test_two_columns_can_be_swapped():
    _, (row,) = parse({"completion": "2+2?", "prompt": "4"}, columns={"prompt": "completion", "completion": "prompt"})
    assert row.messages == QA


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and rejected are preference pairs"),
        ({"question": "a", "answer": "b"}, "no format has the columns answer, question: .*data.columns"),
    ],
)
def test_columns_of_no_format_are_reported_with_what_to_do(values, message):
    with pytest.raises(DataError, match=message):
        parse(values)


def test_no_rows_at_all_is_a_data_error(tmp_path):
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"f\.jsonl: there are no rows"):
        read_rows(Data(path=str(tmp_path / "f.jsonl")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"prompt": "q"}}, r"data\.columns names q, which is not a column of f\.jsonl: a, b"),
        ({"columns": {"promt": "a"}, "format": Format.text}, "promt is no column of format text, which has text"),
        (
            {"format": Format.text, "prompt": "{a}"},
            r"data\.prompt and data\.answer are templates of data\.format=table",
        ),
        (
            {"format": Format.table},
            r"data\.format=table needs data\.prompt and data\.answer; data\.prompt is not set",
        ),
        ({"prompt": "{a}"}, r"data\.answer is not set"),
        ({"prompt": "{x}", "answer": "{b}"}, r"data\.prompt: there is no column 'x'; there are a, b"),
        ({"prompt": "{a.real}", "answer": "{b}"}, "there is no column 'a.real'"),
        ({"prompt": "{a[0]}", "answer": "{b}"}, r"there is no column 'a\[0\]'"),
        ({"prompt": "{a!r}", "answer": "{b}"}, "there is no column 'a!r'"),
        ({"prompt": "{}", "answer": "{b}"}, "there is no column ''"),
        (
            {"prompt": "{a", "answer": "{b}"},
            r"data\.prompt: expected '}' before end of string: \{a \(write \{\{ and \}\}",
        ),
        ({"prompt": "{a}}", "answer": "{b}"}, r"Single '}' encountered"),
        ({"prompt": "Same", "answer": "{b}"}, r"data\.prompt names no column"),
    ],
)
def test_settings_that_do_not_fit_the_columns_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse({"a": 1, "b": "x"}, **settings)


def test_table_templates_use_any_column():
    settings = {"prompt": "{{x}} {the word} {n} {yes: no!}", "answer": "{n}{n}"}
    found, (row,) = parse({"the word": "{n}", "n": 3, "yes: no!": True}, **settings)
    assert found is Format.table
    assert [m["content"] for m in row.messages] == ["{x} {n} 3 true", "33"]
    assert row.plain_prompt == "{x} {n} 3 true\n\n### Response:\n"


def test_table_templates_may_use_both_names_of_a_renamed_column():
    _, (row,) = parse({"en": "good", "de": "gut"}, columns={"source": "en"}, prompt="{source}={en}", answer="{de}")
    assert row.messages[0]["content"] == "good=good"


def test_plain_prompts_of_tables_end_as_those_of_alpaca():
    _, (table,) = parse({"a": "x", "b": "y"}, prompt="### Instruction:\n{a}", answer="{b}")
    _, (alpaca,) = parse({"instruction": "x", "output": "y"})
    assert table.plain_prompt == alpaca.plain_prompt
    assert table.messages[0]["content"] == "### Instruction:\nx", "with a chat template the heading is not added"


@pytest.mark.closes("F03")
@pytest.mark.parametrize("bad", [None, " ", ["x"], {"x": 1}, float("nan")])
def test_a_table_row_without_a_value_is_refused(bad):
    with pytest.raises(DataError, match=r"f\.jsonl:2: a: "):
        parse({"a": "x", "b": "y"}, {"a": bad, "b": "y"}, prompt="{a}", answer="{b}")


def test_no_row_is_read_beyond_max_rows(monkeypatch):
    def records():
        yield "f:1", {"text": "a"}
        yield "f:2", {"text": "b"}
        raise AssertionError("read past max_rows")

    monkeypatch.setattr(parsing, "records", lambda *_: records())
    assert len(read_rows(Data(path="f", max_rows=2, eval_fraction=0)).rows) == 2
