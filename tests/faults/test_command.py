"""SIGKILL for the installed command at random moments: resume=auto gives the adapter of an uninterrupted run."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft import runs
from lora_ft.adapters import peft_folder

PROGRAM = Path(sys.executable).with_name("lora-ft")
QUICK = ("train.max_steps=40", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=4",
         "adapter.lora_dropout=0.1", "optim.lr=0.01", "optim.schedule=cosine", "optim.warmup_steps=5",
         "data.eval_fraction=0.4", "train.samples=0", "train.eval_every_steps=20", "train.save_every_steps=2",
         "device=cpu")  # fmt: skip
METHODS = {"lora": (), "dora": ("adapter=dora",), "nf4": ("quant=nf4",)}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(folder: Path, method: str) -> tuple[str, ...]:
    base = folder / "llama" if (folder / "llama").is_dir() else tiny_folder(folder, "llama")
    return ("model=local", f"model.path={base}", f"data.path={rows_file(folder)}", *METHODS[method], *QUICK)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def started(run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [PROGRAM, "train", *overrides, f"hydra.run.dir={run}", "resume=auto"]
    null = subprocess.DEVNULL  # log.txt has all messages
    return subprocess.Popen(command, env=environment, stdout=null, stderr=null)


def lines(run: Path) -> int:
    metrics = run / runs.METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def interrupted(run: Path, overrides: tuple[str, ...], how: signal.Signals, longest: float) -> int:
    """Start or resume the run, send a signal at a random moment after its first step, and return the exit code."""
    before, process = lines(run), started(run, *overrides)
    while process.poll() is None and lines(run) in (0, before):
        time.sleep(0.005)
    time.sleep(random.uniform(0, longest))
    process.send_signal(how)
    return process.wait()


def check(run: Path, expected: str, steps: int = 40) -> None:
    assert weights(run) == expected
    assert [m["step"] for m in runs.read_metrics(run)] == list(range(steps + 1))


def reference(folder: Path, overrides: tuple[str, ...]) -> str:
    """Train in this process, which gives the same bytes as the installed command (test_same_bytes.py)."""
    assert call("train", *overrides, f"hydra.run.dir={folder / 'whole'}") == 0
    return weights(folder / "whole")


@pytest.mark.closes("C01", "C03")
def test_killed_command_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    overrides = (*inputs(tmp_path, "lora"), "train.max_steps=10", "train.eval_every_steps=5")
    expected = reference(tmp_path, overrides)
    assert interrupted(tmp_path / "run", overrides, signal.SIGKILL, 0.3) in (-signal.SIGKILL, 0)
    assert call("train", *overrides, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto") == 0
    check(tmp_path / "run", expected, 10)


@pytest.mark.nightly
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", METHODS)
def test_repeatedly_killed_command_resumes_to_the_same_adapter(method: str, tmp_path: Path) -> None:
    """At least seven kills for each method."""
    overrides = inputs(tmp_path, method)
    expected, kills, round_number = reference(tmp_path, overrides), 0, 0
    while kills < 7:
        round_number += 1
        run = tmp_path / f"run{round_number}"
        for _ in range(3):
            kills += interrupted(run, overrides, signal.SIGKILL, 0.2) == -signal.SIGKILL
        assert started(run, *overrides).wait() == 0
        check(run, expected)


@pytest.mark.nightly
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signal_sets_the_exit_code_of_the_command(how: signal.Signals, tmp_path: Path) -> None:
    overrides = inputs(tmp_path, "lora")
    expected = reference(tmp_path, overrides)
    assert interrupted(tmp_path / "run", overrides, how, 0.1) == 128 + how
    assert started(tmp_path / "run", *overrides).wait() == 0
    check(tmp_path / "run", expected)
