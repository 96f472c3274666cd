"""Faults at disk operations: a run that is killed, or whose disk is full or broken, resumes to the same result.

Faults are at every seventh or ninth operation after a random first one, and at every operation with -m nightly. Each
test runs loop.py in its own single-threaded process, which forks for every fault, and checks its output.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

HERE = Path(__file__).resolve().parent
LONG = (
    "fresh:kill",
    "continued:kill",
    "continued:full",
    "continued:broken",
    "logged:kill",
    "logged:full",
    "logged:broken",
    "moments:300",
    "signals:50",
)

Record = Callable[[str, object], None]


def check(folder: Path, record_property: Record, *arguments: str) -> None:
    """Run loop.py with these arguments on a base of one layer; all faults must happen, and no resume may fail."""
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # a process with threads cannot fork safely
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, HERE / "loop.py", folder, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    for argument in arguments:
        points, faults, failures, seconds = (outcomes[argument][n] for n in ("points", "faults", "failures", "seconds"))
        kind = "random moments" if argument[-1].isdigit() else "operations"
        figure = f"{kind} {points}, faults {faults}, failures {len(failures)} ({seconds:.0f} s)"
        record_property("figure", f"{argument}: {figure}")
    assert [failure for argument in arguments for failure in outcomes[argument]["failures"]] == []
    assert all(outcomes[argument]["faults"] >= outcomes[argument]["points"] >= 10 for argument in arguments)


@pytest.mark.closes("C01", "C03", "C04", "C05")
def test_run_killed_at_any_disk_operation_resumes_to_the_same_result(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, "fresh:kill:9", "continued:kill:7")


@pytest.mark.closes("C08")
def test_disk_error_at_any_operation_is_reported_and_loses_no_checkpoint(
    tmp_path: Path, record_property: Record
) -> None:
    check(tmp_path, record_property, "continued:full:7", "continued:broken:7")


@pytest.mark.closes("C01", "C03", "C11")
def test_kills_and_signals_at_random_moments_lose_no_checkpoint(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, "moments:12", "signals:10")


@pytest.mark.nightly
def test_faults_at_every_disk_operation(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, *LONG)
