"""Pack examples into micro-batches without padding; examples of one group stay together.

best_fit([5, 3, 4, 2], capacity=7) -> [[0, 3], [1, 2]]       5+2 and 3+4 tokens
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError
from lora_ft.ops.batch import IGNORED, Batch


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign each index to a bin of at most `capacity`, by best-fit decreasing. ValueError for a length over it.

    The longest goes first, each into the fullest bin that it still fits in; equal lengths keep their order.
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


def grouped(examples: Sequence[Example]) -> list[list[int]]:
    """Return the indices of the examples of each group, in order; an example without a group is a group of one."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, example in enumerate(examples):
        key = ("example", index) if example.group is None else ("group", example.group)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def group_lengths(examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of tokens of each group."""
    return [sum(len(examples[i].ids) for i in group) for group in groups]


def longest_group(examples: Sequence[Example]) -> int:
    """Return the number of tokens of the longest group, which a micro-batch must be able to hold."""
    return max(group_lengths(examples, grouped(examples)), default=0)


def check_capacity(examples: Sequence[Example], capacity: int | None) -> None:
    """Raise ConfigError if the longest group does not fit into a micro-batch of `capacity` tokens."""
    groups = grouped(examples)
    length, group = max(zip(group_lengths(examples, groups), groups, strict=True), default=(0, []))
    if capacity is not None and length > capacity:
        raise ConfigError(
            f"train.tokens_per_microbatch must be at least the longest row: {examples[group[0]].source} has {length} "
            f"tokens, got {capacity}"
        )


def micro_batches(examples: Sequence[Example], capacity: int | None, packing: bool) -> list[Batch]:
    """Cut the examples of a step into micro-batches of at most `capacity` tokens (None: one micro-batch).

    Without packing each group is its own micro-batch. Raises ConfigError if a group is longer than the capacity.
    """
    return [_pack([examples[i] for i in indices]) for indices in _assigned(examples, capacity, packing)]


def micro_batch_lengths(examples: Sequence[Example], capacity: int | None, packing: bool) -> list[list[int]]:
    """Return the lengths of the documents of each of a step's micro-batches, in the order of `micro_batches`."""
    return [[len(examples[i].ids) for i in indices] for indices in _assigned(examples, capacity, packing)]


def largest_micro_batch(
    examples: Sequence[Example], steps: Iterable[NDArray[np.int64]], capacity: int | None, packing: bool
) -> list[int]:
    """Return the lengths of the documents of the micro-batch with the most tokens in any of the steps.

    A step is an array of indices of examples. Raises ConfigError if a group is longer than the capacity.
    """

    def bound(step: list[Example]) -> int:
        tokens = sum(len(e.ids) for e in step) if packing else longest_group(step)
        return min(tokens, capacity or tokens)

    chosen = ([examples[i] for i in step] for step in steps)
    largest: list[int] = []
    # The steps that may have the largest come first, so that few of them are packed.
    for most, step in sorted(((bound(step), step) for step in chosen), key=lambda pair: -pair[0]):
        if sum(largest) >= most:
            break
        largest = max(largest, *micro_batch_lengths(step, capacity, packing), key=sum)
    return largest


def _assigned(examples: Sequence[Example], capacity: int | None, packing: bool) -> list[list[int]]:
    """Return the indices of the examples of each micro-batch."""
    check_capacity(examples, capacity)
    groups = grouped(examples)
    lengths = group_lengths(examples, groups)
    bins = best_fit(lengths, capacity or sum(lengths)) if packing else [[i] for i in range(len(groups))]
    return [[i for group in bin_ for i in groups[group]] for bin_ in bins]


def _pack(examples: Sequence[Example]) -> Batch:
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    supervised = np.concatenate([example.supervised for example in examples])
    positions = np.concatenate([np.arange(len(example.ids), dtype=np.int64) for example in examples])
    # The first token of a document is never supervised, so shifting the whole batch cannot cross a boundary.
    targets = np.full(len(ids), IGNORED, dtype=np.int64)
    targets[:-1][supervised[1:]] = ids[1:][supervised[1:]]
    starts = np.cumsum([0, *(len(example.ids) for example in examples)]).tolist()
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets), starts)
