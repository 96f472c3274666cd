"""Decode JSON piece by piece, strictly: a value, or the values of a text that need not be in memory as a whole.

text = JsonText(pieces)          text.next_character() == "["
text.value("a.json:row 1")       {"prompt": "2+2?", "completion": "4"}
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from lora_ft.data.rows import RowError, excerpt
from lora_ft.data.text_files import lines
from lora_ft.errors import DataError

# An escaped half of a surrogate pair. json accepts it without its other half; tokenizers fail on it.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_PIECE = 2**16
_LONGEST_LITERAL = 16  # longer than -Infinity, \uXXXX and the other pieces of JSON that cannot be cut


class JsonText:
    """The text of a file, of which the part from `begin` on is in memory; `position` is the next character to read."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.position, self.begin = pieces, "", 0, 0
        self.has_surrogates = False  # of the last value
        self._line, self._column, self._counted = 1, 0, 0  # line and column of text[_counted]

    def all_lines(self) -> Iterator[str]:
        """Return the lines of the whole file; none of it may be dropped before."""
        return lines(chain([self.text], self.pieces))

    def next_character(self) -> str:
        """Move to the next character that is not a blank, and return it; "" at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.position)
            self.position = blanks.end() if blanks else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def skip(self, expected: str) -> None:
        """Move past a character. Raises JSONDecodeError if another one is there."""
        if self.next_character() != expected:
            raise json.JSONDecodeError(f"Expecting '{expected}'", self.text, self.position)
        self.position += 1

    def value(self, source: str) -> object:
        """Decode the value at `position` and move past it. Raises JSONDecodeError, and DataError as `parse_json`."""
        self.next_character()
        while True:
            try:
                value, end = _decoded(_DECODER.raw_decode, self.text, self.position)
                is_cut = end == len(self.text) and self.text[end - 1] not in '}]"'  # a number may go on
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LONGEST_LITERAL
                if is_cut and self._grow():
                    continue
                raise
            except RowError as error:
                shown = self.text[self.position :] if error.shown is None else error.shown
                raise DataError(f"{source}: {excerpt(error)}: {excerpt(shown)}") from None
            if not is_cut or not self._grow():
                self.has_surrogates = bool(SURROGATE.search(self.text, self.position, end))
                self.position = end
                return value

    def line(self) -> int:
        """Return the line of `position`."""
        self._count(self.position)
        return self._line

    def place(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Return the line and column of an error in `text`."""
        before = error.doc[self._counted : error.pos]
        if newlines := before.count("\n"):
            return self._line + newlines, len(before) - before.rindex("\n")
        return self._line, self._column + len(before) + 1

    def _count(self, position: int) -> None:
        passed = self.text[self._counted : position]
        if newlines := passed.count("\n"):
            self._line += newlines
            self._column = len(passed) - passed.rindex("\n") - 1
        else:
            self._column += len(passed)
        self._counted = position

    def _grow(self) -> bool:
        """Drop what is before `begin`, and double the rest; return False at the end of the file."""
        self._count(max(self.begin, self._counted))
        parts = [self.text[self.begin :]]
        missing = max(len(parts[0]), _PIECE)
        for piece in self.pieces:
            parts.append(piece)
            missing -= len(piece)
            if missing <= 0:
                break
        self.text = "".join(parts)
        self.position -= self.begin
        self._counted -= self.begin
        self.begin = 0
        return len(parts) > 1


def parse_json(text: str) -> object:
    """Decode one JSON value.

    Raises JSONDecodeError, and RowError for JSON that cannot be a row: a key that occurs twice in an object, which
    would lose a value silently, an integer too long for Python, and nesting too deep for it.
    """
    return _decoded(_DECODER.decode, text)


def _decoded(decode: Any, *arguments: Any) -> Any:
    try:
        return decode(*arguments)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise RowError("number", f"cannot be read: {error}") from None
    except RecursionError:
        raise RowError("row", "is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowError(twice, "key occurs twice in one object", pairs)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # built once: json.loads with a hook builds one per call
