"""Order the rows of an epoch and cut them into optimizer steps: pure functions of the seed and the epoch.

derive(7, "order", 0) -> 3141...          a different number for each purpose
epoch_order(4, seed=7, epoch=0) -> [2 0 3 1]
steps_of_epoch([400, 500, 300, 900], [2, 0, 3, 1], 1000) -> [2 0] [3] [1]
"""

import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit integer that depends only on the seed and every part of the purpose."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of range(num_rows): the rows in the order of the epoch.

    Rows are sorted by raw draws: numpy guarantees raw streams across versions, but not `permutation` (NEP 19).
    """
    draws = np.random.PCG64(derive(seed, "order", epoch)).random_raw(num_rows)
    return np.argsort(draws, kind="stable").astype(np.int64)


def steps_of_epoch(
    lengths: Sequence[int] | NDArray[np.int64], order: Sequence[int] | NDArray[np.int64], tokens_per_step: int
) -> list[NDArray[np.int64]]:
    """Cut an order into steps of consecutive rows with at most `tokens_per_step` tokens; a longer row is its own step.

    `lengths` are in tokens, by row index. Every row of the order is in exactly one step.
    """
    rows = np.asarray(order, dtype=np.int64)
    cuts = cuts_of_epoch(np.asarray(lengths, dtype=np.int64)[rows], tokens_per_step)
    return [rows[start:stop] for start, stop in itertools.pairwise(cuts.tolist())]


def cuts_of_epoch(lengths: NDArray[np.int64], tokens_per_step: int) -> NDArray[np.int64]:
    """Return the positions at which an epoch is cut into steps, first and end included.

    lengths: of the rows in the order of the epoch.
    """
    ends = np.cumsum(lengths)
    # By position, where a step that begins there ends.
    following = np.searchsorted(ends, ends - lengths + tokens_per_step, side="right")
    stops = np.maximum(following, np.arange(1, len(lengths) + 1)).data
    cuts, position = [0], 0
    while position < len(lengths):
        position = stops[position]
        cuts.append(position)
    return np.array(cuts, dtype=np.int64)
