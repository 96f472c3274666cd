"""Render the answers of a chat that are learned: the prompt as at inference, the answer, and the thought in it.

prompt   <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
thought  ...<think>\\n\\n</think>\\n\\n                                     (empty: not learned)
through  ...<think>\\n\\n</think>\\n\\n4<|im_end|>\\n
"""

from dataclasses import dataclass, replace
from enum import Enum
from os.path import commonprefix
from typing import Any

from lora_ft import config
from lora_ft.data import template_checks, thoughts
from lora_ft.data.rendering import Template, forms
from lora_ft.data.rows import Message, RowError


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer to learn, rendered.

    prompt: the text before the answer. through: the prompt, the answer, and what the template writes after it.
    answer: the message itself, for errors about it. plain: True if the text was not rendered by a template.
    thought: the prompt and the thought of the answer, if the thought is not learned; "" otherwise. weight: of the
    answer in the loss.
    """

    prompt: str
    through: str
    answer: object
    plain: bool = False
    thought: str = ""
    weight: float = 1.0


class LearnedThoughts(Enum):
    """The values of `data.train_on_thoughts`."""

    every = "true"
    none = "false"
    nonempty = "nonempty"

    @classmethod
    def of(cls, data: config.Data) -> "LearnedThoughts":
        """Return the value that the settings have; YAML may give true and false as booleans."""
        return cls(str(data.train_on_thoughts).lower())


_WORD = "zqwx"
CLOSED = "answers without a thought after a prompt that opens one: an empty thought comes before them"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A turn in which all is learned, the thought of its message, and the thought that the template wrote, if any.

    closed: True if an empty thought was written before the answer because the prompt opens one.
    """

    turn: Turn
    thought: str
    found: thoughts.Found | None
    closed: bool


def best_form(
    messages: list[Message], answers: list[int], template: Template, tools: list[Any] | None
) -> tuple[thoughts.Form, list[Rendered]]:
    """Return the form of a chat that the template renders without loss, and its turns; RowError without such a form.

    A form whose thoughts the template writes between its own tags is preferred to the row's own form.
    """
    plain, errors = thoughts.canonical(messages), []
    own: tuple[thoughts.Form, list[Rendered]] | None = None
    for form in forms(messages):
        try:
            made = [_turn(form.messages, plain, i, template, tools) for i in answers]
        except RowError as error:
            errors.append(error)
            continue
        if not form.needs_tags or all(_has_tags(turn, template.tags) for turn in made):
            return form, made
        if not form.converted and own is None:
            own = form, made
    if own is None:
        raise errors[-1 if any(map(thoughts.of, messages)) else 0]  # the last form needs the least of the template
    return own


def _turn(
    form: list[Message], plain: list[Message], answer: int, template: Template, tools: list[Any] | None
) -> Rendered:
    """Render one answer; RowError if the template loses a part of the chat `plain`, or refuses its form."""
    prompt = template.rendered(form[:answer], True, tools)
    thought = thoughts.of(plain[answer])
    thoughts.refuse_in_closed(prompt, thought, template.tags, template.settable)
    through = _with_history(
        prompt, template.rendered(form[: answer + 1], False, tools), form[: answer + 1], template, tools
    )
    through, closed = thoughts.continued(prompt, through, thought)
    template_checks.check(plain, answer, prompt, through, tools)
    found = thoughts.at_start(prompt, through[len(prompt) :]) if through.startswith(prompt) else None
    shown, weight = plain[answer].get("content") or plain[answer], plain[answer].get("weight", 1.0)
    return Rendered(Turn(prompt, through, shown, weight=weight), thought, found, closed)


def _with_history(prompt: str, through: str, form: list[Message], template: Template, tools: list[Any] | None) -> str:
    """Return prompt and answer for a template that writes the messages before an answer in another way after it.

    gpt-oss drops the thought before a call once the final answer is there. The model gets a prompt that has it. The
    answer begins after the last generation prompt before the first text that depends on the answer.
    """
    if through.startswith(prompt):
        return through
    closed = template.rendered(form[:-1], False, tools)
    opening = prompt.removeprefix(closed)
    if through.startswith(closed) or opening in ("", prompt):
        return through
    same = commonprefix(  # noqa: RUF071  (character by character is right here)
        [through, template.rendered([*form[:-1], _other(form[-1])], False, tools)]
    )
    start = same.rfind(opening)
    return through if start < 0 else prompt + through[start + len(opening) :]


def _other(message: Message) -> Message:
    """Return an answer of the same form with other words."""
    other = {key: _WORD if isinstance(value, str) and key != "role" else value for key, value in message.items()}
    if calls := message.get("tool_calls"):
        named = [call.get("function", call) | {"name": _WORD} for call in calls]
        other["tool_calls"] = [
            {**call, "function": name} if "function" in call else name for call, name in zip(calls, named, strict=True)
        ]
    return other


def _has_tags(made: Rendered, known: tuple[thoughts.Tags, ...]) -> bool:
    """Return True for an answer whose thought is between tags that the template knows, or that has no thought."""
    return not made.thought or bool(made.found and made.found.text and (not known or made.found.tags in known))


def without_thought(made: Rendered, learned: LearnedThoughts) -> Turn:
    """Return the turn with the thought that is not learned."""
    found, turn = made.found, made.turn
    if learned is LearnedThoughts.every or (learned is LearnedThoughts.nonempty and not (found and not found.text)):
        return turn
    if found is None:
        if made.thought:
            reason = (
                "writes the thought between tags that are not known, so data.train_on_thoughts=false cannot find it"
            )
            raise RowError("chat template", reason, made.thought)
        return turn
    return replace(turn, thought=turn.through[: len(turn.prompt) + found.end])
