"""Order the rows of an epoch and cut them into optimizer steps: pure functions of the seed and the epoch.

derive(7, "order", 0) -> 3141...          a different number for each purpose
epoch_order(4, 7, 0) -> [2 0 3 1]         seed 7, epoch 0
steps_of_epoch([400, 500, 300, 900], [2, 0, 3, 1], 1000) -> [2 0] [3] [1]

Several sources are mixed document by document, so that each has its share of the supervised tokens at any moment:

    chat  0.75    a a a a a a a a a ...         mixed    a B a a a B a a a B a a ...
    wiki  0.25    B B B ...                     (each with as many supervised tokens)
"""

import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_ft.config import MixUntil


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit integer that depends only on the seed and every part of the purpose."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(num_rows: int, seed: int, *epoch: str | int) -> NDArray[np.int64]:
    """Return a permutation of range(num_rows): the rows in the order of the epoch.

    epoch: its number; in a mix, the name of the source and the number of its pass.
    """
    return shuffled(num_rows, derive(seed, "order", *epoch))


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation of range(count).

    Numbers are sorted by raw draws: numpy guarantees raw streams across versions, but not `permutation` (NEP 19).
    """
    draws = np.random.PCG64(seed).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)


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


@dataclass(frozen=True)
class Source:
    """A source of a mix: its share of the supervised tokens, and tokens and supervised tokens of each of its groups.

    first: number of its first group among the groups of all sources.
    """

    name: str
    share: float
    first: int
    lengths: NDArray[np.int64]
    supervised: NDArray[np.float64]


class MixedOrder:
    """The order of the groups of all sources in each epoch: `order(epoch)`.

    A source gives its groups in a new order at each pass, and continues in the next epoch where it was. An epoch ends
    when some source has ended its pass (`first`), or all have (`all`), or after `most_tokens` tokens. At any moment the
    supervised tokens of a source differ from its share by at most those of the longest group.
    """

    def __init__(self, sources: Sequence[Source], until: MixUntil, seed: int, most_tokens: int | None = None) -> None:
        self._sources = [source for source in sources if source.share > 0]
        self._passes = max if until is MixUntil.first else min
        self._seed, self._most_tokens = seed, math.inf if most_tokens is None else most_tokens
        self._starts = [[_Position() for _ in self._sources]]  # of each epoch, as far as it is known

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """Return the groups of an epoch, in order."""
        while len(self._starts) <= epoch:
            self._epoch(len(self._starts) - 1)
        return self._epoch(epoch)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        queues = [_Queue(*each, self._seed) for each in zip(self._sources, self._starts[epoch], strict=True)]
        total, tokens, ended = sum(queue.given for queue in queues), 0, self._passes(queue.passes for queue in queues)
        order = array("q")
        while tokens <= self._most_tokens:
            queue = _next(queues, total)
            before = queue.passes
            group, length, supervised = queue.take()
            order.append(group)
            tokens += length
            total += supervised
            if queue.passes > before and self._passes(queue.passes for queue in queues) > ended:
                break
        if len(self._starts) == epoch + 1:
            self._starts.append([queue.position for queue in queues])
        return np.frombuffer(order, dtype=np.int64)


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


class _Position(NamedTuple):
    """The place of a source: supervised tokens given, passes ended, groups given in the pass."""

    given: float = 0.0
    passes: int = 0
    at: int = 0


class _Queue:
    """The groups of a source in the order of its passes; `finish`: total at which the next one is due."""

    __slots__ = ("_at", "_lengths", "_order", "_seed", "_source", "_supervised", "finish", "given", "passes", "share")

    def __init__(self, source: Source, position: _Position, seed: int) -> None:
        self._source, self._seed, self.share = source, seed, source.share
        self._lengths, self._supervised = source.lengths.data, source.supervised.data  # of which items are read fast
        self.given, self.passes, at = position
        self._begin_pass(at)

    @property
    def position(self) -> _Position:
        return _Position(self.given, self.passes, self._at)

    def take(self) -> tuple[int, int, float]:
        """Return the next group's number, its tokens and its supervised tokens."""
        group = self._order[self._at]
        supervised = self._supervised[group]
        self.given += supervised
        if self._at + 1 == len(self._order):
            self.passes += 1
            self._begin_pass(0)
        else:
            self._at += 1
            self.finish = (self.given + self._supervised[self._order[self._at]]) / self.share
        return self._source.first + group, self._lengths[group], supervised

    def _begin_pass(self, at: int) -> None:
        self._at = at
        self._order = epoch_order(len(self._lengths), self._seed, self._source.name, self.passes).data
        self.finish = (self.given + self._supervised[self._order[at]]) / self.share
