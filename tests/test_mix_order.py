"""The order of a mix: proportions at every prefix, passes of each source, ends of epochs, steps."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.config import MixUntil
from lora_ft.data.groups import groups_from
from lora_ft.data.sampler import MixedOrder, Source, epoch_order
from lora_ft.data.steps import Steps

FIRST, ALL = MixUntil.first, MixUntil.all
GROUPS = st.lists(st.tuples(st.integers(2, 60), st.integers(1, 40)), min_size=1, max_size=12)
MIXES = st.lists(st.tuples(st.integers(1, 100), GROUPS), min_size=1, max_size=5)


def source(name: str, share: float, first: int, lengths: Sequence[int], supervised: Sequence[int]) -> Source:
    return Source(name, share, first, np.array(lengths, dtype=np.int64), np.array(supervised, dtype=np.float64))


def sources_of(mix: list[tuple[int, list[tuple[int, int]]]]) -> list[Source]:
    """Return sources whose groups have these tokens and (at most as many) supervised tokens."""
    total, first, found = sum(share for share, _ in mix), 0, []
    for number, (share, groups) in enumerate(mix):
        lengths, supervised = [length for length, _ in groups], [min(length - 1, count) for length, count in groups]
        found.append(source(f"s{number}", share / total, first, lengths, supervised))
        first += len(groups)
    return found


def taken(sources: list[Source], until: MixUntil, seed: int, most: int) -> list[tuple[int, int]]:
    """Return the first `most` groups, each with its epoch."""
    order, found, epoch = MixedOrder(sources, until, seed), list[tuple[int, int]](), 0
    while len(found) < most:
        found += [(epoch, group) for group in order(epoch).tolist()]
        epoch += 1
    return found[:most]


def source_of(sources: list[Source], group: int) -> int:
    return max(number for number, source in enumerate(sources) if source.first <= group)


@settings(deadline=None, max_examples=60)
@given(MIXES, st.integers(0, 99), st.sampled_from(MixUntil))
def test_supervised_tokens_are_within_one_group_of_their_shares_at_every_prefix(mix, seed, until) -> None:
    sources = sources_of(mix)
    longest = max(max(source.supervised) for source in sources)
    given_, total = [0] * len(sources), 0
    for _, group in taken(sources, until, seed, 300):
        number = source_of(sources, group)
        count = sources[number].supervised[group - sources[number].first]
        given_[number] += count
        total += count
        for source, tokens in zip(sources, given_, strict=True):
            assert -longest - 1e-6 <= tokens - source.share * total <= longest + 1e-6


@settings(deadline=None, max_examples=30)
@given(MIXES, st.integers(0, 99), st.sampled_from(MixUntil))
def test_each_source_gives_its_groups_in_a_new_order_at_each_pass(mix, seed, until) -> None:
    sources = sources_of(mix)
    order = [group for _, group in taken(sources, until, seed, 200)]
    for number, source in enumerate(sources):
        own = [group - source.first for group in order if source_of(sources, group) == number]
        size = len(source.lengths)
        expected = [epoch_order(size, seed, source.name, passes) for passes in range(len(own) // size + 1)]
        assert own == np.concatenate(expected)[: len(own)].tolist()


@settings(deadline=None, max_examples=30)
@given(MIXES, st.integers(0, 99))
def test_choice_equals_a_plain_computation_in_exact_numbers(mix, seed) -> None:
    """The rule of `_next` in fractions: no source is chosen that has more than its share."""
    power = [1 << (share % 3) for share, _ in mix]  # shares over a power of two have no rounding
    power[0] += (1 << (sum(power) - 1).bit_length()) - sum(power)
    sources = sources_of(list(zip(power, (groups for _, groups in mix), strict=True)))
    queues = [[epoch_order(len(s.lengths), seed, s.name, p).tolist() for p in range(300)] for s in sources]
    queues = [list(chain.from_iterable(passes)) for passes in queues]
    given_, at = [Fraction(0)] * len(sources), [0] * len(sources)
    for _, group in taken(sources, FIRST, seed, 300):
        shares = [Fraction(source.share) for source in sources]
        ready = [n for n in range(len(sources)) if given_[n] <= shares[n] * sum(given_)]
        finish = [(given_[n] + s.supervised[queues[n][at[n]]]) / shares[n] for n, s in enumerate(sources)]
        chosen = min(ready, key=lambda n: finish[n])
        assert group == sources[chosen].first + queues[chosen][at[chosen]]
        given_[chosen] += sources[chosen].supervised[queues[chosen][at[chosen]]]
        at[chosen] += 1


@settings(deadline=None, max_examples=40)
@given(MIXES, st.integers(0, 99), st.sampled_from(MixUntil))
def test_epoch_ends_with_the_pass_of_the_first_or_of_the_last_source(mix, seed, until) -> None:
    sources = sources_of(mix)
    counts, last = [0] * len(sources), 0
    for epoch, group in taken(sources, until, seed, 250):
        passes = [count // len(source.lengths) for count, source in zip(counts, sources, strict=True)]
        assert epoch == (max(passes) if until is FIRST else min(passes))
        assert epoch >= last
        counts[source_of(sources, group)] += 1
        last = epoch


@settings(deadline=None, max_examples=40)
@given(MIXES, st.integers(0, 99), st.sampled_from(MixUntil), st.integers(1, 200))
def test_steps_are_cut_where_the_next_group_does_not_fit_and_where_an_epoch_ends(mix, seed, until, size) -> None:
    sources = sources_of(mix)
    lengths = np.concatenate([source.lengths for source in sources])
    steps = Steps(groups_from(lengths, None), size, seed, 3, None, MixedOrder(sources, until, seed))
    order = [group for step in steps for group in step.tolist()]
    epochs = [epoch for epoch, _ in taken(sources, until, seed, len(order))]
    assert order == [group for _, group in taken(sources, until, seed, len(order))]
    at = 0
    for step, following in pairwise(steps):
        at += len(step)
        tokens = sum(lengths[group] for group in step)
        assert len(step) == 1 or tokens <= size
        assert epochs[at] > epochs[at - 1] or tokens + lengths[following[0]] > size
    assert steps.tokens.tolist() == [lengths[step].sum() for step in steps]


@settings(deadline=None, max_examples=30)
@given(MIXES, st.integers(0, 99), st.sampled_from(MixUntil))
def test_epochs_are_the_same_in_any_order_of_asking_and_when_cut_short(mix, seed, until) -> None:
    sources = sources_of(mix)
    whole = MixedOrder(sources, until, seed)
    orders = [whole(epoch).tolist() for epoch in range(4)]
    other = MixedOrder(sources, until, seed)
    assert [other(epoch).tolist() for epoch in (3, 0, 2, 1)] == [orders[3], orders[0], orders[2], orders[1]]
    short = MixedOrder(sources, until, seed, most_tokens=100)(0).tolist()
    lengths = np.concatenate([source.lengths for source in sources])
    assert short == orders[0][: len(short)]
    assert len(short) == len(orders[0]) or lengths[short].sum() > 100


def test_source_with_share_0_gives_nothing() -> None:
    sources = [source("a", 1.0, 0, [3, 4], [1, 2]), source("b", 0.0, 2, [5], [1])]
    assert {group for _, group in taken(sources, ALL, 0, 20)} == {0, 1}


def test_other_seeds_give_other_orders_and_equal_ones_the_same() -> None:
    sources = [source("a", 0.5, 0, [3] * 20, [2] * 20), source("b", 0.5, 20, [5] * 20, [2] * 20)]
    orders = [tuple(taken(sources, FIRST, seed, 40)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_several_small_sources_do_not_wait_longer_than_one_group() -> None:
    """Taking the largest deficit would let the last of many equal sources fall behind by more than one group."""
    names = [f"s{n:02}" for n in range(12)]
    sources = [source(name, 1 / 12, n * 50, [9] * 50, [8] * 50) for n, name in enumerate(names)]
    given_ = np.zeros(12)
    for _, group in taken(sources, FIRST, 0, 400):
        given_[group // 50] += 8
        assert np.abs(given_ - given_.sum() / 12).max() <= 8
