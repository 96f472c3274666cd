"""A step reads values from the device once; with train.log_every_steps several steps are read together."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from states import Observer, some_rows, state_on, trained
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ft import config, runs
from lora_ft.data.packing import micro_batches
from lora_ft.errors import Interrupted, NonFiniteError
from lora_ft.ops import device
from lora_ft.ops.batch import Batch
from lora_ft.training import checkpoint, trainer
from lora_ft.training.signals import Stop
from lora_ft.training.state import TrainingState
from lora_ft.training.trainer import fit

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values read by Python, and operations with sizes that they decide."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, read: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            self.names.append(name)
            return read(*arguments, **options)

        return counted

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            self.names.append(name)
        index = arguments[1] if name == "aten::index" else ()
        if any(i is not None and i.dtype is torch.bool for i in index):
            self.names.append("aten::index by a mask")
        return function(*arguments, **(options or {}))


def state_of(folder: Path, steps: int = 6, packing: bool = True, **train: object) -> TrainingState:
    train = {"tokens_per_step": 60, "tokens_per_microbatch": 30, "gradient_checkpointing": "off"} | train
    settings = config.Train(max_steps=steps, packing=packing, **train)
    return state_on(tiny_model("llama"), folder, train=settings, fast=True)


def reads_of_a_step(state: TrainingState, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the reads of step 2 without the making of its batches, which are on the host."""
    fit(state, until=1)
    made = {}

    def on_the_device(*arguments: object) -> list[Batch]:
        return made["batches"]

    chosen = [state.examples[i] for i in state.steps[1]]
    train = state.cfg.train
    made["batches"] = [
        batch.to(torch.device("cpu")) for batch in micro_batches(chosen, train.tokens_per_microbatch, train.packing)
    ]
    assert len(made["batches"]) > 1
    monkeypatch.setattr(trainer, "micro_batches", on_the_device)
    with monkeypatch.context() as patched, Reads(patched) as reads:
        trainer._step(state, trainer.Callbacks([]), {}, None, audited=False)
    return reads.names


@pytest.mark.parametrize("packing", [True, False])
def test_step_reads_from_the_device_once(packing: bool, tmp_path: Path, monkeypatch) -> None:
    state = state_of(tmp_path, packing=packing)
    assert reads_of_a_step(state, monkeypatch) == ["tolist"]


def test_step_that_is_not_logged_reads_nothing(tmp_path: Path, monkeypatch) -> None:
    state = state_of(tmp_path, log_every_steps=10)
    assert reads_of_a_step(state, monkeypatch) == []
    assert state.step == 2 and len(state.losses) == 1


def test_documents_of_a_batch_keep_the_indices_of_the_host(monkeypatch) -> None:
    (batch,) = micro_batches(some_rows(5), None, packing=True)
    moved = batch.to(torch.device("cpu"))
    expected = [(Batch(d.ids, d.positions, d.targets, d.starts)) for d in batch.documents()]
    expected = [(d.supervised, d.counts) for d in expected]
    with monkeypatch.context() as patched, Reads(patched) as reads:
        found = [(d.supervised, d.counts) for d in moved.documents()]
    assert reads.names == []
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(found, expected, strict=True))


def test_batch_is_copied_to_a_gpu_from_pinned_memory(monkeypatch) -> None:
    copies = []
    monkeypatch.setattr(device, "_target_of", lambda _: device.GPU)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone().requires_grad_(False))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: (copies.append((a, k)), tensor)[1])
    (batch,) = micro_batches(some_rows(3), None, packing=True)
    moved = batch.to(torch.device("cuda:0"))
    assert copies == [((torch.device("cuda:0"),), {"non_blocking": True})] * 4
    assert torch.equal(moved.supervised, batch.supervised) and moved.counts == batch.counts


# --- train.log_every_steps --------------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in runs.read_metrics(folder)]


@pytest.mark.parametrize("every", [2, 4, 100])
def test_logging_less_often_changes_no_byte_and_no_line(every: int, tmp_path: Path) -> None:
    """Evaluations at steps 0, 5 and 7, checkpoints at 3, 6 and 7."""
    seen, adapters = {}, []
    for name, number in (("each", 1), ("some", every)):
        train = {"log_every_steps": number, "save_every_steps": 3, "eval_every_steps": 5}
        settings = config.Train(max_steps=7, tokens_per_step=60, keep_checkpoints=9, **train)
        state = state_on(tiny_model("llama"), tmp_path / name, train=settings, eval_examples=some_rows(3, seed=9))
        seen[name] = Observer()
        fit(state, [seen[name]])
        adapters.append(state.flat.values)
        assert not state.unread and len(state.losses) == state.step == 7
        assert state.tokens == sum(line["tokens"] for line in runs.read_metrics(tmp_path / name) if line["step"])
    assert torch.equal(*adapters)
    assert lines_of(tmp_path / "some") == lines_of(tmp_path / "each")
    assert [m["step"] for m in seen["some"].seen] == [m["step"] for m in seen["each"].seen] == [*range(8)]


def test_metrics_are_written_together_after_that_many_steps(tmp_path: Path) -> None:
    """At the last step too, which is not a multiple."""
    called: list[tuple[int, int]] = []
    state = state_of(tmp_path, steps=7, log_every_steps=3, save_every_steps=None)
    fit(state, [Observer(lambda s, m: called.append((m["step"], s.step)))])
    assert called == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (7, 7)]
    rates = [line["tokens_per_second"] for line in runs.read_metrics(tmp_path)]
    assert rates[:3] == pytest.approx([rates[0]] * 3) and rates[3:6] == pytest.approx([rates[3]] * 3)
    assert state.seconds == pytest.approx(sum(line["seconds"] for line in runs.read_metrics(tmp_path)))


def test_unread_nonfinite_step_stops_training_before_a_checkpoint(tmp_path: Path) -> None:
    state = state_of(tmp_path, log_every_steps=100, save_every_steps=4)
    hooked = next(iter(state.parameters.values()))
    hooked.register_hook(lambda gradient: gradient * (float("inf") if state.step == 1 else 1.0))
    with pytest.raises(NonFiniteError, match=r"step 2: loss \d.*rows rows:.*last checkpoint: none"):
        fit(state)
    assert [line["step"] for line in runs.read_metrics(tmp_path)] == [1]
    assert not (tmp_path / checkpoint.FOLDER).exists()


def test_signal_writes_the_unread_steps_before_its_checkpoint(tmp_path: Path) -> None:
    whole = trained(state_of(tmp_path / "whole"))
    state, stop = state_of(tmp_path / "run", log_every_steps=100), Stop()
    take = state.optimizer.step
    state.optimizer.step = lambda: (take(), stop.ask(signal.SIGTERM) if state.step == 2 else None)
    with pytest.raises(Interrupted):
        fit(state, stop=stop)
    assert [line["step"] for line in runs.read_metrics(tmp_path / "run")] == [1, 2, 3]
    resumed = state_of(tmp_path / "run", log_every_steps=100)
    checkpoint.resume(resumed)
    assert resumed.step == 3 and torch.equal(trained(resumed), whole)
