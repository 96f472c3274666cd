"""Bring the turns of a chat into a form that its chat template renders: in training, and in the prompts of inference.

    user user assistant              kept where the template renders both, else joined by a blank line
    user assistant system user ...   kept where the template renders it, else put before the text of the next user
    assistant user assistant         kept as context where the template renders it, else dropped
    system user assistant            put before the text of the first user where the template takes no system message

`accepts` tells if the template renders made-up chats of some roles; the same template so repairs all chats alike.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from lora_ft.data.rows import Message, RowError
from lora_ft.data.turns import MAY_FOLLOW, Disorder

Accepts = Callable[[tuple[str, ...]], bool]
"""Tells if a template renders made-up chats of these roles."""


# Made-up chats that show what a template renders.
_TAKES_SYSTEM = ("system", "user", "assistant")
_TAKES_LATER_SYSTEM = ("user", "assistant", "system", "user", "assistant")
_TAKES_OPENING = ("assistant", "user", "assistant")
_TAKES_TWO = {
    "system": ("system", "system", "user", "assistant"),
    "user": ("user", "user", "assistant", "user", "user", "assistant"),
    "assistant": ("user", "assistant", "assistant", "user", "assistant", "assistant"),
}


@dataclass(frozen=True)
class Fitted:
    """A chat as its template renders it.

    index: the place of each message of the row; None if it was dropped. Joined messages share a place.
    repairs: each disorder with what was done, in the plural, as the report counts it.
    """

    messages: list[Message]
    index: list[int | None]
    repairs: list[tuple[Disorder, str]]


def fit(messages: list[Message], accepts: Accepts) -> Fitted:
    """Return a chat of which `accepts` takes each part. Raises RowError for messages that cannot be joined.

    What is done to a message depends on the messages around it only, so the prompt of an answer is repaired as the
    whole chat is.
    """
    roles = [message["role"] for message in messages]
    regular = all(role in MAY_FOLLOW[last] for last, role in zip(["", *roles], roles, strict=False))
    if regular and (roles[0] != "system" or accepts(_TAKES_SYSTEM)):
        return Fitted(messages, list(range(len(messages))), [])
    turns = [_Turn(message, [index]) for index, message in enumerate(messages)]
    repairs: list[tuple[Disorder, str]] = []
    for repair in (_opening, _later_systems, _first_systems, _repeated):
        turns = repair(turns, accepts, repairs)
    place = {given: index for index, turn in enumerate(turns) for given in turn.given}
    return Fitted([turn.message for turn in turns], [place.get(i) for i in range(len(messages))], repairs)


@dataclass(frozen=True)
class _Turn:
    """A message, and the indices of the row's messages that it is made of."""

    message: Message
    given: list[int]

    @property
    def role(self) -> str:
        return str(self.message["role"])


_Repairs = list[tuple[Disorder, str]]


def _opening(turns: list[_Turn], accepts: Accepts, repairs: _Repairs) -> list[_Turn]:
    """Keep or drop what is before the first user message, system messages apart."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    if all(turn.role == "system" for turn in turns[:first]):
        return turns
    if accepts(_TAKES_OPENING):
        repairs.append((Disorder.opening, "chats that begin with the assistant, whose first words are not supervised"))
        return turns
    repairs.append((Disorder.opening, "chats without the assistant's first words, which the chat template refuses"))
    return [turn for turn in turns[:first] if turn.role == "system"] + turns[first:]


def _later_systems(turns: list[_Turn], accepts: Accepts, repairs: _Repairs) -> list[_Turn]:
    """Keep system messages after the first messages, or put them before the text of the next user message."""
    start = _leading_systems(turns)
    if not any(turn.role == "system" for turn in turns[start:]):
        return turns
    if accepts(_TAKES_SYSTEM) and accepts(_TAKES_LATER_SYSTEM):
        repairs.append((Disorder.later_system, "chats with a later system message, kept in its place"))
        return turns
    repairs.append((Disorder.later_system, "chats with a later system message, put into the message of a user"))
    fitted: list[_Turn] = []
    for turn in reversed(turns[start:]):  # from the end, so that several stay in their order before one question
        if turn.role == "system" and fitted and fitted[0].role == "user":
            fitted[0] = _together(turn, fitted[0], "user")
        else:
            fitted.insert(0, turn)
    return [*turns[:start], *_systems_after_users(fitted)]


def _systems_after_users(turns: list[_Turn]) -> list[_Turn]:
    """Put system messages that no user message follows behind the text of the user message before them."""
    fitted: list[_Turn] = []
    for turn in turns:
        if turn.role != "system":
            fitted.append(turn)
        elif fitted and fitted[-1].role == "user":
            fitted[-1] = _together(fitted[-1], turn, "user")
        else:
            reason = "takes no later system message, and this one is not next to a message of the user"
            raise RowError("chat template", reason, turn.message)
    return fitted


def _first_systems(turns: list[_Turn], accepts: Accepts, repairs: _Repairs) -> list[_Turn]:
    """Put the first system messages before the text of the first user message if the template takes none."""
    start = _leading_systems(turns)
    if not start or accepts(_TAKES_SYSTEM):
        return turns
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        return turns
    repairs.append((Disorder.no_system, "system messages put into the first message of the user"))
    user = turns[users[0]]
    for system in reversed(turns[:start]):
        user = _together(system, user, "user")
    return [*turns[start : users[0]], user, *turns[users[0] + 1 :]]


def _repeated(turns: list[_Turn], accepts: Accepts, repairs: _Repairs) -> list[_Turn]:
    """Keep two messages of one role in a row, or join them by a blank line."""
    fitted: list[_Turn] = []
    done: dict[str, str] = {}
    for turn in turns:
        twice = turn.role != "tool" and bool(fitted) and fitted[-1].role == turn.role
        if twice and not accepts(_TAKES_TWO[turn.role]):
            fitted[-1] = _together(fitted[-1], turn, turn.role)
            done[turn.role] = "joined by a blank line"
        else:
            fitted.append(turn)
            if twice:
                done[turn.role] = "kept as they are"
    repairs += [(Disorder.repeated, f"chats with two {role} messages in a row, {what}") for role, what in done.items()]
    if any(turn.role == "user" and last.role == "tool" for last, turn in itertools.pairwise(fitted)):
        repairs.append((Disorder.interrupted, "chats with a user message after the result of a tool"))
    return fitted


def _leading_systems(turns: list[_Turn]) -> int:
    return next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))


def _together(first: _Turn, second: _Turn, role: str) -> _Turn:
    """Join two messages by a blank line. Raises RowError if that would change the order of texts, calls or thoughts."""
    one, two = first.message, second.message
    extra = {key: value for key, value in two.items() if key not in ("role", "content", "tool_calls")}
    differing = [key for key, value in extra.items() if first.role == second.role and one.get(key) != value]
    if differing or (one.get("tool_calls") and two["content"]):
        what = differing[0] if differing else "tool_calls"
        reason = f"takes no two {role} messages in a row, and these cannot be joined because of {what}"
        raise RowError("chat template", reason, two)
    kept = one if first.role == role else two
    joined = {**kept, "content": "\n\n".join(filter(None, (one["content"], two["content"])))}
    if calls := [*(one.get("tool_calls") or []), *(two.get("tool_calls") or [])]:
        joined["tool_calls"] = calls
    return _Turn(joined, first.given + second.given)
