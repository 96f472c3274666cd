"""Render rows as the text that a model reads: by the tokenizer's chat template, or as plain text.

A row becomes one `Turn` for each answer that is learned: the prompt, as at inference, and the prompt with the answer.

    prompt   <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n
    through  <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lora_ft import config
from lora_ft.config import TrainOn, Turns
from lora_ft.data import template_variables
from lora_ft.data.answers import CLOSED, LearnedThoughts, Turn, best_form, without_thought
from lora_ft.data.fitting import Fitted, fit
from lora_ft.data.messages import with_system
from lora_ft.data.rendering import Template
from lora_ft.data.rows import ANSWER_CUE, Ledger, LeftOut, Message, Row, RowError, any_of, excerpt
from lora_ft.data.template_checks import Trials
from lora_ft.errors import ConfigError


def turns(
    rows: Iterable[Row], data: config.Data, tokenizer: Any, ledger: Ledger, trials: Trials
) -> Iterator[tuple[int, list[Turn]]]:
    """Render rows; yield the index and the turns of each good one. Bad rows go into the ledger.

    Raises ConfigError if the tokenizer cannot render rows of this format, or not with these settings.
    """
    control = control_tokens(tokenizer)
    if found := control.search(data.system or ""):
        raise ConfigError(f"data.system holds the control token {found[0]}")
    if data.train_on is TrainOn.all and LearnedThoughts.of(data) is LearnedThoughts.none:
        raise ConfigError("data.train_on=all learns every token, but data.train_on_thoughts=false leaves out thoughts")
    template_variables.check(tokenizer, data.template)
    template = Template(tokenizer, data.template)
    for index, row in enumerate(rows):
        if row.messages and tokenizer.chat_template:
            try:
                yield index, _chat(row, data, template, control, trials, ledger)
            except LeftOut as reason:
                ledger.left_out[str(reason)] += 1
            except RowError as error:
                ledger.add_bad(row.source, error.name, error.reason, error.shown or row.answer or row.messages[-1])
        elif row.plain_prompt is None:
            raise ConfigError(
                f"{row.source} is a chat, and the tokenizer has no chat template: give one with "
                "model.chat_template=FILE"
            )
        elif data.system or data.template:
            name = "system" if data.system else f"template.{next(iter(data.template))}"
            raise ConfigError(f"data.{name} needs rows that a chat template renders; {row.source} is plain text")
        else:
            yield index, [Turn(row.plain_prompt, row.plain_prompt + row.answer, row.answer, plain=True)]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches the tokenizer's special tokens."""
    return any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _chat(
    row: Row, data: config.Data, template: Template, control: re.Pattern[str], trials: Trials, ledger: Ledger
) -> list[Turn]:
    _refuse_control_tokens(row, control)
    _refuse_unread_tools(row, template.text)
    chat, answers = fitted(row, data, trials)
    if chat.repairs and data.turns is Turns.drop:
        raise LeftOut(chat.repairs[0][0].value)
    for _, what in chat.repairs:
        ledger.convert("messages", what, row.messages)
    roles = tuple([message["role"] for message in chat.messages])
    form, made = best_form(chat.messages, answers, template, row.tools)
    for answer in answers:
        trials.check(roles[: answer + 1])
    if form.converted:
        ledger.convert("chat template", form.converted, row.answer)
    if sum(turn.closed for turn in made):
        ledger.convert("thought", CLOSED, row.answer)
    return [without_thought(turn, LearnedThoughts.of(data)) for turn in made]


def trials_of(tokenizer: Any, data: config.Data) -> Trials:
    """Return the trials of a tokenizer's chat template with the values of its variables."""
    return Trials(tokenizer, Template(tokenizer, data.template).rendered)


def fitted(row: Row, data: config.Data, trials: Trials) -> tuple[Fitted, list[int]]:
    """Return the chat of a row as its template renders it, and the indices of the answers to render."""
    messages = with_system(row.messages, data.system)
    offset = len(messages) - len(row.messages)
    learned = learned_answers(row, data.train_on)
    chat = None if data.turns is Turns.strict else fit(messages, trials.accepts)
    if chat is None or chat.messages is messages:
        return Fitted(messages, list(range(len(messages))), []), [i + offset for i in learned]
    places = {i: chat.index[i + offset] for i, message in enumerate(row.messages) if message["role"] == "assistant"}
    if mixed := {places[i] for i in row.context if i in places} & {
        place for i, place in places.items() if i not in row.context
    }:
        reason = "takes no two assistant messages in a row, and these cannot be joined: only one of them is learned"
        raise RowError("chat template", reason, chat.messages[min(place for place in mixed if place is not None)])
    return chat, sorted({place for i in learned if (place := places[i]) is not None})


def answer_of(row: Row, data: config.Data, trials: Trials | None) -> str:
    """Return the last answer of a row in its rendered form: messages of the assistant may be joined.

    trials: those of the tokenizer's chat template, None if it has none.
    """
    if trials is None or len(row.messages) < 2 or row.messages[-2]["role"] != "assistant":
        return row.answer
    return str(fitted(row, data, trials)[0].messages[-1]["content"])


def fitted_prompt(messages: list[Message], data: config.Data, tokenizer: Any) -> list[Message]:
    """Return the messages of a prompt, with a system message where training put it. RowError if they do not fit."""
    return messages if data.turns is Turns.strict else fit(messages, trials_of(tokenizer, data).accepts).messages


def _refuse_unread_tools(row: Row, template: str) -> None:
    """Raise RowError for tools or calls that a template does not read, with one reason for all such rows."""
    remedy = "choose a base whose chat template does, or another model.chat_template"
    if "tool_calls" not in template and any(message.get("tool_calls") for message in row.messages):
        raise RowError("chat template", f"writes no tool calls: {remedy}", row.messages)
    if row.tools and "tools" not in template:
        raise RowError("chat template", f"writes no tools: {remedy}", row.tools)


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
        weighted = [i for i, message in enumerate(row.messages) if i in row.excluded or "weight" in message]
        if weighted:
            first = weighted[0]
            what = "weight 0, train false or loss false" if first in row.excluded else "a weight other than 1"
            reason = (
                f"message {first + 1} has {what}, and data.train_on=all learns every message: choose "
                "data.train_on=answers"
            )
            raise RowError("messages", reason, row.messages[first])
        return answers[-1:]
    chosen = answers if train_on is TrainOn.answers else answers[-1:]
    learned = [i for i in chosen if i not in row.context]
    if not learned:
        reason = "no answer is learned: weight, train or loss excludes every answer that data.train_on selects"
        raise RowError("messages", reason)
    return learned


def plain_prompt(text: str, data: config.Data) -> str:
    """Return the prompt for a model without a chat template, laid out as the rows of this format are in training."""
    if data.format is config.Format.alpaca:
        return f"### Instruction:\n{text}{ANSWER_CUE}"
    return text + ANSWER_CUE if data.prompt else text
