"""Live bytes over a training step, by what they belong to: the births and deaths of storages, put in order.

    bytes |             __ recomputed __
          |       _____/                \\___ activations kept
          |______/___________________________\\____________ base weights
            forward    loss    backward        optimizer

A storage belongs to the first of these that applies:

    base weights, adapter, gradients, optimizer   it is resident between steps
    activations kept    it was made before a backward, and is still there when that begins
    recomputed          it was made while a backward recomputes a layer, and is still there when that ends
    attention, loss, dequantization, recomputed, other      the part of the model that made it, for a short time
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch

TERMS = ("base weights", "adapter", "gradients", "optimizer", "activations kept", "recomputed", "attention", "loss",
         "dequantization", "other")  # fmt: skip
_OF_PHASE = {"base": "base weights", "adapter": "adapter", "gradient": "gradients", "optimizer": "optimizer"}
_POINTS = 400


@dataclass(frozen=True)
class Timeline:
    """Live bytes at sample points, in order of time. A point stands for some events, and has the most of them.

    terms: bytes by term, one number per point; every term is there. phases: the phase of each point.
    """

    terms: dict[str, list[int]]
    phases: list[str]

    @property
    def totals(self) -> list[int]:
        """Live bytes at each point, of all terms."""
        return [sum(column) for column in zip(*self.terms.values(), strict=True)]

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by term at the point with the most, the first of them."""
        totals = self.totals
        point = totals.index(max(totals))
        return {name: counts[point] for name, counts in self.terms.items()}


@dataclass(slots=True)
class Storage:
    """A storage: its bytes, its dtype, the phase and the part of the model that made it.

    part: a term, or "" if none is known. recomputation: the number of the layer's recomputation, 0 for none.
    """

    bytes: int
    dtype: torch.dtype
    phase: str
    part: str
    recomputation: int


@dataclass
class Record:
    """Storages in order of birth, and the events of their lives.

    events: n for the birth of storage n, ~n for its death. phases: positions in `events` at which a phase began.
    recomputed: position at which a recomputation ended, by its number. first: position at which the step began.
    """

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=lambda: [0])
    first: int = 0

    def timeline(self, points: int = _POINTS) -> Timeline:
        """Return the live bytes from the first event of the step to the last, at most at so many points."""
        terms = self._terms()
        live, total = [0] * len(TERMS), 0
        samples: list[tuple[int, list[int]]] = []
        for start, end in self._intervals(points):
            most, sample = -1, (start, live)
            for position in range(start, end):
                event = self.events[position]
                size = self.storages[event].bytes if event >= 0 else -self.storages[~event].bytes
                live[terms[event if event >= 0 else ~event]] += size
                total += size
                if total > most:
                    most, sample = total, (position, live.copy())
            samples.append(sample)
        samples = samples[1:]  # the first interval is what was there before the step
        columns = zip(*(counts for _, counts in samples), strict=True)
        return Timeline(dict(zip(TERMS, map(list, columns), strict=True)), self._phases_at([at for at, _ in samples]))

    def _intervals(self, points: int) -> Iterator[tuple[int, int]]:
        yield 0, self.first
        count = len(self.events) - self.first
        bounds = [self.first + count * i // points for i in range(points + 1)]
        yield from ((start, end) for start, end in pairwise(bounds) if start < end)

    def _phases_at(self, positions: list[int]) -> list[str]:
        found, changes = [], iter([*self.phases, (len(self.events), "")])
        phase, (change, following) = "", next(changes)
        for position in positions:
            while change <= position:
                phase, (change, following) = following, next(changes)
            found.append(phase)
        return found

    def _terms(self) -> list[int]:
        """Return the number of each storage's term."""
        death = [len(self.events)] * len(self.storages)
        birth = [0] * len(self.storages)
        for position, event in enumerate(self.events):
            (birth if event >= 0 else death)[event if event >= 0 else ~event] = position
        backwards = [position for position, phase in self.phases if phase == "backward"]
        found, following = [], 0
        for number, storage in enumerate(self.storages):
            while following < len(backwards) and backwards[following] <= birth[number]:
                following += 1
            kept = following < len(backwards) and death[number] >= backwards[following]
            name = _OF_PHASE.get(storage.phase)
            if name is None and storage.phase != "backward" and kept:
                name = "activations kept"
            elif name is None and storage.recomputation and death[number] >= self.recomputed[storage.recomputation]:
                name = "recomputed"
            found.append(TERMS.index(name or storage.part or ("recomputed" if storage.recomputation else "other")))
        return found
