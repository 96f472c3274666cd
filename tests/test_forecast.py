"""train predicts its memory first: it refuses what cannot fit, with advice, and never on assumed terms alone."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished import settings
from tiny import SENTENCES, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_ft import config, runs, validation
from lora_ft.errors import ResourceError
from lora_ft.memory import forecast
from lora_ft.memory.machine import Machine
from lora_ft.memory.prediction import predict
from lora_ft.memory.workload import of_rows
from lora_ft.models.meta_model import read_config
from lora_ft.ops.device import CPU
from lora_ft.train import train_job
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
    with pytest.raises(ResourceError, match="does not fit into the memory of test: its ") as raised:
        train_job(cfg, run, shared)
    assert raised.value.exit_code == 7 and shared.base is None
    with_memory(monkeypatch, least)
    assert train_job(cfg, run, shared) is not None


def test_refusal_gives_changes_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with an adapter that is large for it: a smaller one fits."""
    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
    cfg.adapter.r = 16384
    limit = peak_of(cfg, shared).least_bytes * 3 // 4
    with_memory(monkeypatch, limit)
    with pytest.raises(ResourceError, match="Each of these lines fits:\n  ") as raised:
        train_job(cfg, run, shared)
    changes = re.search(r"adapter\.r=(\d+)", str(raised.value))
    smaller = dataclasses.replace(cfg, adapter=dataclasses.replace(cfg.adapter, r=int(changes[1])))
    assert peak_of(smaller, shared).peak_bytes <= limit


def test_assumed_terms_only_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    cfg, run, shared = prepared(tmp_path, gradient_checkpointing="off")
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


# Trains in a process whose address space is limited to MEGABYTES more than it has after a first, small run, as by
# ulimit -v. Prints the exit code of each command.
LIMITED = """
import resource, sys
from pathlib import Path
from lora_ft.cli import entry
from lora_ft.memory.forecast import Forecast

def train(*overrides):
    try:
        entry.run("train", [*sys.argv[3:], *overrides])
    except SystemExit as ended:
        return ended.code or 0

train("train.tokens_per_step=64", "train.gradient_checkpointing=every_1", "hydra.run.dir=first")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 10**6,) * 2)
exec(sys.argv[2])
"""

FOLLOW = """
from lora_ft.memory import advice
text = []
own = advice.Advice.__str__
advice.Advice.__str__ = lambda self: text.append(self.changes) or own(self)
print("unadvised", train("hydra.run.dir=unadvised"))
print("advised", train("hydra.run.dir=advised", *text[0]))
"""

SHRINK = """
Forecast.check = lambda self, _: self._machine  # so that the allocator itself fails
print("shrink", train("hydra.run.dir=shrink", "train.on_oom=shrink"))
print("stop", train("hydra.run.dir=stop"))
"""


def limited(folder: Path, megabytes: int, script: str) -> tuple[list[str], str]:
    """Run a script under a limit; return the lines with the exit codes, and stderr."""
    base = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=4096, vocab_size=512)  # fmt: skip
    AutoModelForCausalLM.from_config(base).save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    text = " ".join(SENTENCES[1:7]) * 10
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(24)))
    settings = ("model=local", "model.path=llama", "data.path=rows.jsonl", "data.eval_fraction=0",
                "data.max_length=2048", "train.samples=0", "train.max_steps=1", "train.tokens_per_step=32000",
                "device=cpu", "train.gradient_checkpointing=off")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), script, *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    codes = re.findall(r"^(?:unadvised|advised|stop|shrink) \w+$", done.stdout, re.MULTILINE)
    return codes, done.stderr


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v limits nothing elsewhere")
def test_advice_followed_under_a_real_limit_trains_to_its_end(tmp_path: Path) -> None:
    codes, messages = limited(tmp_path, 150, FOLLOW)
    assert codes == ["unadvised 7", "advised 0"], messages
    assert "the run does not fit into the memory of cpu" in messages
    assert not (tmp_path / "unadvised" / "adapter").exists()
    assert runs.read_result(tmp_path / "advised")["steps"] == 1


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v limits nothing elsewhere")
def test_allocator_that_fails_stops_the_run_or_shrinks_its_micro_batches(tmp_path: Path) -> None:
    codes, messages = limited(tmp_path, 150, SHRINK)
    assert codes == ["shrink 0", "stop 7"], messages
    assert re.search(r"out of memory \(can't allocate memory.*GB at the peak, .* GB predicted", messages)
    result = runs.read_result(tmp_path / "shrink")
    assert result["shrinks"] >= 1 and result["tokens_per_microbatch"] < 32000 and result["steps"] == 1
