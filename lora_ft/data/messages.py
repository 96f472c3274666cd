"""Check the messages of a chat and bring them to one form: OpenAI's keys, the chat template's roles.

    {"from": "gpt", "value": "4"}                   ->  {"role": "assistant", "content": "4"}
    {"role": "developer", "content": [{"text": "Use tools."}]}  ->  {"role": "system", "content": "Use tools."}
    {"from": "function_call", "value": '{"name": "add"}'}  ->  {"role": "assistant", "content": "", "tool_calls": [...]}

What is not in the usual form is counted in the ledger. Functions raise RowError, which names the wrong column, message
or key.
"""

import itertools
import json
from typing import Any

from lora_ft.data import thoughts
from lora_ft.data.json_values import as_text, check_finite, decoded, type_name
from lora_ft.data.rows import Ledger, Message, RowError, excerpt, is_blank
from lora_ft.data.tool_calls import called, calls_of

# OpenAI's and ShareGPT's names. OpenAI now calls a system message a developer message.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
# Names that others write, in any case: read and counted.
_OTHER_ROLES = {
    "prompter": "user", "bot": "assistant", "chatbot": "assistant", "chatgpt": "assistant", "ai": "assistant",
    "tool_response": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of an assistant's message whose text is its calls
_KNOWN = {**_ROLES, **_OTHER_ROLES, **dict.fromkeys(_CALLS, "assistant")}


def is_of_assistant(role: object) -> bool:
    """Return True for a role, in any spelling that is read, whose messages are answers."""
    return isinstance(role, str) and _KNOWN.get(role.strip().lower()) == "assistant"


_HEAVIEST = 1000  # of a message; larger weights are no weights
_TEXT_PARTS = ("text", "input_text", "output_text")


def text_of(values: dict[str, Any], name: str, ledger: Ledger) -> str:
    """Return the text of a column, which must not be blank."""
    if name not in values:
        raise RowError(name, "is missing")
    value = as_text(name, values[name], ledger)
    if not isinstance(value, str):
        raise RowError(name, f"must be text, got {type_name(value)}")
    if is_blank(value):
        raise RowError(name, "is empty")
    return value


def optional_text(values: dict[str, Any], name: str, ledger: Ledger) -> str:
    """Return the text of a column; "" if it is missing, null or blank."""
    value = as_text(name, values.get(name), ledger)
    if not isinstance(value, str | None):
        raise RowError(name, f"must be text, got {type_name(value)}")
    return value if value and not is_blank(value) else ""


def messages_of(values: dict[str, Any], column: str, ledger: Ledger) -> list[Message]:
    """Return the messages of a column; "weight": 0 is not to be learned, another weight is a factor of the loss."""
    if column not in values:
        raise RowError(column, "is missing")
    messages = values[column]
    if isinstance(messages, str) and not is_blank(messages):
        messages = decoded(column, messages)
        ledger.convert(column, "chats read from JSON text", messages)
    if not isinstance(messages, list):
        raise RowError(column, f"must be a list of messages, got {type_name(messages)}")
    if not messages:
        raise RowError(column, "is empty")
    found = [
        _plain(message) or _message(message, f"{column}[{index}]", ledger) for index, message in enumerate(messages)
    ]
    for index, message in enumerate(messages):
        if isinstance(message, dict) and _known(message.get("role") or message.get("from")) in _CALLS:
            _name_results(found, index)
    return found


def _name_results(messages: list[Message], index: int) -> None:
    """Give the results after a turn of calls the names of these calls, which some templates write."""
    calls = [call["function"]["name"] for call in messages[index]["tool_calls"]]
    results = list(itertools.takewhile(lambda message: message["role"] == "tool", messages[index + 1 :]))
    for result, name in zip(results, calls, strict=False) if len(results) == len(calls) else ():
        result.setdefault("name", name)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Put a system message before a chat that has none; the chat is unchanged if `system` is empty."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _plain(message: object) -> Message | None:
    """Return a message of a usual role and a text, which nearly all are, as `_message` does; None for any other."""
    if not isinstance(message, dict) or len(message) != 2:
        return None
    keys = ("role", "content") if "role" in message else ("from", "value")
    role, content = message.get(keys[0]), message.get(keys[1])
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str) or is_blank(content):
        return None
    return {"role": _ROLES[role], "content": content}


def _message(message: object, name: str, ledger: Ledger) -> Message:
    """Return a message with OpenAI's keys; further keys that templates may read (tool_calls, name, ...) are kept."""
    if isinstance(message, str) and message.lstrip().startswith("{"):
        message = decoded(name, message)
        ledger.convert(name, "messages read from JSON text", message)
    if not isinstance(message, dict):
        raise RowError(name, f"must be an object, got {type_name(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    kept = {key: value for key, value in given.items() if key not in ("from", "value", "function_call")}
    if extra := {key: value for key, value in kept.items() if key not in ("role", "content", "tool_calls")}:
        check_finite(name, extra)
    shown = given.get("role", given.get("from"))
    role, is_call = _role(shown, name, ledger)
    content: object = given.get("content", given.get("value"))
    calls = _calls(content, given, is_call, role, name, ledger)
    if calls or calls != given.get("tool_calls", calls):
        kept["tool_calls"] = calls
    if is_call:
        content = None
    if role == "assistant":
        kept, content = _with_thought(kept, content, name, ledger)
    text = _content(content, role, name, ledger)
    if text is None and not calls:
        raise RowError(name, f"the content of {shown} is missing")
    if is_blank(text or "") and role in ("user", "assistant") and not calls:
        raise RowError(name, f"the content of {shown} is empty")
    weight = kept.get("weight", 1)
    if not isinstance(weight, int | float) or not 0 <= weight <= _HEAVIEST:
        raise RowError(name, f"weight must be a number from 0 to {_HEAVIEST}, got {excerpt(weight)}")
    for flag in ("train", "loss"):
        learned = kept.pop(flag, True)
        if not isinstance(learned, bool):
            raise RowError(name, f"{flag} must be true or false, got {excerpt(learned)}")
        if not learned:
            kept["weight"] = 0
    return {**kept, "role": role, "content": text or ""}


def _known(role: object) -> str:
    return role.strip().lower() if isinstance(role, str) else ""


def _role(given: object, name: str, ledger: Ledger) -> tuple[str, bool]:
    """Return the chat template's name of a role, and True if the message's text is calls of tools."""
    if isinstance(given, str) and given in _ROLES:
        return _ROLES[given], False
    known = _known(given)
    if known not in _KNOWN:
        raise RowError(name, f"role must be one of {', '.join(_KNOWN)}, got {excerpt(repr(given))}")
    if known in _CALLS:
        return "assistant", True
    ledger.convert(name, f"messages of {excerpt(given)} read as messages of {_KNOWN[known]}", given)
    return _KNOWN[known], False


def _calls(content: object, given: Message, is_call: bool, role: str, name: str, ledger: Ledger) -> list[Any]:
    """Return the tool calls of a message: the text of a `function_call` turn, `tool_calls`, or OpenAI's older field."""
    tool_calls, older = given.get("tool_calls"), given.get("function_call")
    if sum(map(bool, (is_call, tool_calls, older))) > 1:
        raise RowError(name, "calls of tools must be in one place: tool_calls, function_call, or a turn of their own")
    if (tool_calls or older) and role != "assistant":
        raise RowError(name, f"tool_calls belong to the assistant, not to {role}")
    if is_call:
        return called(f"{name}.value", content, "function_call turns read as tool calls", ledger)
    if older:
        return called(f"{name}.function_call", older, "function_call fields read as tool calls", ledger)
    return calls_of(f"{name}.tool_calls", tool_calls, ledger)


def _with_thought(message: Message, content: object, name: str, ledger: Ledger) -> tuple[Message, object]:
    """Return an answer with its thought under the key `thoughts.FIELD`, and its content without thinking parts."""
    given: list[object] = [message.pop(key) for key in thoughts.FIELDS if key in message]
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        if parts != content[: len(parts)]:
            raise RowError(name, "a thinking part must be before the text of the content", content)
        given += (
            ["".join(map(str, texts))] if parts and _are_texts(texts := [p.get("thinking") for p in parts]) else parts
        )
        if parts:
            ledger.convert(name, "thoughts given as parts of the content", content)
        content = content[len(parts) :] or ""
    found: dict[str, None] = {}
    for thought in given:
        if not isinstance(thought, str):
            raise RowError(name, f"the thought of an answer must be text, got {type_name(thought)}", thought)
        if not is_blank(thought):
            found[thought.strip()] = None
    if found and isinstance(content, str) and (written := thoughts.split({"content": content}))[0]:
        found[written[0]], content = None, written[1]
    if len(found) > 1:
        raise RowError(name, "has two thoughts that differ: keep one", list(found))
    return message | dict.fromkeys([thoughts.FIELD][: len(found)], next(iter(found), "")), content


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _content(content: object, role: str, name: str, ledger: Ledger) -> str | None:
    """Return the text of a content, which may be a list of text parts; RowError for parts that are not text."""
    content = as_text(name, content, ledger)
    if isinstance(content, str | None):
        return content
    if (
        isinstance(content, dict)
        and content.get("type", "text") in _TEXT_PARTS
        and isinstance(content.get("text"), str)
    ):
        content = [content]
        ledger.convert(name, "contents given as one text part", content)
    if role == "tool" and isinstance(content, dict):
        check_finite(name, content)
        ledger.convert(name, "results of tools written as JSON text", content)
        return json.dumps(content, ensure_ascii=False, default=str)
    if not isinstance(content, list):
        raise RowError(name, f"content must be text, got {type_name(content)}")
    if any(isinstance(part, str) for part in content):
        ledger.convert(name, "contents given as lists of texts", content)
    return "".join(_part(part, name) for part in content)


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(name, f"content must be text or a list of text parts, got a list with {type_name(part)}")
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS:
        raise RowError(name, f"content has a part of type {excerpt(kind)}: only text can be trained on", part)
    if not isinstance(part.get("text"), str):
        raise RowError(name, f"content must be text, got a part whose text is {type_name(part.get('text'))}", part)
    return str(part["text"])
