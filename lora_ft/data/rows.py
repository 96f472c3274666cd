"""Define the types that the data modules share: a row, the example made of it, and the ledger of bad rows.

("chat.jsonl:12", {"prompt": "2+2?", "completion": "4"})          as read from a file
Row("chat.jsonl:12", messages=[{"role": "user", ...}, {"role": "assistant", ...}], answer="4", ...)
Example(ids=[1, 9, 4, 2], supervised=[False, False, True, True], source="chat.jsonl:12", ...)

chat.jsonl:13: completion: is empty: {"prompt": "2+3?", "completion": ""}
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft.errors import DataError

MOST_BAD_ROWS = 20
LONGEST_EXCERPT = 120
_LONGEST_REASON = 300  # some reasons quote the row
_MOST_SOURCES = 5  # listed for one reason, besides the first
_INDEX = re.compile(r"[0-9]+")  # message 3 and messages[1]: the place in the row is not part of the reason
# Unicode categories of characters without a visible glyph. Unassigned (Cn) is not one of them: it may be an emoji that
# is newer than Python's tables. Private use (Co) is not either: fonts define its glyphs.
_INVISIBLE = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))

Message = dict[str, Any]

# Ends a prompt if neither a chat template nor the user's own template does. Base models have seen Alpaca's heading.
ANSWER_CUE = "\n\n### Response:\n"


Record = tuple[str, dict[str, Any]]
"""A row as read from its file: its source (file:line) and its columns."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of any format: a chat, a prompt with its answer, or a text.

    source: file and line, for messages about the row.
    messages: the chat for the tokenizer's template; empty for plain text.
    plain_prompt: the text before `answer` if no template is used; None if only a template can render the row.
    answer: the last answer, or the whole text.
    context: indices of assistant messages that are not supervised.
    excluded: indices of messages, of any role, that the row itself marks as not to be learned.
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
    supervised: bool [length]; True if token i is a target, which is predicted from token i - 1; always False at 0.
    source: file and line of its row. row: index of its row among those that were read.
    prompt_end: number of tokens before the first answer; these may be truncated.
    answer_start: number of tokens before the last answer; 0 if there is no prompt.
    weights: float32 [length], factors of the loss of supervised tokens, 0 elsewhere; None if all factors are 1.
    group: examples with the same group, a number unique in the dataset, stay adjacent in one micro-batch; None: the
    example is not in a group.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    source: str
    row: int = 0
    prompt_end: int = 0
    answer_start: int = 0
    group: int | None = None
    weights: NDArray[np.float32] | None = None

    @property
    def loss_weights(self) -> NDArray[np.float32]:
        """The weights, or 1 for each supervised token and 0 elsewhere if there are none."""
        return self.supervised.astype(np.float32) if self.weights is None else self.weights


class RowError(Exception):
    """An error in one row, raised where its source is not known; a caller that knows it adds the row to the ledger.

    name: the wrong field, message or column. reason: what is wrong with it. shown: the part of the row to quote; None
    if the caller chooses it.
    """

    def __init__(self, name: str, reason: str, shown: object = None) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.shown = name, reason, shown


class LeftOut(Exception):
    """A row that a setting leaves out; its text is the reason that the report counts, as in "3 without an answer"."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: file and line, the wrong field, the reason, and an excerpt, all printable."""

    source: str
    name: str
    reason: str
    shown: str


@dataclass
class Ledger:
    """Bad rows, and counts of rows left out on purpose: every row read is in the dataset or in the ledger.

    converted: counts of what had one meaning and was brought to the usual form. strict: refuse it instead, as
    `data.strict` says.
    """

    strict: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)

    def convert(self, name: str, what: str, shown: object = None) -> None:
        """Count a conversion, as in `convert("tools", "tools read from JSON text")`. Raises RowError if strict."""
        if self.strict:
            raise RowError(name, f"needs a conversion ({what}), which data.strict=true refuses", shown)
        self.converted[what] += 1

    def count(self, left_out: Mapping[str, int], converted: Mapping[str, int]) -> None:
        """Add counts of rows that were rendered elsewhere, or earlier."""
        self.left_out.update(left_out)
        self.converted.update(converted)

    def add_bad(self, source: str, name: str, reason: str, shown: object) -> None:
        """Record a bad row. Raises DataError once there are MOST_BAD_ROWS."""
        reason = excerpt(reason, longest=_LONGEST_REASON)
        self.bad.append(BadRow(printable(source), excerpt(name), reason, excerpt(shown)))
        if len(self.bad) == MOST_BAD_ROWS:
            self.raise_bad(" (stopped there)")

    @property
    def is_full(self) -> bool:
        """True once there are so many bad rows that reading stops."""
        return len(self.bad) >= MOST_BAD_ROWS

    def take(self) -> "Ledger":
        """Return the contents as a ledger of their own, and empty this one."""
        taken = Ledger(self.strict, Counter(self.left_out), Counter(self.converted), list(self.bad))
        self.left_out.clear()
        self.converted.clear()
        self.bad.clear()
        return taken

    def add(self, other: "Ledger") -> None:
        """Add the contents of a ledger of later rows. Raises DataError once there are MOST_BAD_ROWS bad rows."""
        self.left_out.update(other.left_out)
        self.converted.update(other.converted)
        for line in other.bad:
            self.bad.append(line)
            if self.is_full:
                self.raise_bad(" (stopped there)")

    def raise_bad(self, suffix: str = "") -> None:
        """Raise one DataError with each reason once, the first row that it holds for, and the others, if there are any.

        a.jsonl:1: output: must be text, got list: {"instruction": "Add.", "output": [4]}
          and 3 more: line 2, line 5, line 9
        """
        if not self.bad:
            return
        count = "1 bad row" if len(self.bad) == 1 else f"{len(self.bad)} bad rows"
        groups: dict[tuple[str, str], list[BadRow]] = {}
        for row in sorted(self.bad, key=lambda row: _by_number(row.source)):
            groups.setdefault((_INDEX.sub("", row.name), row.reason), []).append(row)
        raise DataError(
            f"{count}{suffix}:" + "".join(f"\n  {line}" for rows in groups.values() for line in _lines(rows))
        )


def _lines(rows: list[BadRow]) -> Iterator[str]:
    """Yield the lines about rows with the same reason."""
    first, *others = rows
    yield f"{first.source}: {first.name}: {first.reason}: {first.shown}"
    if others:
        listed = ", ".join(_beside(row.source, first.source) for row in others[:_MOST_SOURCES])
        more = ", ..." if len(others) > _MOST_SOURCES else ""
        yield f"  and {len(others)} more: {listed}{more}"


def _beside(source: str, first: str) -> str:
    """Return the line or row of a source in the same file as the first, or the whole source."""
    file, _, place = source.rpartition(":")
    if file != first.rpartition(":")[0]:
        return source
    return f"line {place}" if place.isdigit() else place


def _by_number(source: str) -> list[str | int]:
    """Return a sort key that puts a.jsonl:9 before a.jsonl:10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", source))]


def is_blank(text: str) -> bool:
    """Return True if no character of a text is visible: only whitespace, NUL, U+200B and the like."""
    return all(unicodedata.category(c) in _INVISIBLE for c in text)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, the longest first; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def printable(text: str) -> str:
    """Replace each character that a terminal would interpret or cannot show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def excerpt(shown: object, near: int = 0, longest: int = LONGEST_EXCERPT) -> str:
    """Return at most `longest` printable characters of a value, around position `near`."""
    start = max(0, near - longest // 2)
    window = str(shown)[start : start + longest + 1]
    text = printable(" ".join(window.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."
