"""Plan the optimizer steps of a run: a pure function of the examples, the seed and the settings.

steps = Steps(grouped(examples), tokens_per_step=1000, seed=7, epochs=3)
steps[41]            indices of the examples of step 41, whose epoch is ordered when it is asked for
steps.tokens         tokens of each step
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.groups import Groups
from lora_ft.data.sampler import cuts_of_epoch, epoch_order


@dataclass(frozen=True)
class _Epoch:
    """Steps of one epoch: the number of the first, and where the epoch is cut."""

    first: int
    cuts: NDArray[np.int64]


class Steps(Sequence[NDArray[np.int64]]):
    """The optimizer steps of a run, each as indices of examples; the examples of a group are in one step.

    tokens, documents: of each step. epochs: passes over the data; without it, as many as `max_steps` steps take.
    """

    def __init__(
        self, groups: Groups, tokens_per_step: int, seed: int, epochs: int | None = None, max_steps: int | None = None
    ) -> None:
        self._groups = groups
        self._order = lru_cache(2)(lambda epoch: epoch_order(len(groups), seed, epoch))
        self._epochs: list[_Epoch] = []
        tokens, documents, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for epoch in itertools.count() if epochs is None else range(epochs):
            if not len(groups) or (max_steps is not None and count >= max_steps):
                break
            order = self._order(epoch)
            ordered = groups.lengths[order]
            cuts = cuts_of_epoch(ordered, tokens_per_step)
            self._epochs.append(_Epoch(count, cuts))
            tokens.append(np.add.reduceat(ordered, cuts[:-1]))
            documents.append(np.add.reduceat(groups.sizes[order], cuts[:-1]))
            count += len(cuts) - 1
        self.tokens = np.concatenate(tokens)[:max_steps]
        self.documents = np.concatenate(documents)[:max_steps]

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]  # raises IndexError
        epoch = bisect_right(self._epochs, number, key=lambda each: each.first) - 1
        found = self._epochs[epoch]
        start, stop = found.cuts[number - found.first : number - found.first + 2].tolist()
        return self._groups.members_of(self._order(epoch)[start:stop])


def tokens_of(steps: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of tokens of each step."""
    if isinstance(steps, Steps):
        return steps.tokens
    return np.array([lengths[step].sum() for step in steps], dtype=np.int64)
