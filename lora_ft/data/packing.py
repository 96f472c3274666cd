"""Pack examples into micro-batches without padding; examples of one group stay together.

best_fit([5, 3, 4, 2], capacity=7) -> [[0, 3], [1, 2]]       5+2 and 3+4 tokens
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_ft.data.examples import groups_of, lengths_of
from lora_ft.data.groups import Groups, grouped, groups_from
from lora_ft.data.rows import Example
from lora_ft.data.steps import tokens_of
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


def longest_group(examples: Sequence[Example]) -> int:
    """Return the number of tokens of the longest group, which a micro-batch must be able to hold."""
    return int(grouped(examples).lengths.max(initial=0))


def check_capacity(examples: Sequence[Example], capacity: int | None) -> None:
    """Raise ConfigError if the longest group does not fit into a micro-batch of `capacity` tokens."""
    groups = grouped(examples)
    length = int(groups.lengths.max(initial=0))
    if capacity is None or length <= capacity:
        return
    last = int(np.flatnonzero(groups.lengths == length)[-1])
    source = examples[int(groups.members[groups.starts[last]])].source
    raise ConfigError(
        f"train.tokens_per_microbatch must be at least the longest row: {source} has {length} tokens, got {capacity}"
    )


def micro_batches(examples: Sequence[Example], capacity: int | None, packing: bool) -> list[Batch]:
    """Cut the examples of a step into micro-batches of at most `capacity` tokens (None: one micro-batch).

    Without packing each group is its own micro-batch. Raises ConfigError if a group is longer than the capacity.
    """
    return list(packed(examples, capacity, packing))


def packed(examples: Sequence[Example], capacity: int | None, packing: bool) -> Iterator[Batch]:
    """Yield the micro-batches that `micro_batches` returns, made one at a time."""
    check_capacity(examples, capacity)
    for indices in _assigned(grouped(examples), capacity, packing):
        yield _pack([examples[i] for i in indices])


def micro_batch_lengths(examples: Sequence[Example], capacity: int | None, packing: bool) -> list[list[int]]:
    """Return the lengths of the documents of each of a step's micro-batches, in the order of `micro_batches`."""
    check_capacity(examples, capacity)
    lengths = lengths_of(examples).tolist()
    return [[lengths[i] for i in indices] for indices in _assigned(grouped(examples), capacity, packing)]


def largest_micro_batch(
    examples: Sequence[Example], steps: Sequence[NDArray[np.int64]], capacity: int | None, packing: bool
) -> list[int]:
    """Return the lengths of the documents of the micro-batch with the most tokens in any of the steps.

    A step is an array of indices of examples. Raises ConfigError if a group is longer than the capacity.
    """
    lengths, groups = lengths_of(examples), groups_of(examples)

    def groups_in(step: NDArray[np.int64]) -> Groups:
        return groups_from(lengths[step], None if groups is None else groups[step])

    if packing:
        bounds = tokens_of(steps, lengths)
    else:
        bounds = np.array([groups_in(step).lengths.max(initial=0) for step in steps], dtype=np.int64)
    if capacity:
        bounds = np.minimum(bounds, capacity)
    largest: list[int] = []
    # The steps that may have the largest come first, so that few of them are packed.
    for number in np.argsort(-bounds, kind="stable").tolist():
        if sum(largest) >= bounds[number]:
            break
        step = steps[number]
        inner, each = groups_in(step), lengths[step].tolist()
        if capacity is not None and inner.lengths.max(initial=0) > capacity:
            check_capacity([examples[i] for i in step], capacity)
        largest = max(largest, *([each[i] for i in bin_] for bin_ in _assigned(inner, capacity, packing)), key=sum)
    return largest


def _assigned(groups: Groups, capacity: int | None, packing: bool) -> list[list[int]]:
    """Return the indices of the examples of each micro-batch."""
    lengths = groups.lengths.tolist()
    bins = best_fit(lengths, capacity or sum(lengths)) if packing else [[i] for i in range(len(groups))]
    return [groups.members_of(np.array(bin_, dtype=np.int64)).tolist() for bin_ in bins]


def _pack(examples: Sequence[Example]) -> Batch:
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    supervised = np.concatenate([example.supervised for example in examples])
    positions = np.concatenate([np.arange(len(example.ids), dtype=np.int64) for example in examples])
    # The first token of a document is never supervised, so shifting the whole batch cannot cross a boundary.
    targets = np.full(len(ids), IGNORED, dtype=np.int64)
    targets[:-1][supervised[1:]] = ids[1:][supervised[1:]]
    starts = np.cumsum([0, *(len(example.ids) for example in examples)]).tolist()
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets), starts, _weights(examples)
    )


def _weights(examples: Sequence[Example]) -> torch.Tensor | None:
    """Return the weights of the targets, which are the tokens after them; None if all are 1."""
    if all(example.weights is None for example in examples):
        return None
    weights = np.concatenate([example.loss_weights for example in examples])
    return torch.from_numpy(np.append(weights[1:], np.float32(0)))
