"""train.on_oom=shrink: a step that runs out of memory is repeated in smaller micro-batches, with the same result."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from finished import call, rows_file
from states import Observer, detach, state_on
from tiny import tiny_folder, tiny_model
from torch import Tensor, nn

from lora_ft import config, runs
from lora_ft.errors import out_of_memory
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import LossSum
from lora_ft.training import checkpoint, trainer
from lora_ft.training.state import TrainingState
from lora_ft.training.trainer import fit


def cuda() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


class Failing(torch.autograd.Function):
    """The identity, whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise cuda()


def run_out(monkeypatch: pytest.MonkeyPatch, most: int, *, where: str = "forward", error: object = cuda) -> list[int]:
    """Let a training loss of more than `most` tokens fail; return a list that collects the tokens of each loss."""
    tokens: list[int] = []
    own = Sft.loss

    def loss(self: Sft, model: nn.Module, batch: object, paths: object) -> LossSum:
        found = own(self, model, batch, paths)
        if not torch.is_grad_enabled():
            return found
        tokens.append(len(batch.ids))
        if len(batch.ids) <= most:
            return found
        if where == "forward":
            raise error()
        return LossSum(Failing.apply(found.sum), found.weight, found.metrics)

    monkeypatch.setattr(Sft, "loss", loss)
    return tokens


def state_of(folder: Path, **train: object) -> TrainingState:
    settings = {"max_steps": 4, "tokens_per_step": 120, "on_oom": config.OnOom.shrink} | train
    return state_on(tiny_model("llama"), folder, train=config.Train(**settings), optim=config.Optim(lr=1e-2))


@pytest.mark.parametrize("where, error", [("forward", cuda), ("forward", cpu), ("backward", cuda)])
def test_losses_match_an_undisturbed_run(where: str, error: object, tmp_path: Path, monkeypatch) -> None:
    undisturbed = state_of(tmp_path / "undisturbed")
    fit(undisturbed)
    detach(undisturbed)
    tokens = run_out(monkeypatch, 70, where=where, error=error)
    seen, state = Observer(), state_of(tmp_path / "shrunk")
    fit(state, [seen])
    detach(state)
    assert max(tokens) > 70 and state.shrinks == 1
    assert state.tokens_per_microbatch == max(tokens) // 2
    assert state.losses == pytest.approx(undisturbed.losses, rel=1e-5)
    assert {m["tokens_per_microbatch"] for m in seen.seen} == {max(tokens) // 2}
    assert all(m["micro_batches"] > 1 for m in seen.seen)
    torch.testing.assert_close(state.flat.values, undisturbed.flat.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bytes_match_a_run_with_the_smaller_micro_batch_from_that_step_on(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two steps fit, and the third runs out of memory, after its first micro-batch."""
    adapter = config.Adapter(r=4, lora_dropout=dropout)

    def start(name: str) -> TrainingState:
        train = config.Train(max_steps=4, tokens_per_step=120, on_oom=config.OnOom.shrink, tokens_per_microbatch=100)
        return state_on(tiny_model("llama"), tmp_path / name, train=train, adapter=adapter, optim=config.Optim())

    known, state = start("known"), start("shrunk")
    fit(known, until=2)
    fit(state, until=2)
    tokens = run_out(monkeypatch, 60)
    fit(state)
    assert state.shrinks >= 1
    monkeypatch.undo()
    known.tokens_per_microbatch = state.tokens_per_microbatch
    fit(known)
    assert tokens and torch.equal(known.flat.values, state.flat.values) and known.losses == state.losses
    for each in (known, state):
        detach(each)


def test_micro_batch_shrinks_to_the_longest_row_and_then_the_run_stops(tmp_path: Path, monkeypatch) -> None:
    state = state_of(tmp_path)
    longest = max(len(example.ids) for example in state.examples)
    tokens = run_out(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        fit(state)
    assert state.tokens_per_microbatch == longest == tokens[-1] and state.step == 0
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) == len(tokens)
    detach(state)


@pytest.mark.parametrize("train", [{"on_oom": config.OnOom.stop}, {"packing": False}], ids=str)
def test_run_stops_if_it_may_not_or_cannot_shrink(train: dict, tmp_path: Path, monkeypatch) -> None:
    state = state_of(tmp_path, **train)
    tokens = run_out(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        fit(state)
    assert len(tokens) == 1 and state.shrinks == 0
    detach(state)


def test_other_errors_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(tmp_path)
    tokens = run_out(monkeypatch, 0, error=lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        fit(state)
    assert len(tokens) == 1
    detach(state)


def test_step_that_fails_in_the_optimizer_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of the update may be done."""
    state = state_of(tmp_path)
    calls = []
    own = trainer.loss_sums
    monkeypatch.setattr(trainer, "loss_sums", lambda *a, **k: calls.append(1) or own(*a, **k))

    def step() -> None:
        raise cuda()

    state.optimizer.step = step
    with pytest.raises(torch.OutOfMemoryError):
        fit(state)
    assert len(calls) == 1 and state.shrinks == 0
    detach(state)


def test_activations_of_the_failed_attempt_are_freed_before_the_next(tmp_path: Path, monkeypatch) -> None:
    state = state_of(tmp_path)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    own = Sft.loss

    def loss(self: Sft, model: nn.Module, batch: object, paths: object) -> LossSum:
        alive.append(sum(ref() is not None for ref in kept))
        hooks = [m.register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o))) for m in leaves]
        found = own(self, model, batch, paths)
        for hook in hooks:
            hook.remove()
        if len(alive) == 1:
            raise cuda()
        return found

    leaves = [m for n, m in state.base.named_modules() if n.endswith("layers.0.mlp")]
    monkeypatch.setattr(Sft, "loss", loss)
    gc.disable()
    try:
        fit(state, until=1)
    finally:
        gc.enable()
    assert len(kept) > 1 and alive[:2] == [0, 0]
    detach(state)


QUICK = ("model=local", "train.max_steps=6", "train.tokens_per_step=160", "adapter.r=2", "adapter.lora_dropout=0.1",
         "optim.lr=0.01", "data.eval_fraction=0", "train.samples=0", "train.save_every_steps=2")  # fmt: skip


def test_resumed_run_keeps_the_smaller_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part of the run, in which nothing fails, has the bytes of a run that was not interrupted."""
    tiny_folder(tmp_path, "llama")
    inputs = (*QUICK, f"model.path={tmp_path / 'llama'}", f"data.path={rows_file(tmp_path)}", "train.on_oom=shrink")
    results = {}
    for name in ("whole", "parts"):
        with monkeypatch.context() as patch:
            run_out(patch, 70)
            steps = 6 if name == "whole" else 4
            assert call("train", *inputs, f"hydra.run.dir={tmp_path / name}", f"train.max_steps={steps}",
                        "optim.schedule=constant") == 0  # fmt: skip
            if name == "whole":
                results[name] = runs.read_result(tmp_path / name)
    assert call("train", f"resume={tmp_path / 'parts'}", "train.max_steps=6") == 0
    results["parts"] = runs.read_result(tmp_path / "parts")
    assert results["whole"]["shrinks"] == results["parts"]["shrinks"] >= 1
    assert results["whole"]["tokens_per_microbatch"] == results["parts"]["tokens_per_microbatch"] <= 80
    assert results["whole"]["adapter_sha256"] == results["parts"]["adapter_sha256"]


def test_stopped_run_names_its_checkpoint_and_what_to_change(tmp_path: Path, monkeypatch, capfd) -> None:
    tiny_folder(tmp_path, "llama")
    run = tmp_path / "run"
    inputs = (*QUICK, f"model.path={tmp_path / 'llama'}", f"data.path={rows_file(tmp_path)}", f"hydra.run.dir={run}")
    with monkeypatch.context() as patch:
        own, calls = trainer.loss_sums, []

        def fail(state: TrainingState, *a: object, **k: object) -> object:
            calls.append(state.base.device.type)
            if calls[-1:] == ["cpu"] and len(calls) == 4:  # the trace of the advice is on the meta device
                raise cpu()
            return own(state, *a, **k)

        patch.setattr(trainer, "loss_sums", fail)
        assert call("train", *inputs) == 7
    message = capfd.readouterr().err
    last = checkpoint.newest(run)
    assert last == run / "checkpoints" / "step-00000002"
    assert "out of memory (can't allocate memory): " in message and "GB at the peak, " in message
    assert f"last checkpoint: {last}; continue with: lora-ft train resume={run} " in message
    words = message.partition("continue with: lora-ft train ")[2].splitlines()[0].split()
    assert call("train", *words) == 0
    assert runs.read_result(run)["steps"] == 6


def test_errors_are_recognized() -> None:
    assert all(out_of_memory("train", make()) for make in (cuda, cpu, MemoryError))
    assert out_of_memory("train", RuntimeError("a bug")) is None
