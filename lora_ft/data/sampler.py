"""Order the rows of an epoch and cut them into optimizer steps: pure functions of the seed and the epoch.

derive(7, "order", 0) -> 3141...          a different number for each purpose
epoch_order(4, 7, 0) -> [2 0 3 1]         seed 7, epoch 0
steps_of_epoch([400, 500, 300, 900], [2, 0, 3, 1], 1000) -> [2 0] [3] [1]

Several sources are mixed document by document, so that each has its share of the supervised tokens at any moment:

    chat  0.75    a a a a a a a a ...           mixed    a a B a a a a B a ...
    wiki  0.25    B B B ...                     (one B has as many supervised tokens as one a or two)
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_ft.config import MixUntil


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit integer that depends only on the seed and every part of the purpose."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(num_rows: int, seed: int, *epoch: str | int) -> NDArray[np.int64]:
    """Return a permutation of range(num_rows): the rows in the order of the epoch.

    epoch: its number; in a mix, the name of the source and the number of its pass. Rows are sorted by raw draws: numpy
    guarantees raw streams across versions, but not `permutation` (NEP 19).
    """
    draws = np.random.PCG64(derive(seed, "order", *epoch)).random_raw(num_rows)
    return np.argsort(draws, kind="stable").astype(np.int64)


def steps_of_epoch(
    lengths: Sequence[int], order: Sequence[int] | NDArray[np.int64], tokens_per_step: int
) -> list[NDArray[np.int64]]:
    """Cut an order into steps of consecutive rows with at most `tokens_per_step` tokens; a longer row is its own step.

    `lengths` are in tokens, by row index. Every row of the order is in exactly one step.
    """
    steps: list[list[int]] = []
    tokens = 0
    for row in map(int, order):
        if not steps or tokens + lengths[row] > tokens_per_step:
            steps.append([])
            tokens = 0
        steps[-1].append(row)
        tokens += lengths[row]
    return [np.array(step, dtype=np.int64) for step in steps]


@dataclass(frozen=True)
class Source:
    """A source of a mix: its share of the supervised tokens, and tokens and supervised tokens of each of its groups.

    first: number of its first group among the groups of all sources.
    """

    name: str
    share: float
    first: int
    lengths: Sequence[int]
    supervised: Sequence[float]


def mixed_steps(
    sources: Sequence[Source], until: MixUntil, tokens_per_step: int, seed: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield steps of groups from all sources without end, each with the number of its epoch.

    A source gives its groups in a new order at each pass, and goes on in the next epoch where it was. An epoch ends
    when some source has ended its pass (`first`), or all have (`all`). At any moment the supervised tokens of a source
    differ from its share by less than the longest group has.
    """
    queues = [_Queue(source, seed) for source in sources if source.share > 0]
    total, epoch, tokens = 0.0, 0, 0
    step: list[int] = []
    while True:
        queue = _next(queues, total)
        group, length, supervised = queue.take()
        if step and tokens + length > tokens_per_step:
            yield epoch, np.array(step, dtype=np.int64)
            step, tokens = [], 0
        step.append(group)
        tokens += length
        total += supervised
        passes = (max if until is MixUntil.first else min)(queue.passes for queue in queues)
        if passes > epoch:
            yield epoch, np.array(step, dtype=np.int64)
            step, tokens, epoch = [], 0, passes


def _next(queues: list["_Queue"], total: float) -> "_Queue":
    """Choose the source to take a group from: worst-case fair weighted fair queueing (Bennett and Zhang, 1996).

    Of the sources that have at most their share, it is the one whose next group would be complete first if all were
    served at once, each at the rate of its share. If the largest deficit alone decided, one of many sources might have
    to wait for longer than the longest group.
    """
    found, earliest = None, math.inf
    for queue in queues:
        if queue.finish < earliest and queue.given <= queue.share * total:
            found, earliest = queue, queue.finish
    return found or max(queues, key=lambda queue: queue.share * total - queue.given)  # all above it by rounding


class _Queue:
    """The groups of a source in the order of its passes; `finish`: total at which the next one is due."""

    __slots__ = ("_at", "_order", "_seed", "_source", "finish", "given", "passes", "share")

    def __init__(self, source: Source, seed: int) -> None:
        self._source, self._seed, self.share = source, seed, source.share
        self.given, self.passes = 0.0, 0
        self._begin_pass()
        self._set_finish()

    def take(self) -> tuple[int, int, float]:
        """Return the next group's number, its tokens and its supervised tokens."""
        source, group = self._source, self._order[self._at]
        self.given += source.supervised[group]
        self._at += 1
        if self._at == len(self._order):
            self.passes += 1
            self._begin_pass()
        self._set_finish()
        return source.first + group, source.lengths[group], source.supervised[group]

    def _begin_pass(self) -> None:
        self._at = 0
        self._order = epoch_order(len(self._source.lengths), self._seed, self._source.name, self.passes).tolist()

    def _set_finish(self) -> None:
        self.finish = (self.given + self._source.supervised[self._order[self._at]]) / self.share
