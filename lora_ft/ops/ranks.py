"""Ranks: the processes that train one adapter together, each with its part of every step.

    ranks.sum(gradients)             adds a tensor over all ranks, in place
    ranks.totals([weight])           adds numbers of the host
    ranks.any(flag)                  True if the flag is True on any rank
    ranks.gathered(value)            the values of all ranks, in their order
    ranks.on_main(function, ...)     calls a function on the main rank only; all ranks get its result
    ranks.share(tokens)              the micro-batches of this rank, by their indices in the whole step

For a run in one process, `ALONE`, every operation is the identity. Values of the host travel as JSON, not
as pickles. The trainer divides by the weight of the whole step, summed over ranks, so that losses, metrics and
evaluations are sums divided once.
"""

import contextlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lora_ft.errors import LostRank, MismatchError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size` processes, of which `local_size` are on its machine.

    The main rank, 0, writes the run folder. shards: each rank holds a part of the frozen base, so all ranks must run
    the same number of forward passes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    shards: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place, and return it. Every rank gets the same bits."""
        if self.world_size > 1:
            with answered():
                distributed.all_reduce(tensor)
        return tensor

    def totals(self, values: Sequence[float]) -> list[float]:
        """Add each of the values over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        totals: list[float] = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return totals

    def any(self, flag: bool) -> bool:
        """Return True if the flag is True on any rank."""
        return self.totals([flag])[0] > 0

    def gathered(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks."""
        if self.world_size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with answered():
            distributed.all_gather(sizes, torch.tensor([len(text)]))
            padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            padded[: len(text)] = text
            texts = [torch.empty_like(padded) for _ in sizes]
            distributed.all_gather(texts, padded)
        found = zip(texts, sizes, strict=True)
        return [json.loads(each[: int(size)].numpy().tobytes()) for each, size in found]

    def agreed(self, value: Any) -> Any:
        """Return the JSON value of the main rank."""
        return self.gathered(value if self.is_main else None)[0] if self.world_size > 1 else value

    def on_main(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on the main rank while the others wait; return its result, a JSON value, on all ranks."""
        return self.agreed(function(*arguments) if self.is_main else None)

    def wait(self) -> None:
        """Return when all ranks have called this."""
        self.any(False)

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Run the block on one rank of each machine, then on its others, which find what the first has cached."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def check_equal(self, what: str, value: Any) -> None:
        """Raise MismatchError if a JSON value is not the same on all ranks; `what` names it."""
        found = self.gathered(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise MismatchError(
                    f"{what} must be the same for all ranks, but rank 0 has {found[0]} and rank {rank} has {other}: "
                    "use the same files and versions on every machine"
                )

    def share(self, tokens: Sequence[int]) -> list[tuple[int, bool]]:
        """Return the indices of this rank's micro-batches, given the tokens of each micro-batch of the step.

        The largest goes first, each to the rank with the fewest tokens so far. In one process these are all, in order.
        With a sharded base, a rank with fewer micro-batches than another gets further ones whose flag is False: they
        are computed, and do not count.
        """
        dealt: list[list[int]] = [[] for _ in range(self.world_size)]
        load = [(0, rank) for rank in range(self.world_size)]
        for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
            least, rank = heapq.heappop(load)
            heapq.heappush(load, (least + tokens[index], rank))
            dealt[rank].append(index)
        mine = [(index, True) for index in sorted(dealt[self.rank])]
        missing = max(map(len, dealt)) - len(mine) if self.shards else 0
        return [*mine, *[(tokens.index(min(tokens)), False)] * missing]

    def turns(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """Yield every `world_size`-th item, from the one of this rank's number; flags as in `share`."""
        source = iter(items)
        while found := list(itertools.islice(source, self.world_size)):
            if self.rank < len(found):
                yield found[self.rank], True
            elif self.shards:
                yield found[0], False


ALONE = Ranks()  # a run in one process


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Raise LostRank if a collective operation of the block fails because a rank has ended or does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        raise LostRank("another rank does not answer (dist.timeout)" if late else "another rank has ended") from error
