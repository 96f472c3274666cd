"""train predicts its memory first: it refuses what cannot fit, with advice, and never on assumed terms alone."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import call, rows_file, settings
from tiny import tiny_folder

from lora_ft import config, runs, validation
from lora_ft.errors import ResourceError
from lora_ft.memory import forecast
from lora_ft.memory.machine import Machine
from lora_ft.memory.prediction import predict
from lora_ft.memory.trace import trace_step
from lora_ft.memory.workload import of_rows
from lora_ft.models.meta_model import read_config
from lora_ft.ops.device import CPU
from lora_ft.train import train_job
from lora_ft.training import shared as shared_module
from lora_ft.training.shared import Shared, prepare


def prepared(folder: Path, **train: object) -> tuple[config.TrainRun, Path, Shared]:
    cfg, run = settings(folder, "llama"), folder / "run"
    cfg.train = config.Train(**({"max_steps": 2, "tokens_per_step": 120, "samples": 0} | train))
    cfg.data.eval_fraction = 0.0
    runs.create(run, validation.to_plain(cfg), [])
    return cfg, run, prepare(cfg)


def peak_of(cfg: config.TrainRun, shared: Shared) -> Any:
    return predict(cfg, read_config(cfg.model), of_rows(cfg, shared.rows.dataset), Machine("test", CPU, 10**12))


def with_memory(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(forecast, "resolve", lambda *_, **__: Machine("test", CPU, number))


def test_run_that_cannot_fit_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch) -> None:
    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
    mapped = sum(t.bytes for t in peak_of(cfg, shared).terms if t.name.startswith("base"))
    least = peak_of(cfg, shared).least_bytes - mapped
    with_memory(monkeypatch, least - 1)
    with pytest.raises(ResourceError, match="does not fit into the memory of test: its .* needs") as raised:
        train_job(cfg, run, shared)
    assert raised.value.exit_code == 7 and shared.base is None
    with_memory(monkeypatch, least)
    assert train_job(cfg, run, shared) is not None


def test_refusal_gives_changes_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with an adapter that is large for it: a smaller one fits."""
    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
    cfg.adapter.r = 1024
    found = peak_of(cfg, shared)
    with_memory(monkeypatch, found.peak_bytes // 2 - 1)
    with pytest.raises(ResourceError, match="Each of these lines fits:\n  ") as raised:
        train_job(cfg, run, shared)
    changes = re.search(r"adapter\.r=(\d+)", str(raised.value))
    smaller = dataclasses.replace(cfg, adapter=dataclasses.replace(cfg.adapter, r=int(changes[1])))
    assert peak_of(smaller, shared).peak_bytes <= found.peak_bytes // 2 - 1


def test_assumed_terms_only_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    cfg, run, shared = prepared(tmp_path)
    with_memory(monkeypatch, peak_of(cfg, shared).peak_bytes - 1)
    assert train_job(cfg, run, shared) is not None
    assert "the run may not fit into the memory of test" in caplog.text


def test_family_that_cannot_be_traced_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("no meta function")

    cfg, run, shared = prepared(tmp_path)
    with_memory(monkeypatch, 0)
    monkeypatch.setattr("lora_ft.memory.prediction.trace_step", fail)
    with caplog.at_level("INFO", "lora_ft"):
        assert train_job(cfg, run, shared).predicted_peak_bytes is None
    assert "the memory of this run cannot be predicted" in caplog.text


@pytest.mark.parametrize("number", [10**12, None])
def test_nothing_is_traced_if_memory_is_plentiful_or_unknown(number: int | None, tmp_path: Path, monkeypatch) -> None:
    cfg, run, shared = prepared(tmp_path)
    with_memory(monkeypatch, number)
    monkeypatch.setattr("lora_ft.memory.prediction.trace_step", None)
    assert train_job(cfg, run, shared) is not None


@pytest.mark.parametrize("fast", [True, False])
def test_cheap_bound_exceeds_the_predicted_peak(fast: bool, tmp_path: Path) -> None:
    from lora_ft.training.dry_run import dry_run

    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
    cfg.fast = dataclasses.replace(cfg.fast, attention=fast, loss=fast, lora=fast)
    check = dry_run(cfg, shared.rows, shared.tokenizer, run)
    assert forecast._bound(cfg, check, read_config(cfg.model)) >= peak_of(cfg, shared).trace.peak_bytes


def test_result_has_the_predicted_beside_the_measured_peak(tmp_path: Path, monkeypatch, capsys) -> None:
    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
    monkeypatch.setattr(forecast, "_SHARE_OF_TIME", 10**6)
    result = train_job(cfg, run, shared)
    assert result.predicted_peak_bytes == runs.read_result(run)["predicted_peak_bytes"]
    # The peak of this process is that of all tests; its prediction has the libraries and the tensors of this run.
    assert peak_of(cfg, shared).peak_bytes < result.predicted_peak_bytes <= 1.2 * result.peak_memory_bytes
    assert re.search(r"peak memory\s+[\d.]+ GB, [\d.]+ GB predicted", capsys.readouterr().out)


def test_only_the_jobs_of_a_sweep_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch) -> None:
    from lora_ft.sweeps import jobs
    from lora_ft.sweeps.worker import Heartbeat, Worker
    from lora_ft.training.signals import Stop

    cfg, _, shared = prepared(tmp_path, gradient_checkpointing="off")
    group = [jobs.Job(n, tmp_path / str(n), dataclasses.replace(cfg, adapter=config.Adapter(r=r)), []) for n, r in
             enumerate((512, 4))]  # fmt: skip
    with_memory(monkeypatch, peak_of(group[0].cfg, shared).least_bytes // 2)
    assert Worker(Heartbeat(tmp_path / "heartbeat.json"), Stop()).run(group) == 0
    assert runs.read_failure(group[0].folder)["kind"] == "ResourceError"
    assert runs.read_result(group[1].folder)["steps"] == 2


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from lora_ft.cli import entry
entry.run("train", sys.argv[2:])
"""


def limited(limit: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *overrides], env=environment, capture_output=True, text=True
    )


def test_advice_followed_under_a_real_limit_trains_to_its_end(tmp_path: Path) -> None:
    ...
