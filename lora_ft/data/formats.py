"""What a row is: the columns of the usual formats, checked field by field and made one `Row`.

    messages           {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    conversations      {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    prompt_completion  {"prompt": "2+2?", "completion": "4"}          texts, or two lists of messages
    alpaca             {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]]}
    table              {"english": "good", "german": "gut"}           with data.prompt and data.answer
    text               {"text": "Two and two are four."}

An OpenAI message's "weight": 0 keeps an assistant message from being learned; "tools" go to the template.
"""

from collections.abc import Callable, Iterable
from typing import Any

from lora_ft import config
from lora_ft.config import Format
from lora_ft.data import table
from lora_ft.data.rows import Ledger, Message, Record, Row, RowError
from lora_ft.errors import ConfigError, DataError

COLUMNS = {
    Format.messages: ("messages", "tools"),
    Format.conversations: ("conversations", "system", "tools"),
    Format.prompt_completion: ("prompt", "completion", "tools"),
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


def rows(records: Iterable[Record], data: config.Data, ledger: Ledger) -> tuple[Format, list[Row]]:
    """Read every record as the format of the first one, or as `data.format`; bad rows go into the ledger.

    Raises ConfigError for columns that are not there, DataError where no format fits or no row is left.
    """
    parsed: list[Row] = []
    parse: Callable[[str, dict[str, Any]], Row] | None = None
    found = data.format
    for record in records:
        if parse is None:
            found, parse = _parser(record, data)
        try:
            parsed.append(parse(record.place, _renamed(record.values, data.columns)))
        except RowError as error:
            ledger.add_bad(record.place, error.name, error.reason, record.values)
        if len(parsed) == data.max_rows:
            break
    ledger.raise_bad()
    if not parsed:
        raise DataError("there is no row to learn from in the data")
    return found, parsed


def _parser(record: Record, data: config.Data) -> tuple[Format, Callable[[str, dict[str, Any]], Row]]:
    names = record.values
    if missing := [name for name in data.columns.values() if name not in names]:
        raise ConfigError(f"data.columns names {missing[0]}, which is no column of {record.place}: {_listed(names)}")
    found = detect(record.place, {**names, **dict.fromkeys(data.columns)}, data)
    if found is Format.table:
        return found, table.parser(data, (*names, *data.columns))
    if data.prompt is not None or data.answer is not None:
        raise ConfigError(f"data.prompt and data.answer are templates of data.format=table, got {found.name}")
    if unknown := [name for name in data.columns if name not in COLUMNS[found]]:
        raise ConfigError(
            f"data.columns: {unknown[0]} is no column of format {found.name}, which has {_listed(COLUMNS[found])}"
        )
    return found, _PARSERS[found]


def detect(place: str, names: Iterable[str], data: config.Data) -> Format:
    """The format of rows with these column names; DataError where there is none."""
    names = set(names)
    if data.format is not Format.auto:
        return data.format
    if data.prompt is not None or data.answer is not None:
        return Format.table
    if "messages" in names:
        return Format.messages
    if "conversations" in names:
        return Format.conversations
    if {"chosen", "rejected"} <= names:
        raise DataError(f"{place}: chosen and rejected are preference pairs; rows to imitate have prompt + completion")
    if {"prompt", "completion"} <= names:
        return Format.prompt_completion
    if {"instruction", "output"} <= names:
        return Format.alpaca
    if "text" in names:
        return Format.text
    raise DataError(
        f"{place}: no format has the columns {_listed(names)}: name one with data.format=, rename columns with "
        f"data.columns=, or write data.prompt= and data.answer= over them"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))


def _renamed(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {**values, **{name: values.get(given) for name, given in columns.items()}} if columns else values


def _messages_row(place: str, values: dict[str, Any]) -> Row:
    return _chat(place, _message_list(values, "messages"), values)


def _conversations_row(place: str, values: dict[str, Any]) -> Row:
    messages = _message_list(values, "conversations")
    if (system := _optional_text(values, "system")) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _chat(place, messages, values)


def _prompt_completion_row(place: str, values: dict[str, Any]) -> Row:
    if isinstance(values.get("prompt"), list):
        asked = _message_list(values, "prompt")
        context = frozenset(i for i, message in enumerate(asked) if message["role"] == "assistant")
        return _chat(place, asked + _message_list(values, "completion"), values, context)
    prompt, completion = _text(values, "prompt"), _text(values, "completion")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Row(place, messages, completion, plain_prompt=prompt, tools=_tools(values))


def _alpaca_row(place: str, values: dict[str, Any]) -> Row:
    """Templates get instruction and input as one user message; plain text gets Alpaca's headings."""
    instruction, output = _text(values, "instruction"), _text(values, "output")
    extra, system = _optional_text(values, "input"), _optional_text(values, "system")
    turns = [*_history(values), (f"{instruction}\n{extra}" if extra else instruction, output)]
    messages = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in turns[:-1]:
        plain += f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n"
    heading = f"\n\n### Input:\n{extra}" if extra else ""
    return Row(place, messages, output, f"{plain}### Instruction:\n{instruction}{heading}\n\n### Response:\n")


def _history(values: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = values.get("history") or []
    if not isinstance(pairs, list):
        raise RowError("history", "must be a list of [instruction, answer]")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)):
            raise RowError("history", "must be a list of [instruction, answer]")
    return [(question, answer) for question, answer in pairs]


def _text_row(place: str, values: dict[str, Any]) -> Row:
    return Row(place, [], _text(values, "text"), plain_prompt="")


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
    if not value.strip():
        raise RowError(name, "is empty")
    return value


def _optional_text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str | None):
        raise RowError(name, f"must be text, got {_kind(value)}")
    return value if value and value.strip() else ""


def _kind(value: object) -> str:
    return (
        "null" if value is None else {"str": "text", "dict": "object"}.get(type(value).__name__, type(value).__name__)
    )


def _tools(values: dict[str, Any]) -> list[Any] | None:
    tools = values.get("tools")
    if not isinstance(tools, list | None):
        raise RowError("tools", f"must be a list, got {_kind(tools)}")
    return tools or None


def _chat(place: str, messages: list[Message], values: dict[str, Any], context: frozenset[int] = frozenset()) -> Row:
    """Check the order of roles and that the chat ends with an answer; take the weights off the messages."""
    last = ""
    for index, message in enumerate(messages):
        if message["role"] not in _MAY_FOLLOW[last]:
            after = f"after {last}" if last else "first"
            raise RowError(f"message {index + 1}", f"{message['role']} may not come {after}")
        last = message["role"]
    if last != "assistant":
        raise RowError(f"message {len(messages)}", f"the chat must end with the assistant's answer, ends with {last}")
    unlearned = {i for i, message in enumerate(messages) if message.pop("weight", 1) == 0}
    return Row(place, messages, messages[-1].get("content") or "", context=context | unlearned, tools=_tools(values))


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
    """A message with OpenAI's keys; what templates may read beside them (tool_calls, name, ...) is kept."""
    if not isinstance(message, dict):
        raise RowError(name, f"must be an object, got {_kind(message)}")
    kept = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(name, f"role {role!r} is none of {', '.join(_ROLES)}")
    content = _content(message.get("content", message.get("value")), name)
    if content is None and not kept.get("tool_calls"):
        raise RowError(name, f"the content of {role} is missing")
    if not (content or "").strip() and _ROLES[role] in ("user", "assistant") and not kept.get("tool_calls"):
        raise RowError(name, f"the content of {role} is empty")
    if kept.get("weight", 1) not in (0, 1):
        raise RowError(name, f"weight must be 0 or 1, got {kept['weight']!r}")
    return {**kept, "role": _ROLES[role], "content": content or ""}


def _content(content: object, name: str) -> str | None:
    """Text, or OpenAI's list of parts where all are text."""
    if isinstance(content, str | None):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise RowError(name, f"content must be text, got {_kind(content)}")
