"""Bring the turns of a chat into an order that chat templates expect, as far as the row alone decides.

    user assistant user         ends without an answer: the last message is cut
    assistant user assistant    the first answer is context, which is not learned

data.turns=strict refuses rows with such turns, drop leaves them out, repair brings them into order. `fitting` does what
depends on the template, for the prompts of inference too.
"""

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum

from lora_ft.config import Turns
from lora_ft.data.rows import Ledger, LeftOut, Row, RowError

MAY_FOLLOW = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}  # fmt: skip


class Disorder(Enum):
    """Unusual turns of a chat. The report writes the values after a count, as in "3 ending without an answer"."""

    end = "ending without an answer"
    opening = "beginning with the assistant"
    repeated = "with two messages of one role in a row"
    later_system = "with a system message after the first message"
    no_system = "with a system message, which the chat template does not take"
    interrupted = "with a user message after the result of a tool"
    stray_tool = "with the result of a tool that no message called"


def arrange(row: Row, turns: Turns, ledger: Ledger) -> Row:
    """Return a row whose chat ends with an answer, and whose answers before the first user are context.

    Raises RowError for turns that `turns` refuses or that cannot be repaired, LeftOut for rows that it leaves out.
    """
    roles = [message["role"] for message in row.messages]
    found = list(_disorders(roles)) if roles else []
    if not found:
        return row
    if turns is Turns.strict:
        raise _error(roles, found[0][0], "data.turns=repair reads such chats, drop leaves them out")
    if turns is Turns.drop:
        raise LeftOut(found[0][1].value)
    end = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0)
    first = roles.index("user") if "user" in roles else len(roles)
    if not any(role == "assistant" for role in roles[first:]):
        reason = "no assistant message follows a user message; data.turns=drop leaves such rows out"
        raise RowError("messages", reason)
    if stray := [place for place, disorder in found if disorder is Disorder.stray_tool and place < end]:
        raise _error(roles, stray[0], "data.turns=drop leaves such rows out")
    if end < len(roles):
        ledger.convert("messages", "chats cut after their last answer", row.messages[end:])
    context = {i for i in row.context if i < end} | {i for i in range(first) if roles[i] == "assistant"}
    return replace(
        row,
        messages=row.messages[:end],
        answer=row.messages[end - 1].get("content") or "",
        context=frozenset(context),
        excluded=frozenset(i for i in row.excluded if i < end),
    )


def _disorders(roles: list[str]) -> Iterator[tuple[int, Disorder]]:
    """Yield the places where roles are unusual, in order; nothing for chats that all templates expect."""
    last = ""
    for place, role in enumerate(roles):
        if role not in MAY_FOLLOW[last]:
            yield place, _disorder(role, last, roles[:place])
        last = role
    if last != "assistant":
        yield len(roles), Disorder.end


def _disorder(role: str, last: str, before: list[str]) -> Disorder:
    """Name what is unusual about a role after the roles `before`, of which `last` is the last."""
    if role == "tool":
        return Disorder.stray_tool
    if role == "system":
        return Disorder.repeated if {*before} == {"system"} else Disorder.later_system
    if role == last:
        return Disorder.repeated
    if role == "assistant":
        return Disorder.later_system if "user" in before else Disorder.opening
    return Disorder.interrupted


def _error(roles: list[str], place: int, remedy: str) -> RowError:
    if place == len(roles):
        reason = f"the chat must end with an assistant message, it ends with {roles[-1]}; {remedy}"
        return RowError(f"message {place}", reason)
    position = f"follow {roles[place - 1]}" if place else "be first"
    return RowError(f"message {place + 1}", f"{roles[place]} may not {position}; {remedy}")
