"""The split into training and eval rows: by each row's own content, so that adding or reordering rows moves none.

    sha256("user: 2+2? assistant: 4", case folded, blanks joined) -> 0.031 of 1 -> an eval row at eval_fraction=0.05

Equal rows, and rows that differ in case and blanks only, always lie on the same side.
"""

import hashlib
import json
from collections.abc import Sequence

from lora_ft.data.rows import MOST_BAD_ROWS, Row
from lora_ft.errors import DataError


def content_hash(row: Row) -> bytes:
    """sha256 of a row's normalised text; sources and other columns do not enter."""
    parts = []
    for message in row.messages:
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        shown = json.dumps(extra, sort_keys=True, default=str) if extra else ""
        parts.append(f"{message['role']}: {message['content']} {shown}")
    text = "\n".join(parts) if parts else row.answer
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8")).digest()


def choose_eval(hashes: Sequence[bytes], fraction: float) -> list[bool]:
    """True for each eval row; `fraction` of the hash space.

    If it would leave a side empty and there are two different rows, the row of the smallest hash is an eval row, or
    that of the largest a training row.
    """
    if not fraction or len(set(hashes)) < 2:
        return [False] * len(hashes)
    smallest, largest = min(hashes), max(hashes)
    return [h == smallest or (h != largest and int.from_bytes(h[:8], "big") < fraction * 2**64) for h in hashes]


def refuse_leaks(train: list[Row], eval_: list[Row], train_hashes: list[bytes], eval_hashes: list[bytes]) -> None:
    """DataError that names the eval rows that are training rows too, but for case and blanks."""
    sources = {h: row.source for h, row in zip(train_hashes, train, strict=True)}
    leaks = [f"  {row.source} is also {sources[h]}"
             for h, row in zip(eval_hashes, eval_, strict=True) if h in sources]  # fmt: skip
    if leaks:
        shown = "\n".join(leaks[:MOST_BAD_ROWS])
        raise DataError(f"{len(leaks)} eval rows are training rows too:\n{shown}")
