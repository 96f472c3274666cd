"""The order of rows and the cut into steps: pure functions, checked against their definitions."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.data.sampler import derive, epoch_order, steps_of_epoch

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


def test_derive_is_the_first_63_bits_of_the_sha256_of_seed_and_purpose():
    assert derive(7, "order", 3) == int(hashlib.sha256(b'[7, "order", 3]').hexdigest()[:16], 16) >> 1


def test_derive_depends_on_every_part_of_a_purpose():
    purposes = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, 1, "a"), (0, "a", 1, 1), (0, "a", 11)]
    numbers = {derive(seed, *purpose) for seed, *purpose in purposes}
    assert len(numbers) == len(purposes)
    assert all(0 <= number < 2**63 for number in numbers)


@pytest.mark.closes("F08")
@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_is_a_reproducible_permutation(num_rows, seed, epoch):
    order = epoch_order(num_rows, seed, epoch)
    assert sorted(order) == list(range(num_rows))
    assert np.array_equal(order, epoch_order(num_rows, seed, epoch))


def test_rows_are_sorted_by_raw_draws():
    draws = [int(draw) for draw in np.random.PCG64(derive(7, "order", 2)).random_raw(30)]
    assert list(epoch_order(30, 7, 2)) == sorted(range(30), key=lambda row: draws[row])


def test_epochs_and_seeds_order_rows_differently():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.closes("A23", "F08")
def test_the_global_random_state_does_not_change_the_order():
    np.random.seed(0)
    first = epoch_order(20, 1, 1)
    np.random.seed(1)
    assert np.array_equal(first, epoch_order(20, 1, 1))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 80), st.integers(0, 9))
def test_steps_are_cut_where_the_next_row_does_not_fit(lengths, tokens_per_step, seed):
    order = epoch_order(len(lengths), seed, 0)
    steps = steps_of_epoch(lengths, order, tokens_per_step)
    assert [row for step in steps for row in step] == list(order)
    for step in steps:
        assert len(step) == 1 or sum(lengths[row] for row in step) <= tokens_per_step
    for step, following in pairwise(steps):
        assert sum(lengths[row] for row in step) + lengths[following[0]] > tokens_per_step
