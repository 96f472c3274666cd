"""Find the classes of labelled rows, and read the label or labels of a row.

    rows labelled "b", "a", "b"           ->  Classes(("a", "b"), counts=(1, 2))      labels of numbers in their order
    rows labelled '["a", "b"]', '[]'      ->  Classes(("a", "b"), is_multi=True, ...)  with objective.multi_label=true

A label is the answer of a row: the column `label` of data=classify, the completion of a prompt. data/labels.py reads
and checks labels of rows with one each; without data.labels, and for rows with several, this module does. Classes come
from the training rows alone, so that a label of an eval row that no training row has is an error.
"""

import json
from collections import Counter
from collections.abc import Mapping

from lora_ft import config, mixing
from lora_ft.classes import Classes, listed
from lora_ft.data import labels
from lora_ft.data.read import Rows
from lora_ft.data.rows import Row, RowError, excerpt, is_blank
from lora_ft.errors import ConfigError, DataError

MOST_COUNTED = 10 * labels.MOST_FOUND  # different labels; more are not counted, only refused


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


def find(found: Mapping[str, Rows], data: config.Data, *, is_multi: bool) -> Classes:
    """Return the classes of the training rows of all sources, in order: those of data.labels, or else those found.

    found: the rows of each source, or those of `data` under the name "". Rows that cannot be read are not counted.
    Raises DataError for fewer than two classes, or too many, ConfigError for sources that name different labels.
    """
    counts: Counter[str] = Counter()
    num = 0
    for rows in found.values():
        of_source, num_of_source = _counted(rows, is_multi)
        counts.update(of_source)
        num += num_of_source
    names = _named(data, is_multi) or sorted(counts, key=labels.order)
    if len(names) < 2:
        found_names = f"only {names[0]!r}" if names else "none"
        raise DataError(f"a classifier needs two labels or more, and the training rows have {found_names}")
    if len(names) > labels.MOST_FOUND:
        raise DataError(
            f"the training rows have {len(names):,} different labels, such as {excerpt(listed(names, 3))}: "
            f"a classifier has at most {labels.MOST_FOUND:,}, so this column holds answers, not labels"
        )
    return Classes(tuple(names), is_multi, tuple(counts[name] for name in names), num)


def _counted(rows: Rows, is_multi: bool) -> tuple[Mapping[str, int], int]:
    """Count the labels of training rows, and the rows; with data.labels from the numbers that are stored with them."""
    if rows.rows.words and not is_multi:
        return labels.counted(rows.rows, ~rows.is_eval), int((~rows.is_eval).sum())
    counts: Counter[str] = Counter()
    num = 0
    for row in rows.training_rows:
        try:
            counts.update(labels_of(row, is_multi=is_multi))
        except RowError:  # reported with its row when examples are made
            continue
        num += 1
        if len(counts) > MOST_COUNTED:
            break
    return counts, num


def _named(data: config.Data, is_multi: bool) -> list[str]:
    """Return the labels that data.labels names, [] if it names none, of all sources."""
    named: dict[str, list[str]] = {}
    for name, source in mixing.named(data).items():
        given = labels.of(source)
        if given is None or given.names is None:
            continue
        if is_multi and isinstance(source.labels, dict):
            key = f"data.sources.{name}.labels" if name else "data.labels"
            raise ConfigError(f"{key}: a map is for rows of one label; with objective.multi_label=true give a list")
        named[name] = given.names
    first = next(iter(named), "")
    for name, names in named.items():
        if set(names) != set(named[first]):
            raise ConfigError(
                f"data.sources.{name}.labels are {excerpt(listed(names))}, and data.sources.{first}.labels are "
                f"{excerpt(listed(named[first]))}: a classifier has the same classes for all sources"
            )
    return named.get(first, [])


def index_of(label: str, classes: Classes) -> int:
    """Return the number of a label; raises RowError if it is none of the classes."""
    try:
        return classes.names.index(label)
    except ValueError:
        raise RowError("label", f"{excerpt(label)} is none of the classes {listed(classes.names)}", label) from None
