"""Split rows into training and eval rows by their content: adding or reordering rows moves no other row.

    sha256("user: 2+2? assistant: 4", casefolded, whitespace collapsed) -> 0.031 of 1 -> eval row if eval_fraction=0.05

Rows that are equal, or differ only in case and whitespace, are always on the same side.
"""

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.rows import MOST_BAD_ROWS, Row
from lora_ft.errors import DataError


def content_hash(row: Row) -> bytes:
    """Return the sha256 of a row's normalized text; its source and unused columns are not included."""
    parts = []
    for message in row.messages:
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        shown = json.dumps(extra, sort_keys=True, default=str) if extra else ""
        parts.append(f"{message['role']}: {message['content']} {shown}")
    text = "\n".join(parts) if parts else row.answer
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).digest()


Hashes = NDArray[np.uint64]
"""Hashes of rows, uint64 [rows, 2]: the first 16 bytes of `content_hash`, most significant first."""


def choose_eval(hashes: Hashes, fraction: float) -> NDArray[np.bool_]:
    """Return True for each row whose hash is in the lowest `fraction` of the hash space: the eval rows.

    Neither side is left empty if there are two different rows and `fraction` is above 0: the row with the smallest
    hash is always an eval row, the one with the largest always a training row.
    """
    if not fraction or len(hashes) < 2:
        return np.zeros(len(hashes), np.bool_)
    order = _sorted(hashes)
    smallest, largest = hashes[order[0]], hashes[order[-1]]
    if (smallest == largest).all():
        return np.zeros(len(hashes), np.bool_)
    is_low = hashes[:, 0] < np.uint64(math.ceil(fraction * 2**64))  # an integer, or the comparison would round
    return (hashes == smallest).all(1) | (is_low & (hashes != largest).any(1))


def first_of_equal(hashes: Hashes) -> NDArray[np.int64]:
    """Return the ascending indices of the rows that no earlier row equals."""
    order = _sorted(hashes)
    return np.sort(order[_begins(hashes[order])])


def are_among(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """Return True for each row that one of the others equals."""
    both = np.concatenate([others, hashes])
    order = _sorted(both)
    begins = _begins(both[order])
    is_other = order[begins] < len(others)  # of each kind of equal rows: the first of them is one of the others
    is_known = np.empty(len(both), np.bool_)
    is_known[order] = is_other[np.cumsum(begins) - 1]
    return is_known[len(others) :]


def _begins(ordered: Hashes) -> NDArray[np.bool_]:
    """Return True for each of the ordered hashes that differs from the one before."""
    begins = np.ones(len(ordered), np.bool_)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return begins


def _sorted(hashes: Hashes) -> NDArray[np.int64]:
    """Return the indices of rows by hash; equal ones keep their order."""
    return np.lexsort((hashes[:, 1], hashes[:, 0]))


def refuse_leaks(train: Sequence[str], eval_: Sequence[str], train_hashes: Hashes, eval_hashes: Hashes) -> None:
    """Raise DataError if eval rows are also training rows, up to case and whitespace; it names both sources.

    train, eval_: sources of the rows.
    """
    known = np.flatnonzero(np.isin(train_hashes[:, 0], eval_hashes[:, 0]))
    trained = {h: i for h, i in zip(map(tuple, train_hashes[known].tolist()), known.tolist(), strict=True)}
    places = np.flatnonzero(np.isin(eval_hashes[:, 0], train_hashes[:, 0])).tolist()
    leaks = [(i, h) for i in places if (h := tuple(eval_hashes[i].tolist())) in trained]
    if leaks:
        shown = "\n".join(f"  {eval_[i]} is also {train[trained[h]]}" for i, h in leaks[:MOST_BAD_ROWS])
        raise DataError(f"{len(leaks)} eval rows are training rows too:\n{shown}")
