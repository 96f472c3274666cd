"""Packing: every row once, no bin over its capacity, no target from another document."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.data.packing import best_fit, largest_micro_batch, longest_group, micro_batch_lengths, micro_batches
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError
from lora_ft.ops.batch import IGNORED


def best_fit_by_definition(lengths, capacity):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [(capacity - sum(lengths[i] for i in bin_), number) for number, bin_ in enumerate(bins)]
        fitting = [entry for entry in room if entry[0] >= lengths[index]]
        if fitting:
            bins[min(fitting)[1]].append(index)
        else:
            bins.append([index])
    return bins


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 60))
def test_best_fit_matches_its_definition(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert bins == best_fit_by_definition(lengths, capacity)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= capacity for bin_ in bins)


def test_best_fit_refuses_a_length_over_the_capacity():
    with pytest.raises(ValueError, match="length 9 at index 1 is over the capacity of 8"):
        best_fit([3, 9], 8)


@st.composite
def token_rows(draw):
    rows = []
    for number in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12))
        supervised = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        rows.append(Example(np.array(ids, np.int32), np.array(supervised, np.bool_), f"rows.jsonl:{number + 1}"))
    return rows


def documents(batch):
    """Return each document of a micro-batch as tuples of ids, positions and targets."""
    cuts = [slice(a, b) for a, b in pairwise(batch.starts)]
    return [tuple(tuple(a[cut].tolist()) for a in (batch.ids, batch.positions, batch.targets)) for cut in cuts]


def document_by_definition(row):
    following = [
        int(row.ids[i + 1]) if i + 1 < len(row.ids) and row.supervised[i + 1] else IGNORED for i in range(len(row.ids))
    ]
    return tuple(row.ids), tuple(range(len(row.ids))), tuple(following)


@pytest.mark.closes("A11")
@settings(deadline=None)
@given(token_rows(), st.integers(12, 40) | st.none(), st.booleans())
def test_micro_batches_have_each_row_once_with_its_positions_and_targets(rows, capacity, packing):
    batches = micro_batches(rows, capacity, packing)
    found = [document for batch in batches for document in documents(batch)]
    assert sorted(found) == sorted(map(document_by_definition, rows))
    assert all(batch.starts[0] == 0 and batch.starts[-1] == len(batch.ids) for batch in batches)
    assert packing or len(batches) == len(rows)
    if packing:
        assert len(batches) == 1 if capacity is None else all(len(batch.ids) <= capacity for batch in batches)
    for batch in batches:
        assert {a.dtype for a in (batch.ids, batch.positions, batch.targets)} == {torch.int64}
        assert torch.equal(batch.supervised, (batch.targets != IGNORED).nonzero()[:, 0])
        assert batch.counts == [sum(t != IGNORED for t in targets) for *_, targets in documents(batch)]
        assert [documents(alone) for alone in batch.documents()] == [[one] for one in documents(batch)]


@given(token_rows(), st.data())
def test_examples_of_a_group_are_adjacent_in_one_micro_batch(rows, data):
    groups = data.draw(st.lists(st.integers(0, 3) | st.none(), min_size=len(rows), max_size=len(rows)))
    rows = [
        Example(np.array([n, *row.ids[1:]], np.int32), row.supervised, row.source, group=group)
        for n, (row, group) in enumerate(zip(rows, groups, strict=True))
    ]
    together = [[i for i, group in enumerate(groups) if group == wanted] for wanted in set(groups) - {None}]
    for packing in (True, False):
        for capacity in (None, longest_group(rows)):
            found = [[ids[0] for ids, *_ in documents(batch)] for batch in micro_batches(rows, capacity, packing)]
            assert sorted(n for batch in found for n in batch) == [*range(len(rows))]
            for group in together:
                (batch,) = [batch for batch in found if group[0] in batch]
                start = batch.index(group[0])
                assert batch[start : start + len(group)] == group


def test_a_group_longer_than_the_capacity_is_refused():
    rows = [Example(np.arange(5, dtype=np.int32), np.arange(5) > 0, f"rows.jsonl:{n}", group=1) for n in (4, 5)]
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4 has 10 tokens, got 9"):
        micro_batches(rows, 9, True)


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_longer_than_the_capacity_is_refused(packing):
    row = Example(np.arange(9, dtype=np.int32), np.zeros(9, np.bool_), "rows.jsonl:4")
    with pytest.raises(ConfigError, match=r"train\.tokens_per_microbatch .*rows\.jsonl:4 has 9 tokens, got 8"):
        micro_batches([row], 8, packing)


def test_no_rows_give_no_micro_batches():
    assert micro_batches([], None, True) == micro_batches([], 5, False) == []


def test_unsupervised_targets_are_ignored_by_cross_entropy():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED


@given(st.lists(token_rows(), min_size=1, max_size=5), st.sampled_from([None, 12, 20]), st.booleans())
def test_largest_micro_batch_is_the_one_with_the_most_tokens_in_any_step(rows_of_steps, capacity, packing):
    examples = [row for rows in rows_of_steps for row in rows]
    ends = np.cumsum([0, *map(len, rows_of_steps)])
    steps = [np.arange(start, end) for start, end in pairwise(ends)]
    made = [batch for rows in rows_of_steps for batch in micro_batches(rows, capacity, packing)]
    lengths = [each for rows in rows_of_steps for each in micro_batch_lengths(rows, capacity, packing)]
    assert lengths == [[len(document.ids) for document in batch.documents()] for batch in made]
    assert sum(largest_micro_batch(examples, steps, capacity, packing)) == max(len(batch.ids) for batch in made)
    assert largest_micro_batch(examples, steps, capacity, packing) in lengths
