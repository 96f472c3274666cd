"""Check the messages of a chat and bring them to one form: OpenAI's keys, the chat template's roles.

    {"from": "gpt", "value": "4"}                   ->  {"role": "assistant", "content": "4"}
    {"role": "developer", "content": [{"text": "Use tools."}]}  ->  {"role": "system", "content": "Use tools."}

Functions raise RowError, which names the wrong column, message or key.
"""

import json
from typing import Any

from lora_ft.data import thoughts
from lora_ft.data.files import parse_json
from lora_ft.data.rows import Message, RowError, excerpt, is_blank

# OpenAI's and ShareGPT's names. OpenAI now calls a system message a developer message.
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_MAY_FOLLOW = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}  # fmt: skip

_HEAVIEST = 1000  # of a message; larger weights are no weights
_STRICT_JSON = json.JSONEncoder(allow_nan=False, default=str)  # built once: json.dumps builds one for each message


def text_of(values: dict[str, Any], name: str) -> str:
    """Return the text of a column, which must not be blank."""
    if name not in values:
        raise RowError(name, "is missing")
    value = values[name]
    if not isinstance(value, str):
        raise RowError(name, f"must be text, got {_type(value)}")
    if is_blank(value):
        raise RowError(name, "is empty")
    return value


def optional_text(values: dict[str, Any], name: str) -> str:
    """Return the text of a column; "" if it is missing, null or blank."""
    value = values.get(name)
    if not isinstance(value, str | None):
        raise RowError(name, f"must be text, got {_type(value)}")
    return value if value and not is_blank(value) else ""


def tools_of(values: dict[str, Any]) -> list[Any] | None:
    """Return the tools of a row; None if it has none."""
    tools = values.get("tools")
    if not isinstance(tools, list | None):
        raise RowError("tools", f"must be a list, got {_type(tools)}")
    for index, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise RowError(f"tools[{index}]", f"must be an object, got {_type(tool)}")
        _check_finite(tool, f"tools[{index}]")
    return tools or None


def messages_of(values: dict[str, Any], column: str) -> list[Message]:
    """Return the messages of a column; "weight": 0 is not to be learned, another weight is a factor of the loss."""
    if column not in values:
        raise RowError(column, "is missing")
    messages = values[column]
    if not isinstance(messages, list):
        raise RowError(column, f"must be a list of messages, got {_type(messages)}")
    if not messages:
        raise RowError(column, "is empty")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(messages)]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Put a system message before a chat that has none; the chat is unchanged if `system` is empty."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_order(messages: list[Message]) -> None:
    """Raise RowError unless roles alternate as chat templates expect and the chat ends with an answer."""
    last = ""
    for index, message in enumerate(messages):
        if message["role"] not in _MAY_FOLLOW[last]:
            position = f"follow {last}" if last else "be first"
            raise RowError(f"message {index + 1}", f"{message['role']} may not {position}")
        last = message["role"]
    if last != "assistant":
        raise RowError(f"message {len(messages)}", f"the chat must end with an assistant message, it ends with {last}")


def _message(message: object, name: str) -> Message:
    """Return a message with OpenAI's keys; further keys that templates may read (tool_calls, name, ...) are kept."""
    if not isinstance(message, dict):
        raise RowError(name, f"must be an object, got {_type(message)}")
    kept = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    if extra := {key: value for key, value in kept.items() if key not in ("role", "content", "tool_calls")}:
        _check_finite(extra, name)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(name, f"role must be one of {', '.join(_ROLES)}, got {excerpt(repr(role))}")
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = _calls(calls, _ROLES[role], name)
    content = message.get("content", message.get("value"))
    if _ROLES[role] == "assistant":
        kept, content = _with_thought(kept, content, name)
    content = _content(content, name)
    if content is None and not calls:
        raise RowError(name, f"the content of {role} is missing")
    if is_blank(content or "") and _ROLES[role] in ("user", "assistant") and not calls:
        raise RowError(name, f"the content of {role} is empty")
    weight = kept.get("weight", 1)
    if not isinstance(weight, int | float) or not 0 <= weight <= _HEAVIEST:
        raise RowError(name, f"weight must be a number from 0 to {_HEAVIEST}, got {excerpt(weight)}")
    for flag in ("train", "loss"):
        learned = kept.pop(flag, True)
        if not isinstance(learned, bool):
            raise RowError(name, f"{flag} must be true or false, got {excerpt(learned)}")
        if not learned:
            kept["weight"] = 0
    return {**kept, "role": _ROLES[role], "content": content or ""}


def _with_thought(message: Message, content: object, name: str) -> tuple[Message, object]:
    """Return an answer with its thought under the key `thoughts.FIELD`, and its content without thinking parts."""
    given: list[object] = [message.pop(key) for key in thoughts.FIELDS if key in message]
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        if parts != content[: len(parts)]:
            raise RowError(name, "a thinking part must be before the text of the content", content)
        given += (
            ["".join(map(str, texts))] if parts and _are_texts(texts := [p.get("thinking") for p in parts]) else parts
        )
        content = content[len(parts) :] or ""
    found: dict[str, None] = {}
    for thought in given:
        if not isinstance(thought, str):
            raise RowError(name, f"the thought of an answer must be text, got {_type(thought)}", thought)
        if not is_blank(thought):
            found[thought.strip()] = None
    if found and isinstance(content, str) and (written := thoughts.split({"content": content}))[0]:
        found[written[0]], content = None, written[1]
    if len(found) > 1:
        raise RowError(name, "has two thoughts that differ: keep one", list(found))
    return message | dict.fromkeys([thoughts.FIELD][: len(found)], next(iter(found), "")), content


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _content(content: object, name: str) -> str | None:
    """Return the text of a content, which may be OpenAI's list of text parts."""
    if isinstance(content, str | None):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise RowError(name, f"content must be text, got {_type(content)}")


def _calls(calls: object, role: str, name: str) -> list[dict[str, Any]]:
    """Check tool calls and decode their arguments, which OpenAI writes as JSON text."""
    if role != "assistant":
        raise RowError(name, f"tool_calls belong to the assistant, not to {role}")
    if not isinstance(calls, list):
        raise RowError(name, f"tool_calls must be a list, got {_type(calls)}")
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
    """Return the arguments of a tool call as an object; missing, null or blank arguments become an empty one."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return {}
    found = value
    if isinstance(value, str):
        try:
            found = parse_json(value)
        except json.JSONDecodeError as error:
            raise RowError(name, f"is not JSON: {error.msg} at character {error.pos + 1}", value) from None
        except RowError as error:
            raise RowError(name, str(error), value) from None
    if not isinstance(found, dict):
        raise RowError(name, f"must be an object or the JSON text of one, got {_type(found)}", value)
    _check_finite(found, name)
    return found


def _check_finite(value: object, name: str) -> None:
    """Raise RowError for NaN and infinities: a template would write them as JSON, and the model would learn that."""
    try:
        _STRICT_JSON.encode(value)
    except ValueError:
        raise RowError(name, "must not contain NaN or Infinity, which JSON does not have", value) from None


def _type(value: object) -> str:
    """Return the type of a value in the words of JSON."""
    name = type(value).__name__
    return {"NoneType": "null", "str": "text", "dict": "object"}.get(name, name)
