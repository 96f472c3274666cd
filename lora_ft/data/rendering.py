"""Render messages by the chat template of a tokenizer, and bring them to the forms that templates accept.

Template(tokenizer, {"enable_thinking": False}).rendered(messages, prompt=True)    "<|im_start|>user\\n2+2? ..."
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jinja2

from lora_ft.data import template_variables, thoughts
from lora_ft.data.rows import Message, RowError
from lora_ft.data.template_variables import Variables
from lora_ft.data.tool_calls import IDS_GIVEN, in_function, with_calls, with_ids
from lora_ft.errors import SecurityError

# A template may refuse a chat by raise_exception (TemplateError), fail on a value that it does not expect, or compile
# to invalid Python (SyntaxError: more than twenty nested loops).
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, SyntaxError, RecursionError, MemoryError,
)  # fmt: skip

# Llama 3's templates write a date into the system turn: `date_string`, or today if it is not given. Tokens must not
# change from day to day, so it is always given: the date that Meta's templates use without a clock. A template that
# calls strftime_now unconditionally still gets today's date; transformers has no way to replace its clock.
DATE = "26 Jul 2024"


class Template:
    """A tokenizer's chat template with values of its variables, and the tags of thoughts that it mentions."""

    def __init__(self, tokenizer: Any, variables: Variables) -> None:
        self._tokenizer, self._variables = tokenizer, variables
        self.text = str(tokenizer.chat_template)
        self.settable = template_variables.read_by(tokenizer)
        self.tags = thoughts.known_to(tokenizer.chat_template)

    def rendered(self, messages: list[Message], prompt: bool, tools: list[Any] | None = None) -> str:
        """Render a chat; RowError if the template refuses it."""
        try:
            return render(messages, self._tokenizer, prompt, tools, self._variables)
        except _TEMPLATE_ERRORS as error:
            raise RowError("chat template", f"refuses the row: {error}") from None


def forms(messages: list[Message]) -> Iterator[thoughts.Form]:
    """Yield the forms of a chat's thoughts, each with the arguments of tool calls as objects, then as JSON text.

    Most templates write an object as JSON. Some can only concatenate text, as OpenAI's API returns it. Calls without
    OpenAI's {"function": ...} are tried as they are, then within it; calls of any id, then with ids that Mistral takes.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for form in thoughts.forms(messages):
        yield form
        if not calls:
            continue
        yield replace(form, messages=with_calls(form.messages, _with_text))
        wrapped = with_calls(form.messages, in_function)
        if wrapped != form.messages:
            yield replace(form, messages=wrapped)
            yield replace(form, messages=with_calls(wrapped, _with_text))
        converted = " and ".join(filter(None, (form.converted, IDS_GIVEN)))
        yield replace(form, messages=with_ids(wrapped), converted=converted)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False, default=str)}


def prompts(messages: list[Message], tokenizer: Any, tools: list[Any] | None, variables: Variables) -> list[str]:
    """Render the prompt of a chat, once for each form of thoughts and tool calls that the template accepts."""
    template, found = Template(tokenizer, variables), []
    for form in forms(messages):
        with contextlib.suppress(RowError):
            found.append(template.rendered(form.messages, True, tools))
    return found


def thinking_switch(
    asked: list[Message], tokenizer: Any, tools: list[Any] | None, variables: Variables
) -> tuple[str | None, bool]:
    """Return the template's variable that turns thinking on and off, and True if a prompt with these values is on.

    Without such a variable, a template that opens thoughts is on unless its prompt ends with an empty one.
    """
    template = Template(tokenizer, variables)
    if not any(tags.opening in str(tokenizer.chat_template) for tags in template.tags):
        return None, False
    try:
        now = template.rendered(asked, True, tools)
    except RowError:
        return None, False  # such a chat needs another form, and has thoughts
    for name in sorted(name for name in template.settable if "think" in name):
        on, off = (
            Template(tokenizer, {**variables, name: value}).rendered(asked, True, tools) for value in (True, False)
        )
        if on != off:
            return name, now == on and not thoughts.closed_by(now, template.tags)
    return None, not thoughts.closed_by(now, template.tags)


def render(
    messages: list[Message],
    tokenizer: Any,
    generation_prompt: bool,
    tools: list[Any] | None = None,
    variables: Variables | None = None,
) -> str:
    """Render a chat by the tokenizer's template in Jinja's sandbox, with values of the template's variables.

    Raises SecurityError for a template that accesses Python internals; other exceptions of the template pass through.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **({"date_string": DATE} | dict(variables or {})),
            )
        )
    except jinja2.exceptions.SecurityError as error:
        raise SecurityError(f"the chat template accesses Python internals: {error}") from None
