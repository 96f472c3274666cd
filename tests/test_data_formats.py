"""Formats: detection by columns, the rows that each gives, and errors."""

import re

import pytest

from lora_ft.config import Data, Format
from lora_ft.data import formats
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
    found = formats.rows(records, Data(path="f.jsonl", **settings), ledger)
    ledger.raise_bad()
    return found


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
        ({"q": "a", "a": "b"}, "no format has the columns a, q: .*data.columns"),
    ],
)
def test_columns_of_no_format_are_reported_with_what_to_do(values, message):
    with pytest.raises(DataError, match=message):
        parse(values)


PAIRS = [
    ("question", "answer"), ("question", "response"), ("query", "answer"), ("query", "response"),
    ("prompt", "answer"), ("prompt", "response"), ("prompt", "output"), ("input", "output"), ("inputs", "targets"),
    ("problem", "answer"), ("problem", "solution"), ("user", "assistant"), ("human", "assistant"),
]  # fmt: skip


def converted(*rows, **settings):
    """Return the format, the first row, the unused columns and what the report says."""
    ledger = Ledger(settings.pop("strict", False))
    records = [(f"f.jsonl:{n}", values) for n, values in enumerate(rows, 1)]
    found, made, left = formats.rows(records, Data(path="f.jsonl", **settings), ledger)
    ledger.raise_bad()
    return found, made[0], left, dict(ledger.converted)


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_other_names_of_prompt_and_completion_give_the_same_row(prompt, answer):
    own = parse({"prompt": "2+2?", "completion": "4", "system": "Be brief."})[1][0]
    values = {"id": 7, prompt: "2+2?", answer: "4"}
    renamed = (answer, "completion") if prompt == "prompt" else (f"{prompt}, {answer}", "prompt, completion")
    shown = {f"rows with {renamed[0]} read as {renamed[1]}": 1}
    for settings in ({}, {"format": Format.prompt_completion}, {"strict": True}):
        found, row, left, said = converted({**values, "system": "Be brief."}, **settings)
        assert (found, row, left) == (Format.prompt_completion, own, ["id"])
        assert said == shown
    found, row, left, _ = converted({**values, "system_prompt": "Be brief."})
    assert (found, row, left) == (Format.prompt_completion, own, ["id"])


@pytest.mark.parametrize("output", ["response", "answer", "completion"])
def test_instruction_with_another_name_of_output_is_alpaca(output):
    own = {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Ho"]], "system": "s"}
    other = {name if name != "output" else output: value for name, value in own.items()}
    expected = parse(own)[1][0]
    for settings in ({}, {"format": Format.alpaca}):
        assert converted(other, **settings) == (
            Format.alpaca, expected, [], {f"rows with {output} read as output": 1}
        )  # fmt: skip
    context = {name if name != "input" else "context": value for name, value in other.items()}
    assert converted(context)[:3] == (Format.alpaca, expected, [])
    with pytest.raises(DataError, match=rf"are instruction and {output} the whole row, or does context belong"):
        parse({**other, "context": "beside an input"})


@pytest.mark.parametrize("messages", [QA, SHARE_GPT])
@pytest.mark.parametrize("column", ["conversation", "messages", "conversations"])
@pytest.mark.parametrize("chosen", [Format.auto, Format.messages, Format.conversations])
def test_each_name_of_a_chat_holds_each_form_of_messages(messages, column, chosen):
    found, row, left, _ = converted({column: messages, "system": "s", "score": 1}, format=chosen)
    assert row.messages == [{"role": "system", "content": "s"}, *QA] and left == ["score"]
    own = Format.messages if column == "messages" else Format.conversations
    assert found is (own if chosen is Format.auto else chosen)


def test_own_names_of_a_format_come_first():
    for values, found, left in [
        (
            {"prompt": "2+2?", "completion": "4", "answer": "x", "response": "x"},
            "prompt_completion",
            ["answer", "response"],
        ),
        ({"instruction": "2+2?", "input": None, "output": "4", "response": "x"}, "alpaca", ["response"]),
        ({"messages": QA, "question": "x", "answer": "x"}, "messages", ["question", "answer"]),
        ({"text": "4", "question": "x", "answer": "x"}, "text", ["question", "answer"]),
    ]:
        assert converted(values)[0].name == found and converted(values)[2:] == (left, {})


@pytest.mark.parametrize("names", [
    ("question", "answer", "response"), ("prompt", "question", "answer"),
    ("prompt", "completion", "question", "answer"),
    ("instruction", "output", "problem", "solution"), ("conversation", "question", "answer"),
    ("input", "output", "query", "response"), ("instruction", "question", "answer"),
])  # fmt: skip
def test_columns_that_fit_two_formats_are_refused_in_one_message(names):
    with pytest.raises(DataError, match=r"f\.jsonl: its columns have several meanings .*data\.columns\.\w+=") as caught:
        parse(*[dict.fromkeys(names, "x")] * 30)
    assert "\n" not in str(caught.value)
    advice = re.findall(r"data\.columns\.(\w+)=(\w+)", str(caught.value))
    row = {name: QA if name == "conversation" else "x" for name in names}
    assert parse(row, columns=dict(advice))[1][0].answer == "x", "the remedy works"


@pytest.mark.parametrize("own", ["prompt_completion", "alpaca"])
def test_data_format_decides_between_own_names_and_others(own):
    row = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o", "query": "q", "response": "r"}
    assert converted(row, format=Format[own])[1].answer == {"prompt_completion": "c", "alpaca": "o"}[own]


@pytest.mark.parametrize("part", ["context", "passage", "choices", "options"])
def test_a_column_that_may_belong_to_the_prompt_is_not_left_out_silently(part):
    row = {part: "x", "question": "2+2?", "answer": "4"}
    with pytest.raises(
        DataError, match=rf"are question and answer the whole row, or does {part} belong to the prompt\?"
    ):
        parse(row)
    assert unused(row, columns={"prompt": "question", "completion": "answer"}) == [part]
    asked = parse(row, prompt=f"{{question}} {{{part}}}", answer="{answer}")[1][0]
    assert asked.messages[0]["content"] == "2+2? x"


def test_errors_name_the_column_of_the_file():
    with pytest.raises(DataError, match=r"1 bad row:\n  f\.jsonl:2: answer: is empty"):
        parse({"question": "a", "answer": "b"}, {"question": "a", "answer": ""})
    with pytest.raises(DataError, match=r"1 bad row:\n  f\.jsonl:2: conversation\[0\]: role must be"):
        parse({"conversation": QA}, {"conversation": [{"role": "x", "content": "y"}]})
    with pytest.raises(DataError, match=r"1 bad row:\n  f\.jsonl:2: reply: must be text"):
        parse({"q": "a", "reply": "b"}, {"q": "a", "reply": None}, columns={"question": "q", "answer": "reply"})


def test_renamed_columns_may_be_other_names_too():
    found, row, left, _ = converted({"q": "2+2?", "answer": "4"}, columns={"question": "q"})
    assert (found, row.messages, left) == (Format.prompt_completion, QA, [])


def test_preference_pairs_are_not_read_as_pairs_of_other_names():
    with pytest.raises(DataError, match="chosen and rejected are preference pairs"):
        parse({"question": "a", "answer": "b", "chosen": "c", "rejected": "d"})


def test_no_rows_at_all_is_a_data_error():
    with pytest.raises(DataError, match=r"f\.jsonl: there are no rows"):
        parse()


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


def test_no_row_is_read_beyond_max_rows():
    def records():
        yield "f:1", {"text": "a"}
        yield "f:2", {"text": "b"}
        raise AssertionError("read past max_rows")

    assert len(formats.rows(records(), Data(max_rows=2), Ledger())[1]) == 2
