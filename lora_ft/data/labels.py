"""Read the labels of rows whose answers are labels: `data.labels`.

    data.labels=[negative,positive]              the answers of all rows, in this order
    data.labels="{0: negative, 1: positive}"     values in the rows, and the label that each stands for
    data.labels=auto                             found in the training rows; in the eval rows if data.stream=true

    rows.csv:12: label: neutral is not one of data.labels: negative, positive

`checked` wraps the parser of any format: it replaces the value of a row by its label, and refuses a value that is
none. The store of rows has the number of each label (data/row_store.py). With auto the labels are known when all
training rows are read; `resolve` then checks the eval rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_ft import config
from lora_ft.data.row_store import StoredRows
from lora_ft.data.rows import Ledger, Row, RowError, excerpt, is_blank
from lora_ft.errors import ConfigError, DataError

AUTO = "auto"
MOST_FOUND = 1000  # distinct answers that may be labels; more are answers of their own

_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")  # pandas makes floats of integers if one is missing

Parse = Callable[[str, dict[str, Any], Ledger], Row]


@dataclass(frozen=True)
class Labels:
    """Values of `data.labels`: each value in the rows with its label. names: the labels in order; None with auto."""

    names: list[str] | None
    by_value: dict[str, str]


def of(data: config.Data) -> Labels | None:
    """Return the labels that the settings name, None without data.labels. Raises ConfigError for a malformed value."""
    given: Any = data.labels
    if given is None:
        return None
    if given == AUTO:
        return Labels(None, {})
    if isinstance(given, dict):
        pairs = [(_name(value), _name(label)) for value, label in given.items()]
    elif isinstance(given, list):
        pairs = [(_name(label), _name(label)) for label in given]
    else:
        raise ConfigError(f"data.labels must be a list like [a,b], a map like {{0: a, 1: b}} or auto, got {given}")
    values = [value for value, _ in pairs]
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ConfigError(f"data.labels has {twice[0]} twice: {given}")
    names = list(dict.fromkeys(label for _, label in pairs))
    if len(names) < 2:
        raise ConfigError(f"data.labels must name at least two labels, got {given}")
    return Labels(names, dict(pairs))


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float) or is_blank(str(value)):
        raise ConfigError(f"data.labels: a label must be text or a number, got {value!r}")
    return str(value).strip()


def checked(parse: Parse, data: config.Data) -> Parse:
    """Return a parser whose rows have labels as answers; `parse` itself without data.labels."""
    labels = of(data)
    if labels is None:
        return parse

    def parse_labelled(source: str, values: dict[str, Any], ledger: Ledger) -> Row:
        try:
            row = parse(source, values, ledger)
        except RowError as error:
            raise RowError(error.name, f"{error.reason} (data.labels={_shown(data.labels)})", error.shown) from None
        return labelled(row, labels, ledger)

    return parse_labelled


def labelled(row: Row, labels: Labels, ledger: Ledger) -> Row:
    """Return the row with its label as the answer. Raises RowError for an answer that is not one."""
    if not row.messages:
        raise RowError("data.labels", "needs rows with a prompt and an answer, and this one is plain text")
    answer = row.answer.strip()
    if answer != row.answer:
        ledger.convert("label", "labels with whitespace around them", row.answer)
    if labels.names is None:
        return with_answer(row, answer)
    whole = _WHOLE_FLOAT.fullmatch(answer)
    if answer not in labels.by_value and whole and whole[1] in labels.by_value:
        ledger.convert("label", "labels read as whole numbers", row.answer)
        answer = whole[1]
    if answer not in labels.by_value:
        raise RowError("label", f"{excerpt(answer)} is not one of data.labels: {_listed(labels.by_value)}")
    return with_answer(row, labels.by_value[answer])


def with_answer(row: Row, answer: str) -> Row:
    """Return the row with another last answer."""
    if row.answer == answer:
        return row
    last = {**row.messages[-1], "content": answer}
    return replace(row, answer=answer, messages=[*row.messages[:-1], last])


def check_number(data: config.Data, number: int) -> None:
    """Raise DataError if data.labels=auto has found too many labels."""
    if data.labels == AUTO and number > MOST_FOUND:
        raise DataError(
            f"data.labels=auto: the rows have more than {MOST_FOUND:,} different answers: answers of their own, not "
            "labels. Set data.labels to a list of labels, or to null"
        )


def resolve(data: config.Data, rows: StoredRows, is_eval: NDArray[np.bool_], ledger: Ledger) -> dict[str, int]:
    """Return the labels in order, each with its number of training rows (of eval rows if there are no others).

    With data.labels=auto, rows with other labels go into the ledger: eval rows, or the training rows of a stream.
    Raises DataError for training rows of one label only; the rows of a stream are not known.
    """
    labels = of(data)
    assert labels is not None  # callers ask for data.labels first
    trained, evaluated = (counted(rows, side) for side in (~is_eval, is_eval))
    counts, place = trained or evaluated, "eval" if data.stream else "training"
    names = labels.names or sorted(evaluated if data.stream else counts, key=order)
    if labels.names is None:
        unknown = [number for number, word in enumerate(rows.words) if word not in names]
        for index in np.flatnonzero((is_eval != data.stream) & np.isin(rows.labels, unknown)).tolist():
            word = rows.words[rows.labels[index]]
            reason = f"{excerpt(word)} is not a label of the {place} rows ({_listed(names)})"
            ledger.add_bad(rows.sources[index], "label", f"{reason}; data.labels can name all labels", word)
    known = names if data.stream else list(counts)
    if len(known) == 1:
        ledger.raise_bad()  # which may be the rows of the other labels
        raise DataError(f"data.labels: every {place} row has the label {excerpt(known[0])}: two are needed")
    return {name: counts.get(name, 0) for name in names}


def counted(rows: StoredRows, chosen: NDArray[np.bool_]) -> dict[str, int]:
    """Count the labels of some of the rows."""
    counts = np.bincount(rows.labels[chosen], minlength=len(rows.words)).tolist()
    return {word: count for word, count in zip(rows.words, counts, strict=True) if count}


def of_stream(data: config.Data, names: list[str] | None) -> config.Data:
    """Return the settings that read a stream after its labels `names` were found in the eval rows."""
    return replace(data, labels=names) if data.labels == AUTO else data


def order(name: str) -> tuple[bool, float, str]:
    """Return a sort key that puts 10 after 9, and numbers before names."""
    number = re.fullmatch(r"-?\d{1,15}", name)
    return number is None, float(name) if number else 0.0, name


def _listed(names: Iterable[str]) -> str:
    return excerpt(", ".join(names), longest=200)


def _shown(given: Any) -> str:
    return excerpt(given if given == AUTO else _listed(map(str, given)))
