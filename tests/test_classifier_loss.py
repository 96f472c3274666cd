"""The head of a classifier has the losses, gradients and logits of PEFT's and transformers' own classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import ONE, SEVERAL, tiny_classifier
from peft import LoraConfig, get_peft_model
from states import state_on, trained
from tiny import MIXTURES, VOCABULARY
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lora_ft import config, runs
from lora_ft.classes import Classes
from lora_ft.data.packing import micro_batches
from lora_ft.data.rows import Example
from lora_ft.models.acceleration import accelerate
from lora_ft.ops.class_logits import class_logits
from lora_ft.ops.token_loss import PLAIN_PATHS
from lora_ft.training import checkpoint
from lora_ft.training.state import TrainingState

PAD = 3
HEADED_MIXTURES = [name for name in MIXTURES if "granite" not in name]  # transformers has no classifier of these


def documents(classes: Classes, number: int = 12, seed: int = 0) -> list[Example]:
    """Return texts of random ids with their classes: one each, or for multi-label from none to all."""
    generator = np.random.default_rng(seed)
    made = []
    for row in range(number):
        text = generator.integers(4, VOCABULARY, int(generator.integers(2, 16)))
        found = np.flatnonzero(generator.random(len(classes.names)) < 0.4) if classes.is_multi else [row % 3]
        labels = list(found) or [len(classes.names)]
        ids = np.array([*text, *labels], dtype=np.int32)
        made.append(Example(ids, np.arange(len(ids)) >= len(text), f"rows:{row + 1}", row, prompt_end=len(text)))
    return made


def state_of(
    folder: Path, family: str, classes: Classes, *, fast: bool = True, steps: int = 50, **objective: Any
) -> TrainingState:
    train = {name: objective.pop(name) for name in ("tokens_per_microbatch", "packing") if name in objective}
    return state_on(
        tiny_classifier(family, classes, dtype=torch.float64),
        folder,
        examples=documents(classes),
        eval_examples=documents(classes, 5, seed=1),
        fast=fast,
        classes=classes,
        objective=config.Objective("classification", multi_label=classes.is_multi, **objective),
        train=config.Train(max_steps=steps, tokens_per_step=50, **train),
    )


def plain_loop(state: TrainingState, family: str, classes: Classes) -> Tensor:
    """Train the same texts with PEFT, torch and transformers' own class: a padded batch a step, the mean over it."""
    settings = state.cfg.adapter
    model = get_peft_model(
        tiny_classifier(family, classes, dtype=torch.float64),
        LoraConfig(
            r=settings.r, lora_alpha=settings.lora_alpha, task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2",
            target_modules=sorted(state.model.peft_config["default"].target_modules),
        ),
    ).eval()  # fmt: skip
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == state.start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=state.cfg.optim.lr, weight_decay=0.0)
    objective = state.cfg.objective
    weights = classes.weights(objective.class_weights, balanced=objective.balanced)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    for step in state.steps:
        batch = [state.examples[i] for i in step]
        texts = [torch.from_numpy(e.ids[: e.prompt_end].astype(np.int64)) for e in batch]
        ids = pad_sequence(texts, batch_first=True, padding_value=PAD)
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        if classes.is_multi:
            targets = torch.zeros(len(batch), len(classes.names) + 1, dtype=torch.float64)
            for row, example in enumerate(batch):
                targets[row, example.ids[example.prompt_end :]] = 1.0
            smooth = targets[:, :-1] * (1 - objective.label_smoothing) + objective.label_smoothing / 2
            loss = (
                binary_cross_entropy_with_logits(logits, smooth, pos_weight=weight, reduction="sum") / smooth.shape[1]
            )
        else:
            targets = torch.tensor([int(e.ids[-1]) for e in batch])
            smoothing = objective.label_smoothing
            loss = cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="sum")
        optimizer.zero_grad()
        loss.backward()  # divided afterwards: llama's norms round gradients to float32
        for parameter in parameters.values():
            parameter.grad /= len(batch)
        optimizer.step()
    return torch.cat([p.detach().flatten() for _, p in sorted(parameters.items())])


STEADY = config.Optim(lr=1e-3, schedule=config.Schedule.constant, max_grad_norm=0.0)
CASES = [
    ("llama", ONE, {"tokens_per_microbatch": 25, "label_smoothing": 0.1}),
    ("gpt2", SEVERAL, {"balanced": True, "label_smoothing": 0.2, "tokens_per_microbatch": 30, "steps": 4}),
    ("qwen3", ONE, {"class_weights": {"good": 3.0}, "steps": 4}),
    ("llama", SEVERAL, {"fast": False, "steps": 3}),
    pytest.param("qwen3", ONE, {"class_weights": {"good": 3.0}}, marks=pytest.mark.nightly),
    pytest.param("gpt2", SEVERAL, {"balanced": True, "label_smoothing": 0.2}, marks=pytest.mark.nightly),
    pytest.param("llama", ONE, {}, marks=pytest.mark.nightly),
    pytest.param("gpt2", ONE, {"balanced": True}, marks=pytest.mark.nightly),
    pytest.param("qwen3", SEVERAL, {"packing": False, "steps": 10}, marks=pytest.mark.nightly),
]
FAMILIES = [
    "llama",
    "gpt2",
    *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gpt_neox", *HEADED_MIXTURES)),
]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("family", "classes", "options"), CASES, ids=str)
def test_a_classifier_matches_a_plain_peft_loop(
    family: str, classes: Classes, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(state_on.__globals__["SETTINGS"], "optim", STEADY)
    state = state_of(tmp_path, family, classes, **options)
    assert state.paths.packs and state.paths.supervised_rows_only == options.get("fast", True)
    found = trained(state)
    expected = plain_loop(state, family, classes)
    start = torch.cat([p.flatten() for _, p in sorted(state.start.items())])
    assert (found - expected).norm() < 1e-6 * (expected - start).norm()
    lines = runs.read_metrics(tmp_path)
    assert {0, options.get("steps", 50)} == {line["step"] for line in lines if "eval_accuracy" in line}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_logits_of_the_plain_class(family: str) -> None:
    dtype = torch.float32 if family in MIXTURES else torch.float64  # torch has no grouped products in float64
    model = tiny_classifier(family, ONE, dtype=dtype)
    examples = documents(ONE, 6)
    made = accelerate(model, config.Fast())
    batches = micro_batches(examples, None, made.paths.share_a_pass)
    with torch.no_grad():
        found = torch.cat([class_logits(model, batch, made.paths) for batch in batches])
        made.restore()
        plain = torch.cat([class_logits(model, batch, PLAIN_PATHS) for batch in batches])
        own = [model(input_ids=batch.ids[None, s : e - 1]).logits for batch in batches
               for s, e in zip(batch.starts, batch.starts[1:], strict=False)]  # fmt: skip
    torch.testing.assert_close(plain, torch.cat(own), rtol=0, atol=0)
    rounding = 1e-4 if family in MIXTURES else 1e-6
    assert (found - plain).norm() <= rounding * plain.norm()


def test_a_resumed_classifier_has_the_same_bytes(tmp_path: Path) -> None:
    whole = trained(state_of(tmp_path / "whole", "llama", ONE, steps=7))
    first = state_of(tmp_path / "parts", "llama", ONE, steps=7)
    trained(first, until=3)
    checkpoint.save(first)
    again = state_of(tmp_path / "parts", "llama", ONE, steps=7)
    checkpoint.resume(again)
    assert again.step == 3
    assert torch.equal(trained(again), whole)
