"""A job that fails frees its activations and its adapter, so that later work of the process has the memory."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from finished import settings
from torch import Tensor

from lora_ft import config, runs, validation
from lora_ft.errors import ResourceError
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import LossSum
from lora_ft.sweeps import jobs
from lora_ft.sweeps.worker import Heartbeat, Worker
from lora_ft.train import train_job
from lora_ft.training.shared import prepare
from lora_ft.training.signals import Stop

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")


@pytest.fixture
def activations(request, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Let the first loss fail when its graph is built; return references to its activations and to the adapter."""
    found: list[weakref.ref[Tensor]] = []
    own = Sft.loss

    def keep(output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            found.append(weakref.ref(output))

    def loss(*arguments: object) -> LossSum:
        model = arguments[1]
        if model.device.type == "meta":  # the trace for the advice
            return own(*arguments)
        for module in model.modules():
            module.register_forward_hook(lambda module, inputs, output: keep(output))
        found.extend(weakref.ref(p) for n, p in model.named_parameters() if ".lora_" in n)
        kept = own(*arguments)
        assert kept.sum.requires_grad and any(ref() is not None for ref in found)
        # A new one each time: an exception that is raised again keeps its earlier traceback.
        raise type(request.param)(*request.param.args)

    monkeypatch.setattr(Sft, "loss", loss)
    return found


def small(folder: Path) -> config.TrainRun:
    cfg = settings(folder, "llama")
    cfg.train = config.Train(max_steps=2, tokens_per_step=120, samples=0)
    cfg.data.eval_fraction = 0.0
    return cfg


@pytest.mark.parametrize("activations", [CUDA, CPU], indirect=True, ids=["cuda", "cpu"])
def test_caller_that_keeps_the_error_keeps_no_activation(activations, tmp_path: Path) -> None:
    cfg, run = small(tmp_path), tmp_path / "run"
    runs.create(run, validation.to_plain(cfg), [])
    shared = prepare(cfg)
    with pytest.raises(ResourceError, match=r"out of memory.*lower train\.tokens_per_microbatch") as held:
        train_job(cfg, run, shared)
    assert activations and not [ref for ref in activations if ref() is not None]
    assert held.value.exit_code == 7 and shared.base


@pytest.mark.parametrize("activations", [CUDA, ValueError("a bug")], indirect=True, ids=["memory", "bug"])
def test_failed_job_of_a_sweep_leaves_no_activation_to_the_next(activations, tmp_path: Path) -> None:
    job = jobs.Job(0, tmp_path / "0", small(tmp_path), [])
    worker = Worker(Heartbeat(tmp_path / "heartbeat.json"), Stop())
    gc.disable()  # the worker itself has to collect
    try:
        assert worker.run([job]) == 0
        alive = [ref for ref in activations if ref() is not None]
    finally:
        gc.enable()
    assert activations and not alive
    assert runs.read_failure(job.folder)["kind"] in ("ResourceError", "ValueError")


def test_cached_blocks_of_a_gpu_are_given_back(monkeypatch) -> None:
    from lora_ft.training.out_of_memory import out_of_memory_as_error

    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    with pytest.raises(ValueError, match="other"), out_of_memory_as_error():
        raise ValueError("other")
    assert not emptied
    with pytest.raises(ResourceError), out_of_memory_as_error():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert emptied
