"""What a row is: the columns of the usual formats, checked field by field and made one `Row`.

    messages           {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    conversations      {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    prompt_completion  {"prompt": "2+2?", "completion": "4"}          texts, or two lists of messages
    alpaca             {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]]}
    table              {"english": "good", "german": "gut"}           with data.prompt and data.answer
    text               {"text": "Two and two are four."}

A message with "weight": 0, "train": false or "loss": false is not learned; "tools" go to the template. A column
"system" leads the chat of any format that has no system message.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from lora_ft import config
from lora_ft.config import Format
from lora_ft.data import jsonl, table
from lora_ft.data.rows import ANSWER_CUE, Ledger, Message, Record, Row, RowError, excerpt, is_blank
from lora_ft.errors import ConfigError, DataError

COLUMNS = {
    Format.messages: ("messages", "system", "tools"),
    Format.conversations: ("conversations", "system", "tools"),
    Format.prompt_completion: ("prompt", "completion", "system", "tools"),
    Format.alpaca: ("instruction", "input", "output", "system", "history"),
    Format.text: ("text",),
}

# ShareGPT's names beside OpenAI's. OpenAI's developer is its newer word for system.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_MAY_FOLLOW = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}  # fmt: skip


def rows(records: Iterable[Record], data: config.Data, ledger: Ledger) -> tuple[Format, list[Row], list[str]]:
    """Read at most `data.max_rows` records; the format, the rows, and the columns that nothing reads.

    Bad rows go into the ledger; it is raised where no row is good. Raises ConfigError for columns that no record has,
    DataError where no format fits or there is no row.
    """
    held = list(islice(records, data.max_rows))
    if not held:
        ledger.raise_bad()
        raise DataError("there is no row to learn from in the data")
    columns = Counter(tuple(_renamed(values, data.columns)) for _, values in held)
    names = list(dict.fromkeys(name for _, values in held for name in values))
    found, parse, read = _parser(names, columns, data)
    parsed: list[Row] = []
    for source, values in held:
        try:
            parsed.append(parse(source, _renamed(values, data.columns)))
        except RowError as error:
            ledger.add_bad(source, _as_in_file(error.name, data.columns), error.reason, values)
    if not parsed:
        ledger.raise_bad()
    in_file = {data.columns.get(name, name) for name in read}
    return found, parsed, [name or "(unnamed)" for name in names if name not in in_file]


Columns = Counter[tuple[str, ...]]
"""How many rows have which columns."""


def _parser(
    names: list[str], columns: Columns, data: config.Data
) -> tuple[Format, Callable[[str, dict[str, Any]], Row], Iterable[str]]:
    """The format of rows with these columns, what makes a row of it, and the columns that this reads."""
    if missing := [name for name in data.columns.values() if name not in names]:
        raise ConfigError(f"data.columns names {missing[0]}, which is no column of {data.path}: {_listed(names)}")
    known = {*names, *data.columns}
    found = _detect(columns, data)
    if found is Format.table:
        return found, table.parser(data, known), table.fields(data)
    if data.prompt is not None or data.answer is not None:
        raise ConfigError(f"data.prompt and data.answer are templates of data.format=table, got {found.name}")
    if unknown := [name for name in data.columns if name not in COLUMNS[found]]:
        raise ConfigError(
            f"data.columns: {unknown[0]} is no column of format {found.name}, which has {_listed(COLUMNS[found])}"
        )
    return found, _PARSERS[found], COLUMNS[found]


def _detect(columns: Columns, data: config.Data) -> Format:
    """The format that most rows have the columns of: those that do not are the bad ones. DataError where there is none.

    Rows that each lack something may still have the columns of a format together.
    """
    if data.format is not Format.auto:
        return data.format
    if data.prompt is not None or data.answer is not None:
        return Format.table
    votes: Counter[Format] = Counter()
    for names, count in columns.items():
        if found := _format_of(set(names)):
            votes[found] += count
    together = {name for names in columns for name in names}
    if votes:
        return votes.most_common(1)[0][0]
    if found := _format_of(together):
        return found
    if {"chosen", "rejected"} <= together:
        raise DataError(
            f"{data.path}: chosen and rejected are preference pairs; rows to imitate have prompt + completion"
        )
    raise DataError(
        f"{data.path}: no format has the columns {_listed(together)}: name one with data.format=, rename columns with "
        f"data.columns=, or write data.prompt= and data.answer= over them"
    )


# Columns that make a format, the first that fits; {"chosen", "rejected"} makes none.
_MARKS = (
    (Format.messages, {"messages"}), (Format.conversations, {"conversations"}),
    (None, {"chosen", "rejected"}), (Format.prompt_completion, {"prompt", "completion"}),
    (Format.alpaca, {"instruction", "output"}), (Format.text, {"text"}),
)  # fmt: skip


def _format_of(names: set[str]) -> Format | None:
    return next((found for found, marks in _MARKS if marks <= names), None)


def _listed(names: Iterable[str]) -> str:
    return excerpt(", ".join(sorted(map(str, names))), longest=300)


def _renamed(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Values under the names that formats expect; a column that the row lacks stays missing."""
    if not columns:
        return values
    given = {name: values[in_file] for name, in_file in columns.items() if in_file in values}
    return {name: value for name, value in values.items() if name not in columns} | given


def _as_in_file(name: str, columns: dict[str, str]) -> str:
    """messages[1] -> dialogue[1], where the file calls it so."""
    column, bracket, index = name.partition("[")
    return columns.get(column, column) + bracket + index


def _messages_row(source: str, values: dict[str, Any]) -> Row:
    return _chat(source, _led(_message_list(values, "messages"), values), values)


def _conversations_row(source: str, values: dict[str, Any]) -> Row:
    return _chat(source, _led(_message_list(values, "conversations"), values), values)


def _led(messages: list[Message], values: dict[str, Any]) -> list[Message]:
    """The chat behind the system message that the row has in a column of its own, if the chat has none."""
    system = _optional_text(values, "system")
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _prompt_completion_row(source: str, values: dict[str, Any]) -> Row:
    if isinstance(values.get("prompt"), list):
        asked = _led(_message_list(values, "prompt"), values)
        context = frozenset(i for i, message in enumerate(asked) if message["role"] == "assistant")
        return _chat(source, asked + _message_list(values, "completion"), values, context)
    prompt, completion = _text(values, "prompt"), _text(values, "completion")
    messages = _led([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], values)
    system = f"{messages[0]['content']}\n\n" if len(messages) > 2 else ""
    return Row(source, messages, completion, plain_prompt=system + prompt, tools=_tools(values))


def _alpaca_row(source: str, values: dict[str, Any]) -> Row:
    """Templates get instruction and input as one user message; plain text gets Alpaca's headings."""
    instruction, output = _text(values, "instruction"), _text(values, "output")
    extra, system = _optional_text(values, "input"), _optional_text(values, "system")
    turns = [*_history(values), (f"{instruction}\n{extra}" if extra else instruction, output)]
    messages = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in turns[:-1]:
        plain += f"### Instruction:\n{question}{ANSWER_CUE}{answer}\n\n"
    heading = f"\n\n### Input:\n{extra}" if extra else ""
    return Row(source, messages, output, f"{plain}### Instruction:\n{instruction}{heading}{ANSWER_CUE}")


def _history(values: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = values.get("history") or []
    if not isinstance(pairs, list):
        raise RowError("history", "must be a list of [instruction, answer]")
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and not is_blank(t) for t in pair)
        ):
            raise RowError("history", "must be a list of [instruction, answer]")
    return [(question, answer) for question, answer in pairs]


def _text_row(source: str, values: dict[str, Any]) -> Row:
    return Row(source, [], _text(values, "text"), plain_prompt="")


_PARSERS: dict[Format, Callable[[str, dict[str, Any]], Row]] = {
    Format.messages: _messages_row, Format.conversations: _conversations_row,
    Format.prompt_completion: _prompt_completion_row, Format.alpaca: _alpaca_row, Format.text: _text_row,
}  # fmt: skip


def _text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise RowError(name, "is missing")
    value = values[name]
    if not isinstance(value, str):
        raise RowError(name, f"must be text, got {_kind(value)}")
    if is_blank(value):
        raise RowError(name, "is empty")
    return value


def _optional_text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str | None):
        raise RowError(name, f"must be text, got {_kind(value)}")
    return value if value and not is_blank(value) else ""


def _kind(value: object) -> str:
    return (
        "null" if value is None else {"str": "text", "dict": "object"}.get(type(value).__name__, type(value).__name__)
    )


def _tools(values: dict[str, Any]) -> list[Any] | None:
    tools = values.get("tools")
    if not isinstance(tools, list | None):
        raise RowError("tools", f"must be a list, got {_kind(tools)}")
    for index, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise RowError(f"tools[{index}]", f"must be an object, got {_kind(tool)}")
    return tools or None


def _chat(source: str, messages: list[Message], values: dict[str, Any], context: frozenset[int] = frozenset()) -> Row:
    """Check the order of roles and that the chat ends with an answer; take the marks of `_message` off the messages."""
    last = ""
    for index, message in enumerate(messages):
        if message["role"] not in _MAY_FOLLOW[last]:
            after = f"after {last}" if last else "first"
            raise RowError(f"message {index + 1}", f"{message['role']} may not come {after}")
        last = message["role"]
    if last != "assistant":
        raise RowError(f"message {len(messages)}", f"the chat must end with the assistant's answer, ends with {last}")
    excluded = frozenset(i for i, message in enumerate(messages) if message.pop("weight", 1) == 0)
    answer = messages[-1].get("content") or ""
    return Row(source, messages, answer, context=context | excluded, excluded=excluded, tools=_tools(values))


def _message_list(values: dict[str, Any], column: str) -> list[Message]:
    if column not in values:
        raise RowError(column, "is missing")
    messages = values[column]
    if not isinstance(messages, list):
        raise RowError(column, f"must be a list of messages, got {_kind(messages)}")
    if not messages:
        raise RowError(column, "is empty")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(messages)]


def _message(message: object, name: str) -> Message:
    """A message with OpenAI's keys; what templates may read beside them (tool_calls, name, ...) is kept.

    A message that is not learned has "weight": 0, whichever key said so.
    """
    if not isinstance(message, dict):
        raise RowError(name, f"must be an object, got {_kind(message)}")
    kept = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(name, f"role {excerpt(repr(role))} is none of {', '.join(_ROLES)}")
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = _calls(calls, _ROLES[role], name)
    content = _content(message.get("content", message.get("value")), name)
    if content is None and not calls:
        raise RowError(name, f"the content of {role} is missing")
    if is_blank(content or "") and _ROLES[role] in ("user", "assistant") and not calls:
        raise RowError(name, f"the content of {role} is empty")
    if kept.get("weight", 1) not in (0, 1):
        raise RowError(name, f"weight must be 0 or 1, got {excerpt(kept['weight'])}")
    for flag in ("train", "loss"):
        learned = kept.pop(flag, True)
        if not isinstance(learned, bool):
            raise RowError(name, f"{flag} must be true or false, got {excerpt(learned)}")
        if not learned:
            kept["weight"] = 0
    return {**kept, "role": _ROLES[role], "content": content or ""}


def _calls(calls: object, role: str, name: str) -> list[dict[str, Any]]:
    """Check the tool calls of a message and make their arguments objects, which OpenAI writes as JSON text."""
    if role != "assistant":
        raise RowError(name, f"tool_calls belong to the assistant, not to {role}")
    if not isinstance(calls, list):
        raise RowError(name, f"tool_calls must be a list, got {_kind(calls)}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or is_blank(function["name"]):
            raise RowError(name, "tool_calls must be objects with the name of a function")
        arguments = _arguments(function.get("arguments"), f"{name}.tool_calls[{index}].arguments")
        function = {**function, "arguments": arguments}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def _arguments(value: object, name: str) -> dict[str, Any]:
    """The arguments of a tool call as an object; a call that has none, null or empty text gets an empty one."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return {}
    found = value
    if isinstance(value, str):
        try:
            found = jsonl.parse(value)
        except json.JSONDecodeError as error:
            raise RowError(name, f"is not JSON: {error.msg} at character {error.pos + 1}", value) from None
        except RowError as error:
            raise RowError(name, f"{error.name}: {error.reason}", value) from None
    if not isinstance(found, dict):
        raise RowError(name, f"must be an object or the JSON text of one, got {_kind(found)}", value)
    return found


def _content(content: object, name: str) -> str | None:
    """Text, or OpenAI's list of parts where all are text."""
    if isinstance(content, str | None):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise RowError(name, f"content must be text, got {_kind(content)}")
