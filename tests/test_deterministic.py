"""train.deterministic: the kernels of a run, what it needs before CUDA starts, and what is restored after it."""

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finished import settings

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError
from lora_ft.ops.ranks import ALONE
from lora_ft.sweeps import jobs, worker
from lora_ft.training import deterministic, shared
from lora_ft.training.deterministic import deterministic_kernels, fix_workspace

CPU, CUDA, NAME = torch.device("cpu"), torch.device("cuda:0"), "CUBLAS_WORKSPACE_CONFIG"


def mode() -> tuple[bool, bool, bool]:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fills


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the variable, and after the test what it has set."""
    monkeypatch.setenv(NAME, "")
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_mode_lasts_for_the_block_and_is_restored_after_an_error(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        for is_on in (True, False):
            with pytest.raises(ZeroDivisionError), deterministic_kernels(is_on, CPU):
                assert mode() == ((True, False, False) if is_on else (*before, True))
                raise ZeroDivisionError
            assert mode() == (*before, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_workspace_is_fixed_before_cuda_starts(variable, monkeypatch) -> None:
    with deterministic_kernels(True, CPU):
        assert NAME not in os.environ
    with deterministic_kernels(True, CUDA):
        assert os.environ[NAME] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    fix_workspace()  # set already
    monkeypatch.setenv(NAME, ":16:8")
    fix_workspace()


def test_workspace_that_cannot_be_fixed_is_an_error(variable, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=rf"deterministic=true needs {NAME}=:4096:8 before CUDA.*is not set: set it"):
        fix_workspace()
    assert mode()[0] is False and NAME not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(NAME, ":0:0")
    with pytest.raises(ConfigError, match="but it is :0:0"):
        fix_workspace()


@pytest.mark.parametrize("is_on", [True, False])
def test_job_trains_in_its_mode(is_on: bool, tmp_path: Path, monkeypatch) -> None:
    """The command, the Python API and the jobs of a sweep all call train_job."""
    train, seen = importlib.import_module("lora_ft.train"), []
    monkeypatch.setattr(train, "_train_job", lambda *_: seen.append(mode()[0]))
    cfg = config.TrainRun(device="cpu", train=config.Train(deterministic=is_on))
    train.train_job(cfg, tmp_path, shared=SimpleNamespace(ranks=ALONE, base=None))
    assert seen == [is_on] and mode()[0] is False


def test_run_fixes_the_workspace_before_it_looks_at_the_device(tmp_path: Path, monkeypatch) -> None:
    order = []
    monkeypatch.setattr(shared, "fix_workspace", lambda: order.append("workspace"))
    monkeypatch.setattr(shared, "check_machine", lambda cfg: order.append("device"))
    cfg = settings(tmp_path, "llama")
    shared.prepare(cfg)
    cfg.train.deterministic = True
    shared.prepare(cfg)
    assert order == ["device", "workspace", "device"]


def test_worker_fixes_the_workspace_for_its_later_jobs(tmp_path: Path, monkeypatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(worker, "fix_workspace", lambda: done.append("workspace"))
    monkeypatch.setattr(worker, "_stop_at_end_of_stdin", lambda: None)
    monkeypatch.setattr(worker.Worker, "run", lambda _, group: done.append(len(group)) or 0)
    for last in (False, True):
        cfgs = [config.TrainRun(), config.TrainRun(train=config.Train(deterministic=last))]
        group = [jobs.to_plain(jobs.Job(n, tmp_path / str(n), cfg, [])) for n, cfg in enumerate(cfgs)]
        order = {"jobs": group, "heartbeat": "beat", "sweep": validation.to_plain(config.Sweep()),
                 "watch_stdin": True}  # fmt: skip
        (tmp_path / "order.json").write_text(json.dumps(order))
        monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "order.json")])
        assert worker.main() == 0
    assert done == [2, "workspace", 2]


def test_resumed_run_cannot_change_its_mode(tmp_path: Path) -> None:
    runs.create(tmp_path / "run", validation.to_plain(config.TrainRun()), [])
    changed = config.TrainRun(train=config.Train(deterministic=True))
    with pytest.raises(ConfigError, match=r"train\.deterministic: False -> True"):
        runs.reopen(tmp_path / "run", changed)


def test_values_are_those_that_torch_accepts() -> None:
    """torch raises for any other value in front of a product of matrices."""
    assert deterministic._FIXED == (":4096:8", ":16:8")
