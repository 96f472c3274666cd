"""The types of this folder: the row of a file, the example made of it, and the ledger of bad rows.

("chat.jsonl:12", {"prompt": "2+2?", "completion": "4"})          as a file holds it
Row("chat.jsonl:12", messages=[{"role": "user", ...}, {"role": "assistant", ...}], answer="4", ...)
Example(ids=[1, 9, 4, 2], supervised=[False, False, True, True], source="chat.jsonl:12", ...)

chat.jsonl:13: completion: is empty: {"prompt": "2+3?", "completion": ""}
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.errors import DataError

MOST_BAD_ROWS = 20
LONGEST_EXCERPT = 120
_LONGEST_REASON = 300  # some quote the row
# Unicode's categories of what has no shape. What Python's tables lack (Cn) may be a new emoji, and private use has one.
_UNSEEN = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))

Message = dict[str, Any]

# What ends a prompt that no chat template and no user marks the end of: Alpaca's heading, which base models have seen.
ANSWER_CUE = "\n\n### Response:\n"


Record = tuple[str, dict[str, Any]]
"""A row as its file holds it: its source, file:line, and its columns."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of any format: a chat, a prompt with its answer, or a text.

    source: file and line, for messages about the row.
    messages: the chat for the tokenizer's template; empty for plain text.
    plain_prompt: the text before `answer` where no template is used; None if only a template can render the row.
    answer: the last answer, or the whole text.
    context: indices of assistant messages that are not learned.
    excluded: indices of messages, of any role, that the row itself marks as not learned.
    """

    source: str
    messages: list[Message]
    answer: str
    plain_prompt: str | None = None
    context: frozenset[int] = frozenset()
    excluded: frozenset[int] = frozenset()
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Example:
    """One document of tokens, from the tokenizer to packing.

    ids: int32 [length].
    supervised: bool [length]; True if token i is a target, predicted from token i - 1; index 0 never is.
    source: file and line of its row. row: index of its row among those that were read.
    prompt_end: tokens before the first answer, which may be cut. answer_start: tokens before the last answer; 0 if
    there is no prompt to answer.
    group: examples of one group, a number that is unique in the dataset, stay in one micro-batch, next to each other;
    None: the example stands alone.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    source: str
    row: int = 0
    prompt_end: int = 0
    answer_start: int = 0
    group: int | None = None


class RowError(Exception):
    """A fault of one row, raised where the source is not known, and caught where it is, for the ledger.

    name: of the field, message or column at fault. reason: what is wrong with it. shown: the part of the row that
    it is about, where the reader would not see it at once.
    """

    def __init__(self, name: str, reason: str, shown: object = None) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.shown = name, reason, shown


@dataclass
class Ledger:
    """Bad rows and rows left out on purpose, so that rows in = rows out + rows named here."""

    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add_bad(self, source: str, name: str, reason: str, shown: object) -> None:
        """Note a bad row; raise DataError at once when MOST_BAD_ROWS are known."""
        why = f"{excerpt(name)}: {excerpt(reason, longest=_LONGEST_REASON)}"
        self.bad.append(f"{printable(source)}: {why}: {excerpt(shown)}")
        if len(self.bad) == MOST_BAD_ROWS:
            self.raise_bad(" (stopped there)")

    def raise_bad(self, suffix: str = "") -> None:
        """Raise one DataError that lists every bad row by file and line, if there is any."""
        if self.bad:
            count = "1 bad row" if len(self.bad) == 1 else f"{len(self.bad)} bad rows"
            raise DataError(f"{count}{suffix}:\n" + "\n".join(f"  {line}" for line in sorted(self.bad, key=_by_number)))


def _by_number(line: str) -> list[str | int]:
    """a.jsonl:9 before a.jsonl:10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", line))]


def is_blank(text: str) -> bool:
    """Return True if a text shows nothing: blanks, and characters without a shape such as NUL or U+200B."""
    return all(unicodedata.category(c) in _UNSEEN for c in text)


def printable(text: str) -> str:
    """The text with a sign for each character that a terminal could obey or not write."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def excerpt(shown: object, near: int = 0, longest: int = LONGEST_EXCERPT) -> str:
    """At most `longest` printable characters of a value, around position `near`."""
    start = max(0, near - longest // 2)
    window = str(shown)[start : start + longest + 1]
    text = printable(" ".join(window.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."
