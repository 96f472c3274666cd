"""Find the classes of labelled rows, and read the label or labels of a row.

    rows labelled "b", "a", "b"           ->  Classes(("a", "b"), counts=(1, 2))      labels of numbers in their order
    rows labelled '["a", "b"]', '[]'      ->  Classes(("a", "b"), is_multi=True, ...)  with objective.multi_label=true

A label is the answer of a row: the column `label` of data=classify, the completion of a prompt. Classes come from
the training rows alone, so that a label of an eval row that no training row has is an error.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lora_ft.classes import Classes, listed
from lora_ft.data.rows import Row, RowError, excerpt, is_blank
from lora_ft.errors import DataError

MOST = 1000


def labels_of(row: Row, *, is_multi: bool) -> list[str]:
    """Return the labels of a row: one, or for is_multi any number of them. Raises RowError for another value."""
    text = row.answer.strip()
    if not is_multi:
        if is_blank(text):
            raise RowError("label", "is empty", row.answer)
        return [text]
    found = _parsed(text) if text.startswith("[") else [text]
    if any(is_blank(label) for label in found):
        raise RowError("label", "holds an empty label", row.answer)
    if twice := [label for label, count in Counter(found).items() if count > 1]:
        raise RowError("label", f"holds {twice[0]!r} twice", row.answer)
    return found


def _parsed(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RowError("label", f"must be a list in JSON ({error})", text) from None
    if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in found):
        raise RowError("label", "must be a list of texts or whole numbers", text)
    return [str(label).strip() for label in found]


def find(rows: Iterable[Row], given: Sequence[str], *, is_multi: bool) -> Classes:
    """Return the classes of training rows: the names given, or those that the rows have, sorted.

    Raises DataError for fewer than two classes, or more than MOST. Rows that cannot be read are not counted.
    """
    counts: Counter[str] = Counter()
    num = 0
    for row in rows:
        try:
            counts.update(labels_of(row, is_multi=is_multi))
        except RowError:  # reported with its row when examples are made
            continue
        num += 1
    names = list(given) or sorted(counts, key=_order)
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(f"a classifier needs two labels or more, and the training rows have {found}")
    if len(names) > MOST and not given:
        raise DataError(
            f"the training rows have {len(names):,} different labels, such as {excerpt(listed(names, 3))}: "
            f"a classifier has at most {MOST:,}, so this column holds answers, not labels"
        )
    return Classes(tuple(names), is_multi, tuple(counts[name] for name in names), num)


def _order(name: str) -> tuple[bool, float, str]:
    """Sort whole numbers by their value, before names."""
    is_number = name.removeprefix("-").isdecimal() and name.isascii()
    return not is_number, float(name) if is_number else math.inf, name


def index_of(label: str, classes: Classes) -> int:
    """Return the number of a label; raises RowError if it is none of the classes."""
    try:
        return classes.names.index(label)
    except ValueError:
        raise RowError("label", f"{excerpt(label)} is none of the classes {listed(classes.names)}", label) from None
