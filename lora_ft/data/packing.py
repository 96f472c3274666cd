"""Rows packed into micro-batches without padding.

best_fit([5, 3, 4, 2], capacity=7) -> [[0, 3], [1, 2]]       5+2 and 3+4 tokens
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.rows import TokenRow
from lora_ft.errors import ConfigError

UNSUPERVISED = -100  # torch's cross-entropy ignores this target by default


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end; `targets[i]` is the token that position i predicts.

    Two rows, `2+2? =4.` and `Hi Ho.`, whose answers `4.` and `Ho.` are supervised:

        ids        2+2?   =     4     .    | Hi    Ho    .
        positions  0      1     2     3    | 0     1     2      restart at each document
        starts     0                         4                7
        targets    -100   4     .    -100  | Ho    .    -100    next token of the same document

    ids, positions, targets: int64 [tokens]. starts: int32 [documents + 1], cumulative boundaries.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int32]
    targets: NDArray[np.int64]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each index in one bin, no bin over `capacity`; ValueError for a length over it.

    The longest goes first, each into the fullest bin that still takes it; equals keep their order.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"length {length} at index {index} is over the capacity of {capacity}")
        found = bisect_left(room, (length, -1))
        left, bin_ = room.pop(found) if found < len(room) else (capacity, len(bins))
        if bin_ == len(bins):
            bins.append([])
        bins[bin_].append(index)
        insort(room, (left - length, bin_))
    return bins


def micro_batches(rows: Sequence[TokenRow], capacity: int | None, packing: bool) -> list[MicroBatch]:
    """Cut the rows of a step into micro-batches of at most `capacity` tokens (None: all together).

    Without packing each row is one alone. Raises ConfigError for a row that is longer than the capacity.
    """
    for row in rows:
        if capacity is not None and len(row.ids) > capacity:
            raise ConfigError(
                f"train.tokens_per_microbatch must be at least the longest row: {row.place} has {len(row.ids)} "
                f"tokens, got {capacity}"
            )
    if not packing:
        return [_lay_out([row]) for row in rows]
    lengths = [len(row.ids) for row in rows]
    return [_lay_out([rows[i] for i in bin_]) for bin_ in best_fit(lengths, capacity or sum(lengths))]


def _lay_out(rows: Sequence[TokenRow]) -> MicroBatch:
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    supervised = np.concatenate([row.supervised for row in rows])
    positions = np.concatenate([np.arange(len(row.ids), dtype=np.int64) for row in rows])
    # A document's first token is never supervised, so a shift of the whole cannot cross a boundary.
    targets = np.full(len(ids), UNSUPERVISED, dtype=np.int64)
    targets[:-1][supervised[1:]] = ids[1:][supervised[1:]]
    starts = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    return MicroBatch(ids, positions, starts, targets)
