"""Tools and tool calls as people store them: each form gives the tokens and masks of OpenAI's form."""

import csv
import json
import re
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_template_matrix import FAMILIES, tokenizer_of

import lora_ft
from lora_ft.config import Data
from lora_ft.data.dataset import prepare
from lora_ft.errors import DataError


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": f"Does {name}.", "parameters": parameters}


FUNCTIONS = [
    function("find", city={"type": "string"}),
    function("note", title={"type": "string"}, size={"type": "integer"}),
]
TOOLS = [{"type": "function", "function": inner} for inner in FUNCTIONS]
FIND, NOTE = {"name": "find", "arguments": {"city": "Lima é"}}, {"name": "note", "arguments": {"title": "a", "size": 2}}


def wrapped(call):
    return {"type": "function", "function": call}


def chat(*calls):
    """Return a chat in OpenAI's form: a question, calls, a result for each of them, an answer."""
    return [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [wrapped(call) for call in calls]},
        *[{"role": "tool", "content": '{"n": 1}'} for _ in calls],
        {"role": "assistant", "content": "There."},
    ]


def share_gpt(calls, *, result="observation", role="function_call", count=1):
    """Return the same chat as LLaMA-Factory stores it."""
    turns = [("human", "Where?"), (role, calls), *[(result, '{"n": 1}')] * count, ("gpt", "There.")]
    return [{"from": role, "value": value} for role, value in turns]


def with_calls(calls, **keys):
    messages = chat(FIND)
    del messages[1]["tool_calls"]
    return [messages[0], {**messages[1], **calls}, {**messages[2], **keys}, messages[3]]


# Like Llama 3.1's: one call in a turn, its name as an attribute; tools and results as JSON.
LLAMA31 = (
    "{% for t in tools or [] %}{{ t | tojson(indent=2) }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|im_start|>assistant\n"
    """{{ '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}<|im_end|>\n' }}"""
    "{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer(name):
    if name == "llama3.1":
        made = tokenizer_of(FAMILIES["chatml"], "tiny")
        made.chat_template = LLAMA31
        return made
    return tokenizer_of(FAMILIES[name], "tiny")


def made(folder, name, *rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(Data(path=str(path), eval_fraction=0, max_length=4096, **settings), tokenizer(name))


def documents(dataset):
    return [(document.ids.tolist(), document.supervised.tolist()) for document in dataset.train]


ONE, USED = {"messages": chat(FIND)}, {"messages": chat(FIND), "tools": TOOLS}
AS_TEXT = {**FIND, "arguments": json.dumps(FIND["arguments"])}
FILLED_UP = {**FIND, "arguments": {"title": None, "city": "Lima é"}}
FILLED_UP_TOOL = function("find", city={"type": "string", "enum": None}, title=None) | {"strict": None}
FILLED_UP_TOOL["parameters"]["required"] = ["city"]
CALLS_READ, CALL_READ = "tool_calls read from JSON text", "tool calls read from JSON text"
TURNS_READ, FIELDS_READ = "function_call turns read as tool calls", "function_call fields read as tool calls"
TOOLS_READ, WRAPPED = "tools read from JSON text", 'functions of tools put into {"type": "function", "function": ...}'
ONE_CALL, ONE_TOOL = "single objects read as lists of tool_calls", "single objects read as lists of tools"


def called(calls):
    return {"messages": with_calls({"tool_calls": calls})}


# The row in OpenAI's form, the row as it is stored, counts.
FORMS = {
    "messages as text": (ONE, {"messages": json.dumps(chat(FIND))}, {"chats read from JSON text": 1}),
    "messages as a list of texts": (
        ONE, {"messages": [json.dumps(m) for m in chat(FIND)]}, {"messages read from JSON text": 4}),
    "everything as text": (
        USED,
        {"messages": json.dumps(called(json.dumps([wrapped(AS_TEXT)]))["messages"]), "tools": json.dumps(TOOLS)},
        {"chats read from JSON text": 1, CALLS_READ: 1, TOOLS_READ: 1}),
    "calls as text": (ONE, called(json.dumps([wrapped(FIND)])), {CALLS_READ: 1}),
    "each call as text": (ONE, called([json.dumps(wrapped(FIND))]), {CALL_READ: 1}),
    "the function of a call as text": (ONE, called([wrapped(json.dumps(FIND))]), {CALL_READ: 1}),
    "one call as an object": (ONE, called(wrapped(FIND)), {ONE_CALL: 1}),
    "a call without its type": (ONE, called([FIND]), {}),
    "tools as text": (USED, {**ONE, "tools": json.dumps(TOOLS)}, {TOOLS_READ: 1}),
    "each tool as text": (USED, {**ONE, "tools": [*map(json.dumps, TOOLS)]}, {TOOLS_READ: 2}),
    "tools as functions": (USED, {**ONE, "tools": FUNCTIONS}, {WRAPPED: 2}),
    "tools as functions in text": (USED, {**ONE, "tools": json.dumps(FUNCTIONS)}, {TOOLS_READ: 1, WRAPPED: 2}),
    "flat tools with a type": (USED, {**ONE, "tools": [{"type": "function", **f} for f in FUNCTIONS]}, {WRAPPED: 2}),
    "parameters as text": (
        {**ONE, "tools": TOOLS[:1]},
        {**ONE, "tools": [wrapped({**FUNCTIONS[0], "parameters": json.dumps(FUNCTIONS[0]["parameters"])})]},
        {"parameters of tools read from JSON text": 1}),
    "one tool": ({**ONE, "tools": TOOLS[:1]}, {**ONE, "tools": FUNCTIONS[0]}, {ONE_TOOL: 1, WRAPPED: 1}),
    "older functions": (USED, {**ONE, "functions": FUNCTIONS, "tools": None}, {WRAPPED: 2}),
    "blank tools": (ONE, {**ONE, "tools": " "}, {}),
    "function_call turns": (ONE, {"conversations": share_gpt(json.dumps(FIND))}, {TURNS_READ: 1}),
    "function_call turns with arguments as text": (
        ONE, {"conversations": share_gpt(json.dumps(AS_TEXT))}, {TURNS_READ: 1}),
    "function_call turns as objects": (ONE, {"conversations": share_gpt(FIND, role="Function_Call ")}, {TURNS_READ: 1}),
    "function_call turns of a list": (
        {"messages": chat(FIND, NOTE)}, {"conversations": share_gpt(json.dumps([FIND, NOTE]), count=2)},
        {TURNS_READ: 1}),
    "function_call turns of messages": (
        ONE, {"messages": [{"role": turn["from"], "content": turn["value"]} for turn in share_gpt(json.dumps(FIND))]},
        {TURNS_READ: 1}),
    "older field": (ONE, {"messages": with_calls({"function_call": AS_TEXT}, role="function")}, {FIELDS_READ: 1}),
    "older field as text": (ONE, {"messages": with_calls({"function_call": json.dumps(FIND)})}, {FIELDS_READ: 1}),
    "older field beside empty calls": (
        ONE, {"messages": with_calls({"function_call": FIND, "tool_calls": []})}, {FIELDS_READ: 1}),
    "result as an object": (
        ONE, {"messages": with_calls({"tool_calls": [wrapped(FIND)]}, content={"n": 1})},
        {"results of tools written as JSON text": 1}),
    "nulls of other tools": (
        USED, {**called([wrapped(FILLED_UP)]), "tools": [wrapped(FILLED_UP_TOOL), TOOLS[1]]},
        {"tool calls without the nulls of other tools' arguments": 1, "tools without the nulls of their schema": 1}),
}  # fmt: skip
SEVERAL = ("function_call turns of a list",)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_tokens_of_openais_form(form, name, tmp_path):
    usual, stored, counts = FORMS[form]
    if form in SEVERAL and name == "llama3.1":
        with pytest.raises(DataError, match="one call at a time"):
            made(tmp_path, name, stored)
        return
    dataset = made(tmp_path, name, stored)
    assert documents(dataset) == documents(made(tmp_path, name, usual))
    assert dataset.report.converted == counts
    learned = [tokenizer(name).decode(row.ids[row.supervised]) for row in dataset.train]
    assert '"city": "Lima é"' in learned[0] and "There.<|im_end|>" in learned[-1]


@pytest.mark.parametrize("form", [form for form, (_, _, counts) in FORMS.items() if counts])
def test_strict_data_refuses_each_form(form, tmp_path):
    with pytest.raises(DataError, match=r"data\.strict=true refuses"):
        made(tmp_path, "qwen2.5", FORMS[form][1], strict=True)


def test_parquet_with_the_arguments_of_all_tools_gives_the_same_tokens(tmp_path):
    rows = [{"messages": chat(FIND), "tools": TOOLS}, {"messages": chat(NOTE), "tools": TOOLS}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = Data(path=str(tmp_path / "rows.parquet"), eval_fraction=0, max_length=4096)
    assert documents(prepare(data, tokenizer("qwen2.5"))) == documents(made(tmp_path, "qwen2.5", *rows))


def test_csv_with_chats_and_tools_as_text_gives_the_same_tokens(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(chat(FIND)), json.dumps(TOOLS)]])
    data = Data(path=str(tmp_path / "rows.csv"), eval_fraction=0, max_length=4096)
    usual = made(tmp_path, "qwen2.5", {"messages": chat(FIND), "tools": TOOLS})
    assert documents(prepare(data, tokenizer("qwen2.5"))) == documents(usual)


def test_results_of_function_call_turns_have_the_names_of_their_calls(tmp_path):
    naming = tokenizer_of(FAMILIES["qwen2.5"], "tiny")
    naming.chat_template = naming.chat_template.replace("<tool_response>", "<tool_response>' + (m.name or 'none') + '")
    path = tmp_path / "rows.jsonl"
    turns = [
        share_gpt(json.dumps(FIND)),
        share_gpt(json.dumps([FIND, NOTE]), count=2),
        share_gpt(json.dumps([FIND, NOTE])),
    ]
    older = with_calls({"function_call": FIND}, role="function", name="find")
    rows = [*({"conversations": turn} for turn in turns), {"conversations": older}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(Data(path=str(path), eval_fraction=0), naming).train
    names = [re.findall(r"<tool_response>(\w*)", naming.decode(document.ids)) for document in found]
    assert names == [["find"], ["find", "note"], ["none"], ["find"]]


def test_a_null_that_a_tool_declares_is_kept(tmp_path):
    call = {"name": "note", "arguments": {"title": None, "size": 2}}
    dataset = made(tmp_path, "qwen2.5", {"messages": chat(call), "tools": TOOLS}, {"messages": chat(call)})
    for document in dataset.train:
        assert '{"title": null, "size": 2}' in tokenizer("qwen2.5").decode(document.ids[document.supervised])
    assert dataset.report.converted == {}


DROPPING = {
    "the parameter title of the tool note": lambda text: text.replace("t | tojson(indent=2)", "t.function.name"),
    "the tool find": lambda text: text.replace("t | tojson(indent=2)", "''"),
    "the answer's call of find": lambda text: text.replace("f.name", "''").replace("t | tojson", "t | upper | tojson"),
    "the result of a tool": lambda text: text.replace("m.content | tojson", "''"),
}


@pytest.mark.parametrize("lost", DROPPING)
def test_a_template_that_drops_a_part_of_tools_is_refused(lost, tmp_path):
    dropping = tokenizer_of(FAMILIES["chatml"], "tiny")
    dropping.chat_template = DROPPING[lost](LLAMA31)
    path = tmp_path / "rows.jsonl"
    tools = [] if lost == "the answer's call of find" else TOOLS[1:] if "note" in lost else TOOLS
    messages = [*chat(FIND)[:2], {"role": "tool", "content": "seven"}, chat(FIND)[-1]]
    path.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    with pytest.raises(DataError, match=rf"1 bad row:\n.*chat template: .*drops {lost}"):
        prepare(Data(path=str(path), eval_fraction=0), dropping)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": share_gpt("find(city)")}, r"conversations\[1\]\.value: is not JSON: .* at character 1:"),
        ({"conversations": share_gpt("")}, r"conversations\[1\]\.value: must be a call or a list of calls"),
        ({"conversations": share_gpt("[]")}, r"conversations\[1\]\.value: must be a call or a list of calls"),
        ({"conversations": share_gpt("{}")}, r"conversations\[1\]\.value: must be a call or a list of calls"),
        ({"conversations": share_gpt("[7]")}, r"conversations\[1\]: tool_calls must be objects with the name"),
        ({"messages": with_calls({"function_call": "auto"})}, r"messages\[1\]\.function_call: is not JSON"),
        ({"messages": [*with_calls({"function_call": FIND}), {"role": "user", "content": "a", "function_call": FIND}]},
         r"messages\[4\]: tool_calls belong to the assistant, not to user"),
        ({"messages": chat(FIND), "tools": "[{'name': 'find'}]"}, "tools: is not JSON: .*double quotes"),
        ({"messages": chat(FIND), "tools": '[{"name": "\\ud83d"}]'}, "tools: holds half of a surrogate pair"),
        ({"messages": json.dumps(chat(FIND))[:-1]}, "messages: is not JSON"),
        ({"messages": '{"role": "user"}'}, "messages: must be a list of messages, got object"),
    ],
)  # fmt: skip
def test_text_that_is_no_call_tool_or_chat_is_refused_by_name(row, reason, tmp_path):
    with pytest.raises(DataError, match=rf"1 bad row:\n  .*rows\.jsonl:1: {reason}"):
        made(tmp_path, "qwen2.5", row)


def test_the_forms_of_the_docs_page_give_the_same_call(tmp_path):
    page = (Path(lora_ft.__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
    rows = re.findall(r"\n## Tools\n.*?```jsonl\n(.*?)```", page, re.DOTALL)[0].splitlines()
    assert len(rows) == 3
    for row in map(json.loads, rows):
        (document,) = made(tmp_path, "qwen2.5", row).train
        learned = tokenizer("qwen2.5").decode(document.ids[document.supervised])
        assert learned == '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>Four.<|im_end|>'
