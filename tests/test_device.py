"""Devices: what auto means on each GPU, the current CUDA device, GPUs that torch cannot use, and what is recorded."""

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finished import call, finished_run
from states import some_rows, state_on
from tiny import tiny_model

from lora_ft import config, runs
from lora_ft.errors import ConfigError
from lora_ft.models import device, gpus
from lora_ft.ops.ranks import ALONE
from lora_ft.training import checkpoint, metrics
from lora_ft.training.trainer import fit

BOTH = ["sm_70", "sm_80", "sm_90", "compute_90"]


class FakeCuda:
    """CUDA with one GPU for each compute capability; `current` lists the devices that were made the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        self.current: list[int | None] = []
        self.name = "NVIDIA Test"

        def properties(which: torch.device | int) -> SimpleNamespace:
            number = which if isinstance(which, int) else which.index
            major, minor = capabilities[number]
            return SimpleNamespace(name=self.name, major=major, minor=minor, total_memory=8 << 30)

        def capability(which: torch.device | int) -> tuple[int, int]:
            return properties(which).major, properties(which).minor

        fakes = {
            "_is_compiled": lambda: True,
            "init": lambda: None,
            "device_count": lambda: len(capabilities),
            "get_arch_list": lambda: BOTH,
            "get_device_capability": capability,
            "get_device_name": lambda which: properties(which).name,
            "get_device_properties": properties,
            "device": self._select,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def _select(self, which: torch.device) -> "FakeCuda":
        self.current.append(which.index)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.current.append(None)


@pytest.fixture(autouse=True)
def each_warning_is_new():
    device._warn_once.cache_clear()


# --- the dtype of a device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((6, 1), torch.float32, "float32: NVIDIA Test has compute capability 6.1, and float16 is fast from 7.0"),
        ((7, 0), torch.float16, "float16: NVIDIA Test has compute capability 7.0, and bfloat16 needs 8.0"),
        ((7, 5), torch.float16, "float16: NVIDIA Test has compute capability 7.5, and bfloat16 needs 8.0"),
        ((8, 0), torch.bfloat16, None),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_dtype_auto_asks_the_gpu_of_the_run(capability, dtype, reason, monkeypatch) -> None:
    """The other GPU has the opposite capability: asking the current device would give its dtype."""
    other = (7, 5) if capability >= (8, 0) else (9, 0)
    FakeCuda(monkeypatch, other, capability)
    chosen = torch.device("cuda:1")
    assert device.resolve_dtype(config.Dtype.auto, chosen) is dtype
    found = device.auto_dtype(chosen)[1]
    assert found is None if reason is None else f"model.dtype=auto is {reason}" in found


# --- the current device -----------------------------------------------------------------------------------------------


def test_training_has_its_device_as_the_current_one(tmp_path: Path, monkeypatch) -> None:
    """The command, the Python API and the jobs of a sweep all call train_job."""
    inside: list[int | None] = []
    train = importlib.import_module("lora_ft.train")
    cuda = FakeCuda(monkeypatch, (9, 0), (9, 0))
    monkeypatch.setattr(train, "_train_job", lambda *_: inside.append(cuda.current[-1]))
    cfg = config.TrainRun(device="cuda:1")
    assert train.train_job(cfg, tmp_path, shared=SimpleNamespace(ranks=ALONE, base=None)) is None
    assert inside == [1] and cuda.current == [1, None]


def test_peak_memory_of_a_gpu_begins_with_each_job(monkeypatch) -> None:
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for is_initialized in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda known=is_initialized: known)
        for name in ("cpu", "cuda:1"):
            metrics.reset_peak_memory(torch.device(name))
    assert reset == [torch.device("cuda:1")]


@pytest.mark.parametrize("command", ["eval", "chat", "merge"])
def test_commands_select_the_device(command: str, tmp_path: Path, monkeypatch) -> None:
    run, seen = finished_run(tmp_path, "llama"), []
    module = importlib.import_module(f"lora_ft.{command}")
    monkeypatch.setattr(module, "selected", lambda chosen: seen.append(chosen) or device.selected(chosen))
    more = {"chat": ["prompt=hello", "sampling.max_new_tokens=1"], "merge": [f"out={tmp_path / 'out'}"]}
    assert call(command, f"run={run}", *more.get(command, [])) == 0
    assert seen == [torch.device("cpu")]


# --- GPUs that torch cannot use ---------------------------------------------------------------------------------------


def visible(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "nvidia0").touch()
    monkeypatch.setattr(gpus, "_FILES", ((str(folder), "nvidia[0-9]*"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: False)
    return "is built without CUDA"


def old_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    FakeCuda(monkeypatch, (9, 0))  # the driver counts a GPU that CUDA then rejects

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update.\nMore.")

    monkeypatch.setattr(torch.cuda, "init", init)
    return "too old (found version 11040). Please update."


def old_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    FakeCuda(monkeypatch, (6, 1))
    return "cuda:0 (NVIDIA Test) has compute capability 6.1, and torch"


@pytest.mark.parametrize("broken", [without_cuda, old_driver, old_gpu])
def test_gpu_that_torch_cannot_use_is_reported(broken, tmp_path: Path, monkeypatch, caplog) -> None:
    visible(monkeypatch, tmp_path)
    reason = broken(monkeypatch)
    for _ in range(2):
        assert device.resolve_device("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lora_ft", logging.WARNING)
    assert reason in record.getMessage() and "(device=cpu hides this)" in record.getMessage()
    assert "\n" not in record.getMessage()
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError) as error:
            device.resolve_device(name)
        assert f"device={name} is not available" in str(error.value) and reason in str(error.value)


def test_device_cpu_neither_warns_nor_starts_cuda(tmp_path: Path, monkeypatch, caplog) -> None:
    visible(monkeypatch, tmp_path)
    monkeypatch.setattr(gpus, "usable", lambda: 1 / 0)
    assert device.resolve_device("cpu") == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_machine_without_a_gpu_or_with_a_hidden_one_is_not_warned(hidden: str, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(gpus, "_FILES", ((str(tmp_path), "nvidia[0-9]*"),))
    without_cuda(monkeypatch)
    assert device.resolve_device("auto") == torch.device("cpu")
    visible(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device.resolve_device("auto") == torch.device("cpu")
    assert not caplog.records


def test_auto_takes_the_first_gpu_that_has_kernels(monkeypatch, caplog) -> None:
    FakeCuda(monkeypatch, (6, 1), (8, 6))
    assert device.resolve_device("auto") == device.resolve_device("cuda") == torch.device("cuda:1")
    assert not caplog.records
    with pytest.raises(
        ConfigError, match=r"device=cuda:0 is not available.*capability 6\.1.*choose one of cuda:1, cpu"
    ):
        device.resolve_device("cuda:0")


@pytest.mark.parametrize(
    ("architecture", "runs_on", "not_on"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (9, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
    ],
)
def test_architectures_run_on_their_capabilities(architecture, runs_on, not_on) -> None:
    assert all(gpus._runs_on(capability, architecture) for capability in runs_on)
    assert not any(gpus._runs_on(capability, architecture) for capability in not_on)


# --- records ----------------------------------------------------------------------------------------------------------


def test_environment_records_the_gpu_and_its_driver(tmp_path: Path, monkeypatch) -> None:
    FakeCuda(monkeypatch, (9, 0))
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\nGCC 12.3.0\n")
    monkeypatch.setattr(device, "_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    facts = device.describe(torch.device("cuda:0"))
    assert facts == {
        "device": "cuda:0", "gpu": "NVIDIA Test", "gpu_memory_bytes": 8 << 30, "compute_capability": "9.0",
        "driver": "570.86.10", "cuda": "12.8",
    }  # fmt: skip
    runs.create(tmp_path / "run", {}, [])
    runs.record_device(tmp_path / "run", facts)
    runs.record_device(tmp_path / "run", {"device": "cpu"})  # a resume: the file keeps where the run began
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found == runs.environment() | {"device": facts}
    driver.unlink()
    assert device.describe(torch.device("cuda:0"))["driver"] is None
    assert device.describe(torch.device("cpu")) == {"device": "cpu"}


def test_resume_on_another_gpu_is_logged(tmp_path: Path, monkeypatch, caplog) -> None:
    for number, name in enumerate(["NVIDIA H200", "NVIDIA A100"]):
        monkeypatch.setattr(checkpoint, "describe", lambda _, name=name: {"device": "cuda:0", "gpu": name})
        state = state_on(tiny_model("llama"), tmp_path, examples=some_rows(6))
        checkpoint.resume(state)
        fit(state, until=number + 1)
    (warning,) = [record.getMessage() for record in caplog.records if "another environment" in record.getMessage()]
    assert warning.endswith("may differ in its last bits: gpu was NVIDIA H200, is NVIDIA A100")


def test_memory_of_a_gpu_is_allocated_reserved_and_used(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 8))
    assert metrics.peak_memory_bytes(torch.device("cuda:0")) == 1
    assert metrics.gpu_memory(torch.device("cuda:0")) == {"peak_reserved_bytes": 2, "device_used_bytes": 3}
    assert metrics.gpu_memory(torch.device("cpu")) == {}
    assert metrics.peak_memory_bytes(torch.device("cpu")) > 10**8
