"""Split rows into training and eval rows by their content: adding or reordering rows moves no other row.

    sha256("user: 2+2? assistant: 4", casefolded, whitespace collapsed) -> 0.031 of 1 -> eval row if eval_fraction=0.05

Rows that are equal, or differ only in case and whitespace, are always on the same side.
"""

import hashlib
import json
from collections.abc import Sequence

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
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8")).digest()


def choose_eval(hashes: Sequence[bytes], fraction: float) -> list[bool]:
    """Return True for each row whose hash is in the lowest `fraction` of the hash space: the eval rows.

    Neither side is left empty if there are two different rows and `fraction` is above 0: the row with the smallest
    hash is always an eval row, the one with the largest always a training row.
    """
    if not fraction or len(set(hashes)) < 2:
        return [False] * len(hashes)
    smallest, largest = min(hashes), max(hashes)
    return [h == smallest or (h != largest and int.from_bytes(h[:8], "big") < fraction * 2**64) for h in hashes]


def refuse_leaks(train: list[Row], eval_: list[Row], train_hashes: list[bytes], eval_hashes: list[bytes]) -> None:
    """Raise DataError if eval rows are also training rows, up to case and whitespace; it names both sources."""
    sources = {h: row.source for h, row in zip(train_hashes, train, strict=True)}
    leaks = [f"  {row.source} is also {sources[h]}"
             for h, row in zip(eval_hashes, eval_, strict=True) if h in sources]  # fmt: skip
    if leaks:
        shown = "\n".join(leaks[:MOST_BAD_ROWS])
        raise DataError(f"{len(leaks)} eval rows are training rows too:\n{shown}")
