"""Examples as columns: the same documents, plans and errors as lists of examples give, at any number of rows."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft import config
from lora_ft.data import examples as examples_module
from lora_ft.data.columns import InMemory
from lora_ft.data.dataset import _sha256
from lora_ft.data.examples import Examples, Replacements
from lora_ft.data.groups import grouped
from lora_ft.data.packing import check_capacity, largest_micro_batch, longest_group, micro_batch_lengths
from lora_ft.data.rows import Example
from lora_ft.data.sampler import epoch_order, steps_of_epoch
from lora_ft.errors import ConfigError
from lora_ft.training.state import plan_steps


@st.composite
def documents(draw) -> list[Example]:
    """Return random examples with rows, prompts and, in half of the cases, groups."""
    count, seed, has_groups = draw(st.integers(0, 20)), draw(st.integers(0, 2**32)), draw(st.booleans())
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(1, 10))
        ids, supervised = random.integers(0, 9, length).astype(np.int32), random.random(length) < 0.5
        supervised[0] = False
        group = int(random.integers(-1, 5)) if has_groups and random.random() < 0.8 else None
        prompt_end, answer_start = random.integers(0, length + 1, 2).tolist()
        made.append(Example(ids, supervised, f"rows.jsonl:{number + 1}", number, prompt_end, answer_start, group))
    return made


def plain(example: Example) -> tuple:
    return tuple({**vars(example), "ids": example.ids.tolist(), "supervised": example.supervised.tolist()}.values())


def groups_by_definition(examples: list[Example]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(("alone", index) if example.group is None else example.group, []).append(index)
    return list(groups.values())


def steps_by_definition(examples: list[Example], train: config.Train, seed: int) -> list[list[int]]:
    """Plan steps with lists, one row at a time."""
    groups = groups_by_definition(examples)
    lengths = [sum(len(examples[i].ids) for i in group) for group in groups]
    steps: list[list[int]] = []
    for epoch in range(train.epochs if train.max_steps is None else train.max_steps):
        tokens = None
        for group in epoch_order(len(groups), seed, epoch).tolist():
            if tokens is None or tokens + lengths[group] > train.tokens_per_step:
                steps.append([])
                tokens = 0
            steps[-1] += groups[group]
            tokens += lengths[group]
    return steps[: train.max_steps]


@settings(deadline=None, max_examples=50)
@given(documents(), st.data())
def test_examples_are_read_as_they_were_given(given_examples, data):
    examples = Examples.of(given_examples)
    assert (
        list(map(plain, examples))
        == [plain(examples[i]) for i in range(len(examples))]
        == list(map(plain, given_examples))
    )
    chosen = data.draw(st.lists(st.integers(0, max(0, len(examples) - 1)), max_size=9 if given_examples else 0))
    selected = examples.select(chosen).select(np.arange(len(chosen))[::-1])
    assert list(map(plain, selected)) == [plain(given_examples[i]) for i in reversed(chosen)]
    assert selected.lengths.tolist() == [len(e.ids) for e in selected]
    assert selected.supervised_tokens.tolist() == [int(e.supervised.sum()) for e in selected]
    assert selected.rows.tolist() == [e.row for e in selected]
    assert list(map(plain, examples[1:3])) == list(map(plain, given_examples[1:3]))
    if given_examples:
        assert plain(examples[-1]) == plain(given_examples[-1])
        with pytest.raises(IndexError):
            examples[len(examples)]


@settings(deadline=None, max_examples=50)
@given(documents(), st.integers(1, 30))
def test_blocks_are_the_documents_in_order_whatever_their_size(given_examples, size):
    examples = Examples.of(given_examples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples_module, "_BLOCK_TOKENS", size)
        blocks = list(examples.blocks())
        assert list(map(plain, examples)) == list(map(plain, given_examples))
        found = _sha256(examples, examples.select(np.arange(len(examples))[::2]))
    assert [token for block in blocks for token in block.ids.tolist()] == [t for e in given_examples for t in e.ids]
    assert all(len(block.ids) <= size or len(block.starts) == 2 for block in blocks)
    digest = hashlib.sha256()
    for side in (given_examples, given_examples[::2]):
        for e in side:
            digest.update(len(e.ids).to_bytes(8, "little") + e.ids.tobytes() + e.supervised.tobytes())
        digest.update(b"side")
    assert found == digest.hexdigest()


@settings(deadline=None, max_examples=50)
@given(documents(), st.data())
def test_replaced_documents_keep_their_row_and_source(given_examples, data):
    examples = Examples.of(given_examples)
    cut = [replace(e, ids=e.ids[:1], supervised=e.supervised[:1]) for e in given_examples if len(e.ids) > 4]
    order = data.draw(st.permutations(range(len(given_examples) + len(cut))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples_module, "_DOCUMENTS_AT_ONCE", 2)
        made = Replacements(examples)
        assert [made.append([example]) for example in cut] == [1] * len(cut)
        found = made.finish(np.array(order, np.int64))
    assert list(map(plain, found)) == [plain([*given_examples, *cut][i]) for i in order]


@settings(deadline=None, max_examples=50)
@given(documents(), st.integers(1, 40), st.integers(1, 3), st.none() | st.integers(1, 12), st.integers(0, 2**40))
def test_steps_are_those_of_a_plan_with_lists(given_examples, tokens_per_step, epochs, max_steps, seed):
    train = config.Train(tokens_per_step=tokens_per_step, epochs=epochs, max_steps=max_steps)
    expected = steps_by_definition(given_examples, train, seed)
    for examples in (given_examples, Examples.of(given_examples)):
        steps = plan_steps(examples, train, seed)
        assert [step.tolist() for step in steps] == expected
        assert [step.tolist() for step in steps[::-2]] == expected[::-2]
        assert steps.tokens.tolist() == [sum(len(given_examples[i].ids) for i in step) for step in expected]
        assert steps.documents.tolist() == list(map(len, expected))
    with pytest.raises(IndexError):
        steps[len(steps)]


@settings(deadline=None, max_examples=50)
@given(documents())
def test_groups_are_those_of_the_definition(given_examples):
    groups, expected = grouped(Examples.of(given_examples)), groups_by_definition(given_examples)
    assert [groups.members_of(np.array([i])).tolist() for i in range(len(groups))] == expected
    assert groups.members_of(np.arange(len(groups))[::-1]).tolist() == [i for group in expected[::-1] for i in group]
    lengths = [sum(len(given_examples[i].ids) for i in group) for group in expected]
    assert groups.lengths.tolist() == lengths
    assert longest_group(given_examples) == longest_group(Examples.of(given_examples)) == max(lengths, default=0)


@settings(deadline=None, max_examples=50)
@given(documents(), st.integers(1, 60), st.none() | st.integers(1, 30), st.booleans())
def test_the_largest_micro_batch_is_the_first_largest_of_the_steps_by_size(given_examples, tokens, capacity, packing):
    examples = Examples.of(given_examples)
    steps = plan_steps(examples, config.Train(tokens_per_step=tokens, epochs=2), 5)
    rows = [[given_examples[i] for i in step] for step in steps]

    def bound(step: list[Example]) -> int:
        most = sum(len(e.ids) for e in step) if packing else longest_group(step)
        return min(most, capacity or most)

    try:
        largest: list[int] = []
        for step in sorted(rows, key=lambda step: -bound(step)):
            if sum(largest) < bound(step):
                largest = max(largest, *micro_batch_lengths(step, capacity, packing), key=sum)
    except ConfigError as error:
        with pytest.raises(ConfigError) as found:
            largest_micro_batch(examples, steps, capacity, packing)
        assert str(found.value) == str(error)
    else:
        assert largest_micro_batch(examples, steps, capacity, packing) == largest
        assert largest_micro_batch(given_examples, list(steps), capacity, packing) == largest


def test_of_two_longest_groups_the_last_is_named():
    rows = [Example(np.zeros(4, np.int32), np.arange(4) > 0, f"x:{n}", n, group=n % 2) for n in range(4)]
    with pytest.raises(ConfigError, match="x:1 has 8 tokens, got 7"):
        check_capacity(Examples.of(rows), 7)


def many(count: int, seed: int = 0) -> Examples:
    """Return documents of random lengths; their tokens are zeros that take no memory."""
    lengths = np.random.default_rng(seed).integers(4, 80, count)
    table = np.zeros((count, 5), np.int32)
    table[:, 0], table[:, 1], table[:, 2] = lengths, lengths // 2, np.arange(count)
    tokens = int(lengths.sum())
    zeros = {name: np.broadcast_to(np.zeros(1, dtype), tokens) for name, dtype in (("ids", "i4"), ("supervised", "u1"))}
    return Examples(InMemory({**zeros, "documents": table}), ["x"] * count)


def test_steps_of_an_epoch_are_cut_as_one_row_after_the_other():
    examples = many(3000)
    for tokens in (1, 50, 999, 10**9):
        steps = plan_steps(examples, config.Train(tokens_per_step=tokens, epochs=1), 3)
        order = epoch_order(3000, 3, 0)
        assert [s.tolist() for s in steps] == [s.tolist() for s in steps_of_epoch(examples.lengths, order, tokens)]


def test_a_million_rows_are_planned_in_seconds():
    examples, started = many(10**6), time.process_time()
    steps = plan_steps(examples, config.Train(tokens_per_step=8192, epochs=3), 0)
    assert steps.documents.sum() == 3 * 10**6
    assert len(largest_micro_batch(examples, steps, None, True)) > 100
    check_capacity(examples, 100)
    assert time.process_time() - started < 10  # about one second
