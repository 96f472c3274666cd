"""Weights of messages: from the row to the loss, on every path, and in the division of a step."""

import contextlib
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerated import adapted, relative
from tiny import tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy

from lora_ft.config import Data, Fast, TooLong, TrainOn
from lora_ft.data import cache, lengths
from lora_ft.data.dataset import prepare, prepare_rows
from lora_ft.data.examples import Examples
from lora_ft.data.packing import micro_batches
from lora_ft.data.read import read
from lora_ft.errors import DataError
from lora_ft.evaluation.loss import eval_loss
from lora_ft.models.acceleration import accelerated, accelerated_lora
from lora_ft.objectives.sft import Sft
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths, document_loss_sums

TOKENIZER = tiny_tokenizer()


def chat(*answers: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    messages = []
    for number, (text, more) in enumerate(answers):
        messages += [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": text, **more}]
    return {"messages": messages}


ROWS = [
    chat(("One.", {"weight": 0.5}), ("Two, and more.", {}), ("Three.", {"weight": 0}), ("Four.", {"weight": 2})),
    chat(("Five.", {"train": True}), ("Six.", {"weight": 1})),
    chat(("Seven of them.", {"weight": 1.25})),
    chat(("Eight.", {"loss": False}), ("Nine.", {"weight": 0.5})),
]


def prepared(folder: Any, rows: list[Any], **settings: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(Data(path=str(path), eval_fraction=0, **settings), TOKENIZER)


@pytest.fixture
def examples(tmp_path: Any) -> Examples:
    return prepared(tmp_path, ROWS).train


def weighted_text(example: Any) -> list[tuple[str, float]]:
    """Return runs of supervised tokens with their weight."""
    weights = example.supervised.astype(np.float32) if example.weights is None else example.weights
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [
        (TOKENIZER.decode(example.ids[start:end]), float(weights[start]))
        for start, end in pairwise(edges)
        if weights[start]
    ]


def test_each_answer_has_the_weight_of_its_message(examples: Examples) -> None:
    end = "<|im_end|>"
    assert [weighted_text(example) for example in examples] == [
        [(f"One.{end}", 0.5), (f"Two, and more.{end}", 1.0), (f"Four.{end}", 2.0)],
        [(f"Five.{end}", 1.0), (f"Six.{end}", 1.0)],
        [(f"Seven of them.{end}", 1.25)],
        [(f"Nine.{end}", 0.5)],
    ]
    assert [example.weights is None for example in examples] == [False, True, False, False]
    for example in examples:
        assert example.weights is None or ((example.weights > 0) == example.supervised).all()


def test_a_weight_of_1_changes_nothing(tmp_path: Any) -> None:
    plain, ones = [chat(("One.", {}), ("Two.", {}))], [chat(("One.", {"weight": 1.0}), ("Two.", {"weight": 1}))]
    found = [prepared(tmp_path, rows) for rows in (plain, ones)]
    assert found[0].report == found[1].report
    assert micro_batches(found[1].train, None, True)[0].weights is None


def test_weights_are_part_of_the_hash_of_the_data(tmp_path: Any) -> None:
    hashes = {prepared(tmp_path, [chat(("One.", {"weight": w}))]).report.sha256 for w in (0.5, 1, 2)}
    assert len(hashes) == 3


def test_learning_every_message_allows_no_weight(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"message 2 has a weight other than 1, and data\.train_on=all learns every"):
        prepared(tmp_path, [chat(("One.", {"weight": 0.5}))], train_on=TrainOn.all)


def test_weights_survive_selection_truncation_and_the_cache(
    examples: Examples, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = examples.select([3, 0, 1])
    for made, index in zip(chosen, (3, 0, 1), strict=True):
        assert weighted_text(made) == weighted_text(examples[index]) == weighted_text(chosen[[3, 0, 1].index(index)])
    found = read(Data(path=str(tmp_path / "rows.jsonl"), eval_fraction=0))
    limit = int(examples.lengths[2]) - 3
    data = Data(path=found.rows[0].source, max_length=limit, too_long=TooLong.truncate_prompt)
    (cut,) = lengths.fit(examples.select([2]), found, data, TOKENIZER)[0]
    assert len(cut.ids) == limit and weighted_text(cut) == weighted_text(examples[2])
    monkeypatch.setattr("lora_ft.data.dataset._CACHED_FROM_ROWS", 1)
    data = Data(path=str(tmp_path / "rows.jsonl"), eval_fraction=0)
    first, second = (prepare_rows(read(data), data, TOKENIZER) for _ in range(2))
    assert not first.report.cached and second.report.cached and first.report.sha256 == second.report.sha256
    assert [weighted_text(e) for e in second.train] == [weighted_text(e) for e in examples]
    assert cache.folder().is_dir()


def expected(model: Any, examples: Any) -> tuple[torch.Tensor, float]:
    """Return the weighted sum of token losses and the sum of weights, one document at a time, in float64."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        each = example.supervised.astype(np.float64) if example.weights is None else example.weights.astype(np.float64)
        losses = cross_entropy(model(input_ids=ids[None]).logits[0, :-1].double(), ids[1:], reduction="none")
        total = total + (losses * torch.from_numpy(each[1:])).sum()
        weight += float(each.sum())
    return total, weight


PATHS = {
    "plain": PLAIN_PATHS,
    "side by side": Paths(packs=False, passes_starts=False, supervised_rows_only=False, pads=True),
    "side by side, supervised rows": Paths(packs=False, passes_starts=False, supervised_rows_only=True, pads=True),
    "supervised rows": Paths(packs=False, passes_starts=False, supervised_rows_only=True),
    "accelerated": None,
}


@pytest.mark.parametrize("head", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_weighted_loss_and_its_gradient(path: str, head: str, examples: Examples) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    adapter = adapted(model, target_modules=["q_proj", *(["lm_head"] if head == "lora" else [])])
    learn = [p for p in adapter.parameters() if p.requires_grad]
    if head == "trained":
        learn.append(model.lm_head.weight.requires_grad_())
    total, weight = expected(model, examples)
    alone = torch.stack([expected(model, [example])[0] for example in examples])
    gradients = torch.autograd.grad(total, learn)
    with contextlib.ExitStack() as stack:
        paths = PATHS[path]
        if paths is None:
            paths = stack.enter_context(accelerated(model, Fast())).paths
            stack.enter_context(accelerated_lora(adapter, "first", Fast()))
        found, weights = torch.zeros((), dtype=torch.float64), 0.0
        for batch in micro_batches(examples, None, paths.share_a_pass):
            part = Sft().loss(model, batch.padded(8).to(torch.device("cpu")), paths)
            found, weights = found + part.sum, weights + part.weight
        assert weights == weight
        assert relative(found, total) < 1e-12
        for one, other in zip(torch.autograd.grad(found, learn), gradients, strict=True):
            assert relative(one, other) < 1e-10
        (batch,) = micro_batches(examples, None, True)
        assert relative(document_loss_sums(model, batch, paths).sort().values, alone.sort().values) < 1e-12
        assert eval_loss(model, Sft().loss, examples, paths, 64).loss == pytest.approx(
            float(total.detach()) / weight, rel=1e-12
        )


def test_batches_of_any_size_have_the_same_weighted_mean(examples: Examples) -> None:
    model = tiny_model("llama")
    found = {eval_loss(model, Sft().loss, examples, PLAIN_PATHS, size).loss for size in (1, 60, 1000)}
    assert max(found) - min(found) < 1e-6
