"""Ranks: the processes that train one adapter together. One process for now, for which every operation is the identity.

    ranks.sum(gradients)          adds a tensor over all ranks, in place
    ranks.totals([weight])        adds numbers of the host over all ranks
    ranks.any(flag)               True if the flag is True on any rank
    ranks.share(micro_batches)    the micro-batches of this rank, each with its index in the whole step

The trainer divides by the weight of the whole step, summed over ranks, so that losses, metrics and evaluations are
sums divided once. A distributed implementation replaces this class and nothing else.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lora_ft.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size` processes; the main one writes the run folder."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place, and return it."""
        return tensor

    def totals(self, values: list[float]) -> list[float]:
        """Add each of the values over all ranks."""
        return values

    def any(self, flag: bool) -> bool:
        """Return True if the flag is True on any rank."""
        return flag

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """Return the items of this rank with their indices in the whole step."""
        return list(enumerate(items))[self.rank :: self.world_size]


def current() -> Ranks:
    """Return the ranks of this process; ConfigError if a launcher started several processes."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"training runs in one process so far, got WORLD_SIZE={size}")
    return Ranks()
