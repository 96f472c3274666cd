"""The interface of objectives: a toy objective over pairs of documents, in the unchanged trainer and commands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import call
from peft import LoraConfig, get_peft_model
from states import some_rows, state_on, trained
from tiny import VOCABULARY, tiny_folder, tiny_model
from torch.nn.functional import cross_entropy, logsigmoid

from lora_ft import config, objectives, runs
from lora_ft.data.dataset import tokenized
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import document_loss_sums, token_loss_sum
from lora_ft.training.state import TrainingState


class Preference:
    """Toy objective: an answer should be likelier than its tokens in reverse order."""

    model_class, task_type, metrics = Sft.model_class, Sft.task_type, ("accuracy",)

    def examples(self, rows, tokenizer, data):
        return paired(tokenized(rows, tokenizer, data))

    def loss(self, model, batch, paths):
        better, worse = document_loss_sums(model, batch, paths).view(-1, 2).unbind(1)
        losses = -logsigmoid(worse - better)
        return LossSum(losses.sum(), len(losses), {"accuracy": (better < worse).to(losses).sum()})


def paired(examples):
    backwards = [np.concatenate([e.ids[~e.supervised], e.ids[e.supervised][::-1]]) for e in examples]
    pairs = zip(examples, backwards, strict=True)
    return [replace(e, ids=ids, group=e.row) for e, worse in pairs for ids in (e.ids, worse)]


@pytest.fixture(autouse=True)
def preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.OBJECTIVES, "preference", lambda settings, classes: Preference())


def answers(rows: range) -> list[Example]:
    """Return examples whose answers are at the end."""
    found = zip(rows, some_rows(rows.stop), strict=False)
    return [replace(e, supervised=np.arange(len(e.ids)) >= 2, row=row) for row, e in found]


def preference_state(folder: Path, family: str = "llama", **train: object) -> TrainingState:
    return state_on(
        tiny_model(family, dtype=torch.float64),
        folder,
        examples=paired(answers(range(10))),
        eval_examples=paired(answers(range(10, 13))),
        objective=config.Objective("preference"),
        optim=config.Optim(lr=1e-3, schedule=config.Schedule.constant, max_grad_norm=0.0),
        train=config.Train(max_steps=5, tokens_per_step=120, **train),
    )


def plain_loop(state: TrainingState, family: str) -> torch.Tensor:
    """Train the same pairs with PEFT and torch only: one document per forward pass, the mean over pairs."""
    settings = state.model.peft_config["default"]
    model = get_peft_model(
        tiny_model(family, dtype=torch.float64),
        LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, target_modules=settings.target_modules,
                   fan_in_fan_out=settings.fan_in_fan_out),
    ).eval()  # fmt: skip
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=state.cfg.optim.lr, weight_decay=0.0)

    def negative_log_likelihood(example: Example) -> torch.Tensor:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        return cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(example.supervised[1:])].sum()

    for step in state.steps:
        pairs = step.reshape(-1, 2)
        losses = [
            -logsigmoid(negative_log_likelihood(state.examples[b]) - negative_log_likelihood(state.examples[a]))
            for a, b in pairs
        ]
        optimizer.zero_grad()
        sum(losses).backward()  # divided afterwards: llama's norms round gradients to float32
        for parameter in parameters.values():
            parameter.grad /= len(losses)
        optimizer.step()
    return torch.cat([p.detach().flatten() for _, p in sorted(parameters.items())])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("train", [{}, {"tokens_per_microbatch": 60}, {"packing": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pair_objective_matches_a_plain_training_loop(family: str, train: dict, tmp_path: Path) -> None:
    state = preference_state(tmp_path, family, **train)
    found = trained(state)
    expected = plain_loop(state, family)
    start = torch.cat([p.flatten() for _, p in sorted(state.start.items())])
    assert (found - expected).norm() < 1e-9 * (expected - start).norm()
    lines = runs.read_metrics(tmp_path)
    assert [0 <= line["accuracy"] <= 1 for line in lines if line["step"]] == [True] * 5
    assert {0, 5} == {line["step"] for line in lines if "eval_accuracy" in line}


def test_both_documents_of_a_pair_are_in_one_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    plain = Preference.loss
    monkeypatch.setattr(Preference, "loss", lambda self, model, batch, paths: (
        seen.append(batch) or plain(self, model, batch, paths)))  # fmt: skip
    state = preference_state(tmp_path, tokens_per_microbatch=60)
    trained(state)
    assert len(seen) > 2 * 5
    for batch in seen:
        documents = [document.ids.tolist() for document in batch.documents()]
        for better, worse in zip(documents[::2], documents[1::2], strict=True):
            assert (better[:2], better[2:]) == (worse[:2], worse[:1:-1])
    for step in state.steps:
        assert [state.examples[i].group for i in step[::2]] == [state.examples[i].group for i in step[1::2]]


def test_commands_take_the_objective_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, rows, run = tiny_folder(tmp_path, "llama"), tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"{n} is a number."}) + "\n"
                            for n in range(20)))  # fmt: skip
    words = ["model=local", f"model.path={base}", f"data.path={rows}", "data.eval_fraction=0.3", "device=cpu",
             "train.max_steps=3", "adapter.r=4", "objective.name=preference"]  # fmt: skip
    assert call("check", *words, f"hydra.run.dir={run}") == 0
    assert call("train", *words, f"hydra.run.dir={run}") == 0
    last = runs.read_metrics(run)[-1]
    assert 0 <= last["accuracy"] <= 1 and 0 <= last["eval_accuracy"] <= 1
    assert call("eval", f"run={run}", "device=cpu") == 0
    assert json.loads((run / "eval.json").read_text())["adapter"]["loss"] == pytest.approx(last["eval_loss"])
    capfd.readouterr()
    assert call("check", *words[:-1], "objective.name=preferences") == 2
    assert "objective.name must be one of sft, classification, preference, got preferences" in capfd.readouterr().err


def test_an_unknown_objective_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="must be one of sft, classification, preference, got dpo"):
        objectives.find(config.Objective("dpo"))


@pytest.mark.parametrize("fast", [True, False])
def test_document_loss_sums_add_up_to_the_batch_loss_sum(fast: bool, tmp_path: Path) -> None:
    state = state_on(tiny_model("llama", dtype=torch.float64), tmp_path, fast=fast)
    ids = torch.randint(4, VOCABULARY, (20,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (9, 4, 7)])
    batch = Batch(ids, positions, torch.where(torch.arange(20) % 3 > 0, ids.roll(-1), -100), [0, 9, 13, 20])
    found = document_loss_sums(state.base, batch, state.paths)
    alone = [token_loss_sum(state.base, document, state.paths) for document in batch.documents()]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum(), token_loss_sum(state.base, batch, state.paths), rtol=1e-12, atol=0)
