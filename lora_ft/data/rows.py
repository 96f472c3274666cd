"""What passes from reader to tokenizer, and the ledger of the rows that could not pass.

Record("chat.jsonl:12", {"prompt": "2+2?", "completion": "4"})
Row("chat.jsonl:12", messages=[{"role": "user", ...}, {"role": "assistant", ...}], answer="4", ...)

chat.jsonl:13: completion: is empty: {"prompt": "2+3?", "completion": ""}
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.errors import DataError

MOST_BAD_ROWS = 20
LONGEST_EXCERPT = 120

Message = dict[str, Any]

# What ends a prompt that no chat template and no user marks the end of: Alpaca's heading, which base models have seen.
ANSWER_CUE = "\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its file holds it, with the place that a message about it names."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row whatever its format was: a chat, a prompt with its answer, or a text.

    messages: the chat for the tokenizer's template; empty for plain text.
    plain_prompt: the text before `answer` where no template is used; None if only a template can render the row.
    answer: the last answer, or the whole text.
    context: indices of assistant messages that are not learned.
    """

    place: str
    messages: list[Message]
    answer: str
    plain_prompt: str | None = None
    context: frozenset[int] = frozenset()
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TokenRow:
    """One document of tokens, as the model is trained or evaluated on it.

    ids: int32 [length].
    supervised: bool [length]; True where token i is a target, predicted from token i - 1; index 0 never is.
    place: of the row it was made from.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    place: str


class RowError(Exception):
    """One row's fault, raised where its place is not known and caught where it is, for the ledger.

    name: of the field, message or column at fault. reason: what is wrong with it. shown: the part of the row that
    it is about, where the reader would not see it at once.
    """

    def __init__(self, name: str, reason: str, shown: object = None) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.shown = name, reason, shown


@dataclass
class Ledger:
    """Rows that failed and rows left aside on purpose, so that rows in = rows out + rows named here."""

    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add_bad(self, place: str, name: str, reason: str, shown: object) -> None:
        """Note a bad row; raise DataError at once when MOST_BAD_ROWS are known."""
        self.bad.append(f"{place}: {name}: {reason}: {excerpt(shown)}")
        if len(self.bad) == MOST_BAD_ROWS:
            self.raise_bad(" (stopped there)")

    def raise_bad(self, suffix: str = "") -> None:
        """Raise one DataError that lists every bad row, if there is any."""
        if self.bad:
            count = "1 bad row" if len(self.bad) == 1 else f"{len(self.bad)} bad rows"
            raise DataError(f"{count}{suffix}:\n" + "\n".join(f"  {line}" for line in self.bad))


def excerpt(shown: object, near: int = 0) -> str:
    """At most LONGEST_EXCERPT printable characters of a value, around position `near`."""
    start = max(0, near - LONGEST_EXCERPT // 2)
    window = str(shown)[start : start + LONGEST_EXCERPT + 1]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(window.split()))
    return text if len(text) <= LONGEST_EXCERPT else text[: LONGEST_EXCERPT - 3] + "..."
