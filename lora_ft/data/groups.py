"""Groups of examples, which stay together in a step and in a micro-batch: arrays instead of lists of lists.

groups_from(lengths=[5, 3, 4], groups=[7, NO_GROUP, 7]) -> Groups(members=[0 2 1], starts=[0 2 3], lengths=[9 3])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_ft.data.examples import NO_GROUP, groups_of, lengths_of
from lora_ft.data.rows import Example


@dataclass(frozen=True)
class Groups:
    """The groups of examples in order of their first members; an example without a group is a group of one.

    members: indices of examples, group by group. starts: of each group among the members, with the end. lengths: in
    tokens, of each group.
    """

    members: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of examples of each group."""
        return np.diff(self.starts)

    def members_of(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the examples of these groups, in their order."""
        if len(self.members) == len(self):
            return chosen
        sizes = self.sizes[chosen]
        ends = np.cumsum(sizes)
        within = np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)
        return self.members[np.repeat(self.starts[chosen], sizes) + within]


def grouped(examples: Sequence[Example]) -> Groups:
    """Return the groups of examples."""
    return groups_from(lengths_of(examples), groups_of(examples))


def groups_from(lengths: NDArray[np.int64], groups: NDArray[np.int64] | None) -> Groups:
    """Return the groups of examples of these lengths; `groups` is None if none has a group."""
    everyone = np.arange(len(lengths))
    if groups is None:
        return Groups(everyone, np.arange(len(lengths) + 1), lengths)
    keys = np.stack([groups, np.where(groups == NO_GROUP, everyone, 0)], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    leader = first[inverse.reshape(-1)]  # the first member of each example's group
    members = np.argsort(leader, kind="stable")
    starts = np.flatnonzero(np.diff(leader[members], prepend=-1))
    sums = np.add.reduceat(lengths[members], starts) if len(starts) else lengths
    return Groups(members, np.append(starts, len(members)), sums)
