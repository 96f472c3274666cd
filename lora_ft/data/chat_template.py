"""Rows as the text that a model reads: by the tokenizer's own chat template, or plain.

A row becomes one `Turn` for each answer that is learned: the text that stands before the answer when the model
is asked for it, and the same text with the answer.

    prompt   <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n
    through  <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2

from lora_ft import config
from lora_ft.config import TrainOn
from lora_ft.data import template_checks
from lora_ft.data.rows import ANSWER_CUE, Ledger, Message, Row, RowError, excerpt
from lora_ft.data.template_checks import Trials
from lora_ft.errors import ConfigError, SecurityError

# A template refuses a chat by raise_exception (TemplateError), trips over a value that it does not expect, or becomes
# no Python (SyntaxError: more than twenty loops inside of one another).
_TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, SyntaxError, RecursionError, MemoryError,
)  # fmt: skip

# Llama 3's templates write a date into the system turn: this one, or today's where they find a clock. Rows must not
# change overnight, so they get the date that Meta's templates fall back on. A template that asks the clock under no
# such name still does: transformers lets no caller replace its clock.
_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Turn:
    """prompt: all that precedes the answer. through: the same and the answer, with what the template puts after it.

    answer: the message itself, for messages about it. plain: no template wrote begin and end of the text.
    """

    prompt: str
    through: str
    answer: object
    plain: bool = False


def turns(rows: Iterable[Row], data: config.Data, tokenizer: Any, ledger: Ledger) -> Iterator[tuple[int, list[Turn]]]:
    """Render rows; yield each good one's index and turns. Faults of a row go into the ledger.

    Raises ConfigError if the settings and the tokenizer cannot render the rows at all.
    """
    control = control_tokens(tokenizer)
    if found := control.search(data.system or ""):
        raise ConfigError(f"data.system holds the control token {found[0]}")
    has_template = bool(tokenizer.chat_template)
    trials = Trials(tokenizer, lambda messages, prompt: _rendered(messages, tokenizer, prompt))
    for index, row in enumerate(rows):
        if row.messages and has_template:
            try:
                yield index, _chat(row, data, tokenizer, control, trials)
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
    """A pattern of the tokenizer's special tokens, longest first; without any it matches nothing."""
    tokens = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _chat(row: Row, data: config.Data, tokenizer: Any, control: re.Pattern[str], trials: Trials) -> list[Turn]:
    _refuse_control_tokens(row, control)
    messages = row.messages
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    roles = tuple([message["role"] for message in messages])
    moved = len(messages) - len(row.messages)
    learned = [i + moved for i in _learned(row, data.train_on)]

    def turn(form: list[Message], answer: int) -> Turn:
        prompt = _rendered(form[:answer], tokenizer, True, row.tools)
        through = _rendered(form[: answer + 1], tokenizer, False, row.tools)
        template_checks.check(form, answer, prompt, through, row.tools)
        trials.check(roles[: answer + 1])
        return Turn(prompt, through, form[answer].get("content") or form[answer])

    refused: list[RowError] = []
    for form in _forms(messages):
        try:
            return [turn(form, i) for i in learned]
        except RowError as error:
            refused.append(error)
    raise refused[0]


def _refuse_control_tokens(row: Row, control: re.Pattern[str]) -> None:
    """RowError for a control token in a message or tool: the tokenizer would read it as the end of a turn."""
    for message in row.messages:
        shown = message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False, default=str)
        if found := control.search(shown):
            raise RowError("content", f"holds the control token {found[0]}", excerpt(shown, near=found.start()))
    if row.tools and (found := control.search(json.dumps(row.tools, ensure_ascii=False, default=str))):
        raise RowError("tools", f"holds the control token {found[0]}", row.tools)


def _learned(row: Row, train_on: TrainOn) -> list[int]:
    """The indices of the answers that are learned, at least one. With train_on=all the last stands for the row."""
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
        reason = "no answer of the row is learned: weight, train or loss excludes each that data.train_on selects"
        raise RowError("messages", reason)
    return learned


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the chat with the arguments of tool calls as objects, and then with their JSON text.

    Most templates write an object as JSON. Some join the text that OpenAI's API returns to other text.
    """
    yield messages
    if any(message.get("tool_calls") for message in messages):
        yield [
            {**m, "tool_calls": [_with_text(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m
            for m in messages
        ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_text(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False, default=str)}


def prompts(messages: list[Message], tokenizer: Any, tools: list[Any] | None) -> list[str]:
    """Render what the model is asked before it answers, in each form of tool calls that the template accepts."""
    found = []
    for form in _forms(messages):
        with contextlib.suppress(RowError):
            found.append(_rendered(form, tokenizer, True, tools))
    return found


def _rendered(messages: list[Message], tokenizer: Any, prompt: bool, tools: list[Any] | None = None) -> str:
    try:
        return render(messages, tokenizer, prompt, tools)
    except _TEMPLATE_FAULTS as error:
        raise RowError("chat template", f"refuses the row: {error}") from None


def render(messages: list[Message], tokenizer: Any, generation_prompt: bool, tools: list[Any] | None = None) -> str:
    """Render a chat by the tokenizer's own template, in Jinja's sandbox; whatever the template raises passes through.

    Raises SecurityError for a template that reaches for Python's internals.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, date_string=_DATE
            )
        )
    except jinja2.exceptions.SecurityError as error:
        raise SecurityError(f"the chat template is no template but an attack: {error}") from None


def plain_prompt(text: str, data: config.Data) -> str:
    """Lay out a question for a model without a template, as rows of this format were laid out in training."""
    if data.format is config.Format.alpaca:
        return f"### Instruction:\n{text}{ANSWER_CUE}"
    return text + ANSWER_CUE if data.prompt else text
