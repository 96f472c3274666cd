"""Rows as the text that a model reads: by the tokenizer's own chat template, or plain.

A row becomes one `Turn` for each answer that is learned: the text that stands before the answer when the model
is asked for it, and the same text with the answer.

    prompt   <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n
    through  <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2

from lora_ft import config
from lora_ft.config import TrainOn
from lora_ft.data import template_checks
from lora_ft.data.fill import Filler, is_plain
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

    answer: the message itself, for what is said about it.
    """

    prompt: str
    through: str
    answer: object


@dataclass(frozen=True, slots=True)
class Script:
    """A row's turns. answers: how many answers the row has. plain: no template wrote begin and end of the text."""

    turns: list[Turn]
    answers: int
    plain: bool


def scripts(rows: Iterable[Row], data: config.Data, tokenizer: Any, ledger: Ledger) -> Iterator[tuple[int, Script]]:
    """Render rows; yield each good one's index and script. Faults of a row go into the ledger.

    Raises ConfigError where the settings and the tokenizer cannot render the rows at all.
    """
    control = control_tokens(tokenizer)
    if found := control.search(data.system or ""):
        raise ConfigError(f"data.system holds the control token {found[0]}")
    has_template = bool(tokenizer.chat_template)
    filler = _filler(tokenizer)
    trials = Trials(tokenizer, lambda messages, prompt: _rendered(messages, tokenizer, prompt))
    for index, row in enumerate(rows):
        if row.messages and has_template:
            try:
                yield index, _chat(row, data, tokenizer, control, filler, trials)
            except RowError as error:
                ledger.add_bad(row.place, error.name, error.reason, error.shown or row.answer or row.messages[-1])
        elif row.plain_prompt is None:
            raise ConfigError(
                f"{row.place} is a chat, and the tokenizer has no chat template: give one with model.chat_template=FILE"
            )
        elif data.system:
            raise ConfigError(f"data.system needs rows that a chat template renders; {row.place} is plain text")
        else:
            yield index, Script([Turn(row.plain_prompt, row.plain_prompt + row.answer, row.answer)], 1, plain=True)


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of the tokenizer's special tokens, longest first; it matches nothing where there are none."""
    tokens = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _filler(tokenizer: Any) -> Filler | None:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None  # none, or several by name, of which transformers chooses
    variables = {**tokenizer.special_tokens_map, "date_string": _DATE}
    return Filler(template, variables, lambda messages, prompt: render(messages, tokenizer, prompt))


def _chat(
    row: Row, data: config.Data, tokenizer: Any, control: re.Pattern[str], filler: Filler | None, trials: Trials
) -> Script:
    messages, plain = row.messages, all(map(is_plain, row.messages))
    for message in messages:
        shown = message["content"] if plain else json.dumps(message, ensure_ascii=False, default=str)
        if found := control.search(shown):
            # The tokenizer would read it as the end of a turn or worse, and its rank in the mask with it.
            raise RowError("content", f"holds the control token {found[0]}", excerpt(shown, near=found.start()))
    if found := control.search(json.dumps(row.tools or "", ensure_ascii=False, default=str)):
        raise RowError("tools", f"holds the control token {found[0]}", row.tools)
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    roles = tuple([message["role"] for message in messages])
    contents = [message["content"] for message in messages] if filler and plain and not row.tools else None
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    learned = answers if data.train_on is TrainOn.answers else answers[-1:]
    if data.train_on is not TrainOn.all:
        moved = len(messages) - len(row.messages)
        learned = [i for i in learned if i - moved not in row.context]
    if not learned:
        raise RowError("weight", "no answer of the row is learned, so that it has no supervised token")

    def text(end: int, generation_prompt: bool) -> str:
        if filler and contents:
            filled = filler.text(roles[:end], contents, generation_prompt)
            if filled is not None:
                return filled
        return _rendered(messages[:end], tokenizer, generation_prompt, row.tools)

    turns = [Turn(text(i, True), text(i + 1, False), messages[i].get("content") or messages[i]) for i in learned]
    for i, turn in zip(learned, turns, strict=True):
        template_checks.check(messages, i, turn.prompt, turn.through, row.tools)
        trials.check(roles[: i + 1])
    return Script(turns, len(answers), plain=False)


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
    """What a model without a template is asked, as rows of this format were laid out when it learned."""
    if data.format is config.Format.alpaca:
        return f"### Instruction:\n{text}{ANSWER_CUE}"
    return text + ANSWER_CUE if data.prompt else text
