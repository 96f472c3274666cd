"""Several ranks train the adapter of one process, and end together."""

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
from accelerated import relative
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft import config, runs
from lora_ft.adapters import peft_folder
from lora_ft.errors import ConfigError
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.training.ranks import joined

HERE = Path(__file__).parent
FEW = ("rank without work", "dropout", "several labels", "nf4")


def environments(size: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of `size` ranks on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def started(size: int, *command: object, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    words = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True, cwd=cwd) for env in environments(size)
    ]


def ended(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Wait for ranks; return their exit codes, outputs and errors."""
    found = [rank.communicate(timeout=1800) for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in found], [err for _, err in found]


def compared(out: Path, size: int, cases: tuple[str, ...]) -> None:
    """Train cases with `size` ranks and in this process, and compare what comes out."""
    base = tiny_folder(out, "llama")
    codes, _, errors = ended(started(size, HERE / "ranked.py", out, base, *cases))
    assert codes == [0] * size, errors
    for case in cases:
        alone = ranked.result(case, out / "alone" / case, base, ALONE)
        bound = 1e-6 if case in ranked.FLOAT32 else 1e-12
        for mode in ("ddp", "shard"):
            found = json.loads((out / mode / f"{case}.json").read_text())
            ours, theirs = (torch.tensor(each["adapter"], dtype=torch.float64) for each in (found, alone))
            assert relative(ours, theirs) < bound, (case, mode)
            assert found["losses"] == pytest.approx(alone["losses"], rel=bound), (case, mode)
            assert [e["step"] for e in found["evaluations"]] == [e["step"] for e in alone["evaluations"]]
            for ours, theirs in zip(found["evaluations"], alone["evaluations"], strict=True):
                assert ours["result"]["loss"] == pytest.approx(theirs["result"]["loss"], rel=bound)
                assert ours["result"]["metrics"] == pytest.approx(theirs["result"]["metrics"], rel=bound)
                assert ours["result"]["rows"] == theirs["result"]["rows"]
        assert found["held"] <= found["at_most"]


@pytest.mark.closes("A03")
def test_two_ranks_train_the_adapter_of_one_process(tmp_path: Path) -> None:
    compared(tmp_path, 2, FEW)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_the_adapter_of_one_process_in_every_case(tmp_path: Path, size: int) -> None:
    compared(tmp_path, size, tuple(ranked.CASES))


WORDS = ("train.max_steps=8", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=4",
         "adapter.lora_dropout=0.1", "optim.lr=0.01", "data.eval_fraction=0.4", "train.samples=1",
         "train.eval_every_steps=3", "train.save_every_steps=1", "device=cpu", "model=local")  # fmt: skip


def overrides(tmp_path: Path, run: str, *more: str) -> list[str]:
    base = tmp_path / "llama" if (tmp_path / "llama").is_dir() else tiny_folder(tmp_path, "llama")
    rows = tmp_path / "rows.jsonl" if (tmp_path / "rows.jsonl").is_file() else rows_file(tmp_path)
    given = (*WORDS, f"model.path={base}", f"data.path={rows}", f"hydra.run.dir={tmp_path / run}", *more)
    return list({word.partition("=")[0]: word for word in given}.values())


def train(tmp_path: Path, run: str, *more: str, size: int = 2) -> list[subprocess.Popen[str]]:
    return started(size, "-m", "lora_ft.train", *overrides(tmp_path, run, *more), cwd=tmp_path)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def metrics(run: Path) -> list[dict[str, Any]]:
    return runs.read_metrics(run)


def values(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def messages(errors: list[str]) -> list[str]:
    """Return the error messages that ranks have written."""
    return [line for text in errors for line in text.splitlines() if re.match("lora-ft: ", line)]


def test_two_ranks_write_one_run_folder(tmp_path: Path) -> None:
    assert call("train", *overrides(tmp_path, "alone")) == 0
    codes, outputs, errors = ended(train(tmp_path, "two"))
    assert codes == [0, 0] and messages(errors) == []
    assert outputs[1] == "" and errors[1] == "", "the second rank writes nothing"
    assert str(tmp_path / "two" / "adapter") in outputs[0]
    alone, two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in alone]
    for name in ("loss", "grad_norm", "eval_loss", "tokens", "micro_batches"):
        assert values(two, name) == pytest.approx(values(alone, name), rel=1e-5)
    names = [{path.name for path in (tmp_path / run).rglob("*")} for run in ("alone", "two")]
    assert names[0] == names[1]
    # The two ranks left off where one process goes on, and says so.
    codes, _, errors = ended(train(tmp_path, "two", "train.max_steps=12", "resume=auto", size=1))
    assert codes == [0] and "ranks was 2, is 1" in errors[0]
    assert call("train", *overrides(tmp_path, "alone", "train.max_steps=12", "resume=auto")) == 0
    for name in ("loss", "grad_norm"):
        found = [values(metrics(tmp_path / run), name) for run in ("alone", "two")]
        assert len(found[0]) == 12 and found[0] == pytest.approx(found[1], rel=1e-5)


def killed(tmp_path: Path, run: str, generator: random.Random, size: int, *more: str) -> None:
    """Start or resume a run, kill one of its ranks at a random moment, and wait for the others."""
    folder = tmp_path / run
    before = (folder / runs.METRICS).read_bytes().count(b"\n") if (folder / runs.METRICS).exists() else 0
    ranks = train(tmp_path, run, "resume=auto", *more, size=size)
    until = time.monotonic() + 120
    wanted = before + generator.randint(1, 3)
    while all(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        if (folder / runs.METRICS).exists() and (folder / runs.METRICS).read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.01)
    time.sleep(generator.random() * 0.1)
    victim = generator.randrange(size)
    ranks[victim].send_signal(signal.SIGKILL)
    codes, _, errors = ended(ranks)
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if codes[victim] == -signal.SIGKILL and set(others) != {0}:
        assert set(others) == {7}, errors
        assert len(messages(errors)) == 1 and "another rank has ended" in messages(errors)[0], errors


@pytest.mark.nightly
def test_rank_that_is_killed_ends_all_and_the_run_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    assert ended(train(tmp_path, "whole"))[0] == [0, 0]
    killed(tmp_path, "killed", random.Random(0), 2)
    assert ended(train(tmp_path, "killed", "resume=auto"))[0] == [0, 0]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["ddp", "shard"])
def test_ranks_killed_twenty_times_end_with_the_same_adapter(tmp_path: Path, mode: str) -> None:
    long = ("train.max_steps=60", "train.save_every_steps=2", f"dist={mode}")
    assert ended(train(tmp_path, "whole", *long, size=3))[0] == [0, 0, 0]
    generator = random.Random(1)
    for _ in range(20):
        killed(tmp_path, "killed", generator, 3, *long)
    assert ended(train(tmp_path, "killed", "resume=auto", *long, size=3))[0] == [0, 0, 0]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.nightly
def test_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    long = ("train.max_steps=400", "train.save_every_steps=null")
    ranks = train(tmp_path, "run", *long)
    while not (tmp_path / "run" / runs.METRICS).exists():
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    codes, _, errors = ended(ranks)
    assert codes == [143, 143] and len(messages(errors)) == 1
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 400", messages(errors)[0])[1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08d}"]


@pytest.mark.nightly
def test_rank_that_hangs_is_found_by_the_timeout(tmp_path: Path) -> None:
    ranks = train(tmp_path, "run", "train.max_steps=400", "dist.timeout=5")
    while not (tmp_path / "run" / runs.METRICS).exists():
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    found = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 7
    assert len(messages([found[1]])) == 1 and "another rank does not answer (dist.timeout)" in found[1]
    assert any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["optim.lr=1e30", "optim.max_grad_norm=0"], 8, "gradient norm"),
        (["data.path=absent.jsonl"], 4, "absent.jsonl"),
        (["device=cuda:0"], 2, "device=cuda:0 is one GPU, and each rank needs its own"),
        (["dist=single"], 2, "dist=single trains in one process, got WORLD_SIZE=2"),
    ],
)
def test_error_ends_all_ranks_with_one_message(tmp_path: Path, more: list[str], code: int, text: str) -> None:
    codes, _, errors = ended(train(tmp_path, "run", *more))
    assert code in codes and 0 not in codes
    assert len(messages(errors)) == 1 and text in messages(errors)[0], errors


@pytest.mark.nightly
def test_torchrun_and_accelerate_launch_start_the_ranks(tmp_path: Path) -> None:
    for number, launcher in enumerate((
        ["torch.distributed.run", "--nproc-per-node=2", "--standalone"],
        ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=2", "--num_machines=1",
         "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
    )):  # fmt: skip
        words = [sys.executable, "-m", *launcher, "-m", "lora_ft.train", *overrides(tmp_path, f"run-{number}")]
        made = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=300)
        assert made.returncode == 0, made.stderr
        assert metrics(tmp_path / f"run-{number}")[-1]["step"] == 8
    assert weights(tmp_path / "run-0") == weights(tmp_path / "run-1")


def test_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(ConfigError, match="WORLD_SIZE=2 asks for several processes, but RANK is not set"),
        joined(config.Dist(), "cpu"),
    ):
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("shards", [False, True])
def test_micro_batches_are_dealt_once_and_balanced(size: int, shards: bool) -> None:
    generator = random.Random(size)
    tokens = [generator.randint(1, 100) for _ in range(11)]
    shares = [Ranks(rank, size, shards=shards).share(tokens) for rank in range(size)]
    counted = [[index for index, counts in share if counts] for share in shares]
    assert sorted(index for each in counted for index in each) == list(range(11))
    loads = [sum(tokens[index] for index in each) for each in counted]
    # Each rank got its last micro-batch when no other had fewer tokens.
    assert max(loads) - max(tokens) <= min(loads)
    assert not shards or len({len(share) for share in shares}) == 1
    turns = [list(Ranks(rank, size, shards=shards).turns(range(11))) for rank in range(size)]
    assert sorted(index for each in turns for index, counts in each if counts) == list(range(11))
    assert not shards or len({len(each) for each in turns}) == 1


def test_sweep_trains_each_job_in_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [word for word in overrides(tmp_path, "x") if not word.startswith("hydra.run.dir")]
    assert call("sweep", *words, "adapter.r=2,4", "dist=ddp", f"hydra.sweep.dir={tmp_path / 'sweep'}") == 2
    assert "dist=ddp is for one training" in capfd.readouterr().err
