"""Bring tools and tool calls to OpenAI's form, in which chat templates expect them.

    tools          '[{"name": "add", "parameters": {}}]'    ->  [{"type": "function", "function": {"name": "add", ...}}]
    tool_calls     '[{"name": "add", "arguments": "{}"}]'   ->  [{"name": "add", "arguments": {}}]
    function_call  {"name": "add", "arguments": '{"a": 2}'} ->  [{"type": "function", "function": {"name": "add", ...}}]

Parquet and CSV hold tools and calls as JSON text, or as objects that Arrow filled up with nulls. What is brought to the
form above is counted in the ledger. Functions raise RowError, which names the wrong column, message or key.
"""

from typing import Any

from lora_ft.data.json_values import check_finite, decoded, type_name
from lora_ft.data.rows import Ledger, Message, RowError, is_blank

# Keywords of a JSON schema whose value may be null; elsewhere a null says nothing.
_NULL_HAS_MEANING = ("default", "const", "example")


def tools_of(values: dict[str, Any], ledger: Ledger) -> list[Any] | None:
    """Return the tools of a row, from `tools` or OpenAI's older `functions`; None if it has none."""
    given = {name: tools for name in ("tools", "functions") if (tools := _listed(name, values.get(name), ledger))}
    if len(given) > 1:
        raise RowError("functions", "a row has tools or functions, not both", values["functions"])
    for name, tools in given.items():
        return [_tool(f"{name}[{index}]", tool, ledger) for index, tool in enumerate(tools)]
    return None


def _listed(name: str, value: object, ledger: Ledger) -> list[Any]:
    """Return a list that may be JSON text, or a single object instead; null and blank text are an empty list."""
    if isinstance(value, str):
        if is_blank(value):
            return []
        value = decoded(name, value)
        ledger.convert(name, f"{name.rpartition('.')[2]} read from JSON text", value)
    if isinstance(value, dict) and isinstance(value.get("function", value.get("name")), str | dict):
        ledger.convert(name, f"single objects read as lists of {name.rpartition('.')[2]}", value)
        value = [value]
    if not isinstance(value, list | None):
        raise RowError(name, f"must be a list or the JSON text of one, got {type_name(value)}", value)
    return value or []


def _object(name: str, value: object, what: str, ledger: Ledger) -> dict[str, Any]:
    """Return an object, which may be JSON text."""
    if isinstance(value, str):
        found = decoded(name, value)
        ledger.convert(name, f"{what} read from JSON text", value)
        value = found
    if not isinstance(value, dict):
        raise RowError(name, f"must be an object, got {type_name(value)}", value)
    return value


def _tool(name: str, value: object, ledger: Ledger) -> dict[str, Any]:
    """Return a tool in OpenAI's form. A tool without a function, such as a hosted search, is not changed."""
    tool = _object(name, value, "tools", ledger)
    if "function" in tool:
        function = _object(f"{name}.function", tool["function"], "functions of tools", ledger)
        wrapped = {**tool, "type": tool.get("type") or "function"}
    elif isinstance(tool.get("name"), str) and not is_blank(tool["name"]):
        function = {key: inner for key, inner in tool.items() if (key, inner) != ("type", "function")}
        ledger.convert(name, 'functions of tools put into {"type": "function", "function": ...}', tool)
        wrapped = {"type": "function"}
    else:
        check_finite(name, tool)
        return tool
    if isinstance(function.get("parameters"), str):
        parameters = _object(f"{name}.parameters", function["parameters"], "parameters of tools", ledger)
        function = {**function, "parameters": parameters}
    meant = _without_nulls(function)
    if meant != function:
        ledger.convert(name, "tools without the nulls of their schema", function)
    check_finite(name, meant)
    return {**wrapped, "function": meant}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_nulls(inner) for key, inner in value.items() if inner is not None or key in _NULL_HAS_MEANING
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def calls_of(name: str, value: object, ledger: Ledger) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with their arguments as objects."""
    return [_call(f"{name}[{index}]", call, ledger) for index, call in enumerate(_listed(name, value, ledger))]


def _call(name: str, value: object, ledger: Ledger) -> dict[str, Any]:
    """Check a call and decode its arguments, which OpenAI writes as JSON text."""
    message = name.partition(".")[0]
    call = _object(name, value, "tool calls", ledger) if isinstance(value, str) else value
    function = call.get("function", call) if isinstance(call, dict) else call
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = _object(f"{name}.function", function, "tool calls", ledger)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or is_blank(function["name"]):
        raise RowError(message, "tool_calls must be objects with the name of a function", value)
    assert isinstance(call, dict)
    function = {**function, "arguments": _arguments(f"{name}.arguments", function.get("arguments"))}
    return {**call, "function": function} if "function" in call else function


def _arguments(name: str, value: object) -> dict[str, Any]:
    """Return the arguments of a tool call as an object; missing, null or blank arguments become an empty one."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return {}
    found = decoded(name, value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise RowError(name, f"must be an object or the JSON text of one, got {type_name(found)}", value)
    check_finite(name, found)
    return found


def called(name: str, value: object, what: str, ledger: Ledger) -> list[dict[str, Any]]:
    """Return the calls of a `function_call` turn or field: one call or a list of them, which may be JSON text."""
    if isinstance(value, str) and not is_blank(value):
        value = decoded(name, value)
    if not isinstance(value, list | dict) or not value:
        raise RowError(
            name, f"must be a call or a list of calls, or the JSON text of one, got {type_name(value)}", value
        )
    ledger.convert(name, what, value)
    calls = [
        _call(f"{name}[{i}]", call, ledger) for i, call in enumerate(value if isinstance(value, list) else [value])
    ]
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def drop_undeclared_nulls(messages: list[Message], tools: list[Any] | None, ledger: Ledger) -> list[Message]:
    """Return messages whose calls have no null for an argument that their tool does not declare.

    Arrow fills them in: it gives the calls of all tools the same arguments.
    """
    functions = [tool.get("function") or {} for tool in tools or []]
    declared = {
        function.get("name"): set(properties)
        for function in functions
        if isinstance(parameters := function.get("parameters"), dict)
        and isinstance(properties := parameters.get("properties"), dict)
    }
    if not declared:
        return messages
    return [
        {**m, "tool_calls": [_undeclared_dropped(call, declared, ledger) for call in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def _undeclared_dropped(call: dict[str, Any], declared: dict[Any, set[str]], ledger: Ledger) -> dict[str, Any]:
    function = call.get("function", call)
    given = function["arguments"]
    known = declared.get(function["name"], set(given))
    arguments = {key: value for key, value in given.items() if value is not None or key in known}
    if len(arguments) == len(given):
        return call
    ledger.convert("tool_calls", "tool calls without the nulls of other tools' arguments", call)
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
