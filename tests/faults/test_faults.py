"""A run that is killed, or whose disk is full or broken, at any operation: resumed, it gives the same bytes.

Every fifth operation, from a random one on; all of them with -m nightly.

Each test runs loop.py in a process of its own, which has one thread and forks for every fault, and judges its findings.
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


def check(folder: Path, record_property: Record, *words: str) -> None:
    """Let loop.py do what these words say, over a base of one layer: every fault fires, and none leaves a trace."""
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # its threads would forbid to fork
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, HERE / "loop.py", folder, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    for word in words:
        points, faults, failures, seconds = (outcomes[word][n] for n in ("points", "faults", "failures", "seconds"))
        kind = "random moments" if word[-1].isdigit() else "operations"
        figure = f"{kind} {points}, faults {faults}, failures {len(failures)} ({seconds:.0f} s)"
        record_property("figure", f"{word}: {figure}")
    assert [failure for word in words for failure in outcomes[word]["failures"]] == []
    assert all(outcomes[word]["faults"] >= outcomes[word]["points"] >= 10 for word in words)


@pytest.mark.closes("C01", "C03", "C04", "C05")
def test_run_killed_at_any_disk_operation_resumes_to_the_same_result(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, "fresh:kill:5", "continued:kill:5")


@pytest.mark.closes("C08")
def test_disk_error_at_any_operation_is_reported_and_loses_no_checkpoint(
    tmp_path: Path, record_property: Record
) -> None:
    check(tmp_path, record_property, "continued:full:5", "continued:broken:5")


@pytest.mark.closes("C01", "C03", "C11")
def test_kills_and_signals_at_random_moments_lose_no_checkpoint(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, "moments:20", "signals:10")


@pytest.mark.nightly
def test_faults_at_every_disk_operation(tmp_path: Path, record_property: Record) -> None:
    check(tmp_path, record_property, *LONG)
