"""The same command gives the same bytes, however often the run evaluates, saves and prints."""

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft.adapters import peft_folder

QUICK = ("train.max_steps=6", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=8",
         "optim.lr=0.01", "optim.schedule=cosine", "data.eval_fraction=0.4", "train.samples=0")  # fmt: skip
VARIANTS = {
    "dropout": ("adapter.lora_dropout=0.1",),
    "dora": ("adapter=dora",),
    "nf4": ("quant=nf4", "adapter.lora_dropout=0.1"),
    "adamw_8bit": ("optim=adamw_8bit",),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the overrides that name a tiny base and its rows."""
    folder = tmp_path_factory.mktemp("inputs")
    return ("model=local", f"model.path={tiny_folder(folder, 'llama')}", f"data.path={rows_file(folder)}", *QUICK)


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def trained(run: Path, *overrides: str) -> str:
    """Train in this process, after random numbers were drawn in it; return the hash of the adapter's file."""
    torch.rand(len(run.name))
    assert call("train", *overrides, f"hydra.run.dir={run}") == 0
    return sha256(run)


@pytest.fixture(scope="module")
def first(inputs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that trains a variant once and returns its hash."""
    return functools.cache(lambda name: trained(tmp_path_factory.mktemp(name) / "run", *inputs, *VARIANTS[name]))


@pytest.mark.closes("A23")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_command_twice_gives_the_same_adapter(
    name: str, inputs: tuple[str, ...], first: Callable[[str], str], tmp_path: Path
) -> None:
    assert trained(tmp_path / "second", *inputs, *VARIANTS[name]) == first(name)


def test_other_seeds_and_methods_give_other_adapters(
    inputs: tuple[str, ...], first: Callable[[str], str], tmp_path: Path
) -> None:
    assert len({*map(first, VARIANTS), trained(tmp_path / "other", *inputs, *VARIANTS["dropout"], "seed=1")}) == 5


@pytest.mark.closes("A23")
def test_installed_command_gives_the_same_bytes_as_this_process(
    inputs: tuple[str, ...], first: Callable[[str], str], tmp_path: Path
) -> None:
    """Process, folder and string hashes differ; only the number of threads is the same."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "7"}
    program = Path(sys.executable).with_name("lora-ft")
    overrides = [*inputs, *VARIANTS["nf4"], "device=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run([program, "train", *overrides], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert sha256(tmp_path / "run") == first("nf4")


@pytest.mark.parametrize(
    "change",
    [
        ("train.eval_every_steps=4", "train.eval_rows=1", "train.save_every_steps=3", "train.keep_checkpoints=2"),
        ("train.deterministic=true", "train.log_every_steps=4"),
        ("train.eval_every_steps=1", "track=tensorboard", "train.samples=1", "train.gradient_checkpointing=every_1"),
    ],
)
def test_frequency_of_evaluation_checkpoints_and_logging_changes_no_byte(
    change: tuple[str, ...], inputs: tuple[str, ...], first: Callable[[str], str], tmp_path: Path
) -> None:
    assert trained(tmp_path / "run", *inputs, *VARIANTS["dropout"], *change) == first("dropout")


def test_live_line_of_a_terminal_changes_no_byte(
    inputs: tuple[str, ...], first: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    assert trained(tmp_path / "run", *inputs, *VARIANTS["dropout"]) == first("dropout")
    assert "\x1b[2K" in capsys.readouterr().err, "a line was replaced"
