"""Render rows as the text that a model reads: by the tokenizer's chat template, or as plain text.

A row becomes one `Turn` for each answer that is learned: the prompt, as at inference, and the prompt with the answer.

    prompt   <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n
    through  <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2

from lora_ft import config
from lora_ft.config import TrainOn, Turns
from lora_ft.data import template_checks
from lora_ft.data.fitting import Fitted, fit
from lora_ft.data.messages import with_system
from lora_ft.data.rows import ANSWER_CUE, Ledger, LeftOut, Message, Row, RowError, any_of, excerpt
from lora_ft.data.template_checks import Trials
from lora_ft.errors import ConfigError, SecurityError

# A template may refuse a chat by raise_exception (TemplateError), fail on a value that it does not expect, or compile
# to invalid Python (SyntaxError: more than twenty nested loops).
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, SyntaxError, RecursionError, MemoryError,
)  # fmt: skip

# Llama 3's templates write a date into the system turn: `date_string`, or today if it is not given. Tokens must not
# change from day to day, so it is always given: the date that Meta's templates use without a clock. A template that
# calls strftime_now unconditionally still gets today's date; transformers has no way to replace its clock.
_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer to learn, rendered.

    prompt: the text before the answer. through: the prompt, the answer, and what the template writes after it.
    answer: the message itself, for errors about it. plain: True if the text was not rendered by a template.
    """

    prompt: str
    through: str
    answer: object
    plain: bool = False


def turns(rows: Iterable[Row], data: config.Data, tokenizer: Any, ledger: Ledger) -> Iterator[tuple[int, list[Turn]]]:
    """Render rows; yield the index and the turns of each good one. Bad rows go into the ledger.

    Raises ConfigError if the tokenizer cannot render rows of this format, or not with these settings.
    """
    control = control_tokens(tokenizer)
    if found := control.search(data.system or ""):
        raise ConfigError(f"data.system holds the control token {found[0]}")
    has_template = bool(tokenizer.chat_template)
    trials = trials_of(tokenizer)
    for index, row in enumerate(rows):
        if row.messages and has_template:
            try:
                yield index, _chat(row, data, tokenizer, control, trials, ledger)
            except LeftOut as reason:
                ledger.left_out[str(reason)] += 1
            except RowError as error:
                ledger.add_bad(row.source, error.name, error.reason, error.shown or row.answer or row.messages[-1])
        elif row.plain_prompt is None:
            raise ConfigError(
                f"{row.source} is a chat, and the tokenizer has no chat template: give one with "
                "model.chat_template=FILE"
            )
        elif data.system:
            raise ConfigError(f"data.system needs rows that a chat template renders; {row.source} is plain text")
        else:
            yield index, [Turn(row.plain_prompt, row.plain_prompt + row.answer, row.answer, plain=True)]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the tokenizer's special tokens."""
    return any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def trials_of(tokenizer: Any) -> Trials:
    """Return the trials of a tokenizer's chat template."""
    return Trials(tokenizer, lambda messages, prompt: _rendered(messages, tokenizer, prompt))


def _chat(
    row: Row, data: config.Data, tokenizer: Any, control: re.Pattern[str], trials: Trials, ledger: Ledger
) -> list[Turn]:
    _refuse_control_tokens(row, control)
    chat, answers = fitted(row, data, trials)
    if chat.repairs and data.turns is Turns.drop:
        raise LeftOut(chat.repairs[0][0].value)
    for _, what in chat.repairs:
        ledger.convert("messages", what, row.messages)
    roles = tuple([message["role"] for message in chat.messages])

    def turn(form: list[Message], answer: int) -> Turn:
        prompt = _rendered(form[:answer], tokenizer, True, row.tools)
        through = _rendered(form[: answer + 1], tokenizer, False, row.tools)
        template_checks.check(form, answer, prompt, through, row.tools)
        trials.check(roles[: answer + 1])
        return Turn(prompt, through, form[answer].get("content") or form[answer])

    errors: list[RowError] = []
    for form in _forms(chat.messages):
        try:
            return [turn(form, i) for i in answers]
        except RowError as error:
            errors.append(error)
    raise errors[0]


def fitted(row: Row, data: config.Data, trials: Trials) -> tuple[Fitted, list[int]]:
    """Return the chat of a row as its template renders it, and the indices of the answers to render."""
    messages = with_system(row.messages, data.system)
    offset = len(messages) - len(row.messages)
    if data.turns is Turns.strict:
        chat = Fitted(messages, list(range(len(messages))), [])
    else:
        chat = fit(messages, trials.accepts)
    places = {i: chat.index[i + offset] for i, message in enumerate(row.messages) if message["role"] == "assistant"}
    if mixed := {places[i] for i in row.context} & {place for i, place in places.items() if i not in row.context}:
        reason = "takes no two assistant messages in a row, and these cannot be joined: only one of them is learned"
        raise RowError("chat template", reason, chat.messages[min(place for place in mixed if place is not None)])
    answers = {places[i] for i in learned_answers(row, data.train_on)}
    return chat, sorted(place for place in answers if place is not None)


def answer_of(row: Row, data: config.Data, tokenizer: Any) -> str:
    """Return the last answer of a row in its rendered form: messages of the assistant may be joined."""
    if not tokenizer.chat_template or len(row.messages) < 2 or row.messages[-2]["role"] != "assistant":
        return row.answer
    return str(fitted(row, data, trials_of(tokenizer))[0].messages[-1]["content"])


def fitted_prompt(messages: list[Message], turns: Turns, tokenizer: Any) -> list[Message]:
    """Return the messages of a prompt, with a system message where training put it. RowError if they do not fit."""
    return messages if turns is Turns.strict else fit(messages, trials_of(tokenizer).accepts).messages


def _refuse_control_tokens(row: Row, control: re.Pattern[str]) -> None:
    """Raise RowError for a control token in a message or tool, which the tokenizer would read as the end of a turn."""
    for message in row.messages:
        shown = message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False, default=str)
        if found := control.search(shown):
            raise RowError("content", f"holds the control token {found[0]}", excerpt(shown, near=found.start()))
    if row.tools and (found := control.search(json.dumps(row.tools, ensure_ascii=False, default=str))):
        raise RowError("tools", f"holds the control token {found[0]}", row.tools)


def learned_answers(row: Row, train_on: TrainOn) -> list[int]:
    """Return the indices of the answers to render, at least one; with train_on=all the last covers the whole row."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if train_on is TrainOn.all:
        if row.excluded:
            first = min(row.excluded)
            reason = (
                f"message {first + 1} has weight 0, train false or loss false, and data.train_on=all learns every "
                "message: choose data.train_on=answers"
            )
            raise RowError("messages", reason, row.messages[first])
        return answers[-1:]
    chosen = answers if train_on is TrainOn.answers else answers[-1:]
    learned = [i for i in chosen if i not in row.context]
    if not learned:
        reason = "no answer is learned: weight, train or loss excludes every answer that data.train_on selects"
        raise RowError("messages", reason)
    return learned


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the chat with the arguments of tool calls as objects, then with the arguments as JSON text.

    Most templates write an object as JSON. Some can only concatenate text, as OpenAI's API returns it. Calls without
    OpenAI's {"function": ...} are tried as they are, then within it.
    """
    yield messages
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    if calls:
        yield _with_calls(messages, _with_text)
    if any("function" not in call for call in calls):
        wrapped = _with_calls(messages, _wrapped)
        yield wrapped
        yield _with_calls(wrapped, _with_text)


def _with_calls(messages: list[Message], change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Message]:
    return [
        {**m, "tool_calls": [change(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _wrapped(call: dict[str, Any]) -> dict[str, Any]:
    return call if "function" in call else {"type": "function", "function": call}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False, default=str)}


def prompts(messages: list[Message], tokenizer: Any, tools: list[Any] | None) -> list[str]:
    """Render the prompt of a chat, once for each form of tool calls that the template accepts."""
    found = []
    for form in _forms(messages):
        with contextlib.suppress(RowError):
            found.append(_rendered(form, tokenizer, True, tools))
    return found


def _rendered(messages: list[Message], tokenizer: Any, prompt: bool, tools: list[Any] | None = None) -> str:
    try:
        return render(messages, tokenizer, prompt, tools)
    except _TEMPLATE_ERRORS as error:
        raise RowError("chat template", f"refuses the row: {error}") from None


def render(messages: list[Message], tokenizer: Any, generation_prompt: bool, tools: list[Any] | None = None) -> str:
    """Render a chat by the tokenizer's template in Jinja's sandbox.

    Raises SecurityError for a template that accesses Python internals; other exceptions of the template pass through.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, date_string=_DATE
            )
        )
    except jinja2.exceptions.SecurityError as error:
        raise SecurityError(f"the chat template accesses Python internals: {error}") from None


def plain_prompt(text: str, data: config.Data) -> str:
    """Return the prompt for a model without a chat template, laid out as the rows of this format are in training."""
    if data.format is config.Format.alpaca:
        return f"### Instruction:\n{text}{ANSWER_CUE}"
    return text + ANSWER_CUE if data.prompt else text
