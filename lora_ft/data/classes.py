"""Find the classes of labelled rows, and read the label or labels of a row.

    rows labelled "b", "a", "b"           ->  Classes(("a", "b"), counts=(1, 2))      labels of numbers in their order
    rows labelled '["a", "b"]', '[]'      ->  Classes(("a", "b"), is_multi=True, ...)  with objective.multi_label=true

A label is the answer of a row: the column `label` of data=classify, the completion of a prompt. data/labels.py reads
and checks labels of rows with one each; without data.labels, and for rows with several, this module does. Classes come
from the training rows alone, so that a label of an eval row that no training row has is an error.
"""

import json
from collections import Counter
from collections.abc import Sequence

from lora_ft import config
from lora_ft.classes import Classes, listed
from lora_ft.data import labels
from lora_ft.data.rows import Row, RowError, excerpt, is_blank
from lora_ft.errors import ConfigError, DataError


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


def find(rows: Sequence[Row], data: config.Data, *, is_multi: bool) -> Classes:
    """Return the classes of training rows: those that data.labels names, or else those that the rows have, in order.

    Raises DataError for fewer than two classes, or too many. Rows that cannot be read are not counted.
    """
    counts: Counter[str] = Counter()
    num = 0
    for row in rows:
        try:
            counts.update(labels_of(row, is_multi=is_multi))
        except RowError:  # reported with its row when examples are made
            continue
        num += 1
    names = _named(data, is_multi) or sorted(counts, key=labels.order)
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(f"a classifier needs two labels or more, and the training rows have {found}")
    if len(names) > labels.MOST_FOUND:
        raise DataError(
            f"the training rows have {len(names):,} different labels, such as {excerpt(listed(names, 3))}: "
            f"a classifier has at most {labels.MOST_FOUND:,}, so this column holds answers, not labels"
        )
    return Classes(tuple(names), is_multi, tuple(counts[name] for name in names), num)


def _named(data: config.Data, is_multi: bool) -> list[str]:
    """Return the labels that data.labels names, [] if it names none."""
    given = labels.of(data)
    if given is None or given.names is None:
        return []
    if is_multi and isinstance(data.labels, dict):
        raise ConfigError("data.labels: a map is for rows of one label; with objective.multi_label=true give a list")
    return given.names


def index_of(label: str, classes: Classes) -> int:
    """Return the number of a label; raises RowError if it is none of the classes."""
    try:
        return classes.names.index(label)
    except ValueError:
        raise RowError("label", f"{excerpt(label)} is none of the classes {listed(classes.names)}", label) from None
