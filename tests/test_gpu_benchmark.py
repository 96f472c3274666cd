"""benchmarks/gpu.py runs every stage without a GPU, and keeps what is finished whatever happens to a stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_stages import bases, checks, commands, fast_paths, profiling, setting, table

from lora_ft import config

BENCHMARKS = Path(gpu.__file__).parent
STAGES = [stage.name for stage in gpu.STAGES]
QUICK = ("machine", "predictions", "unsloth_peer")  # the other ones take 80 s


@pytest.fixture(scope="module")
def dry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run the stages of the chosen tests once, as a user would; return the records by stage."""
    items = (item for item in request.session.items if item.name.startswith("test_dry_stage_has_no_failure["))
    chosen = [item.callspec.params["stage"] for item in items] or QUICK
    out = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--deadline", "2400", "--out", str(out)]
    command += ["--stages", ",".join(chosen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines == out.read_text().splitlines()
    assert table.markdown([json.loads(line) for line in lines]) in done.stdout
    return {record["stage"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage in QUICK else pytest.mark.nightly) for stage in STAGES]
)
def test_dry_stage_has_no_failure(stage: str, dry: dict[str, dict[str, Any]]) -> None:
    record = dry[stage]
    assert record["outcome"] == "done", record
    assert record["parts"] and not any("failed" in part for part in record["parts"].values())


def test_dry_run_skips_only_what_needs_a_gpu_or_another_package(dry: dict[str, dict[str, Any]]) -> None:
    skipped = {part["skipped"] for record in dry.values() for part in record["parts"].values() if "skipped" in part}
    known = ("needs a CUDA device", "needs a GPU", "is not installed")
    assert [reason for reason in skipped if not any(words in reason for words in known)] == []


@pytest.mark.nightly
def test_dry_run_measures_every_training(dry: dict[str, dict[str, Any]]) -> None:
    parts = {name: part for stage in ("qlora_8b", "mixed_0_6b", "peers") for name, part in dry[stage]["parts"].items()}
    speeds = {name: part["tokens_per_second"] for name, part in parts.items() if "tokens_per_second" in part}
    assert {"64 tokens", "32 tokens", "peft, 8B nf4, 64 tokens", "lora_ft, 8B nf4, 64 tokens"} <= speeds.keys()
    assert min(speeds.values()) > 0
    product = dry["product"]["parts"]
    assert all(product[name]["same"] for name in ("same bytes", "same bytes, deterministic", "killed and resumed"))
    assert 0 < product["killed and resumed"]["killed_after_steps"] < 40
    assert product["sweep"]["failure"]["exit_code"] == 7
    assert dry["qlora_8b"]["parts"]["64 tokens, profiled"]["operators"] > 100
    traced = dry["qlora_8b"]["parts"]["64 tokens, traced"]
    assert 0 < traced["predicted_allocated_bytes"] < traced["predicted_reserved_bytes"]
    assert sum(traced["terms"].values()) == traced["predicted_driver_bytes"]
    assert "seconds_per_step" in traced["differences"]  # memory of a CPU is not compared here


# ---- the driver ----

SCRIPTS = {
    "good": 'part({"part": "one", "tokens_per_second": 5.0})',
    "wrong": 'part({"part": "one", "failed": "differs"}); part({"part": "two"})',
    "raising": 'part({"part": "one"}); raise ValueError("no such kernel")',
    "crashing": 'part({"part": "one"}); os.kill(os.getpid(), signal.SIGSEGV)',
    "hanging": 'part({"part": "one"}); subprocess.Popen(["sleep", "100"]); time.sleep(100)',
    "half": 'part({"part": "one"}); file.write(\'{"part": "tw\'); file.flush(); sys.exit(3)',
}
PREAMBLE = """
import json, os, signal, subprocess, sys, time
file = open(sys.argv[1], "a")
def part(values):
    file.write(json.dumps(values) + "\\n"); file.flush()
"""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage run the script of its name."""

    def command(stage: gpu.Stage, parts: Path, work: Path, dry: bool) -> list[str]:
        return [sys.executable, "-c", PREAMBLE + SCRIPTS[stage.name], str(parts)]

    monkeypatch.setattr(gpu, "command", command)


def run(tmp_path: Path, *names: str, seconds: float = 60, each: float = 5) -> list[dict[str, Any]]:
    stages = [gpu.Stage(name, each) for name in names]
    deadline, out = time.monotonic() + seconds, tmp_path / "out.jsonl"
    records = gpu.run_stages(stages, deadline, out, tmp_path, dry=True, stop=gpu.Stop())
    assert not list(tmp_path.glob("*.parts"))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records
    return records


@pytest.mark.usefixtures("scripted")
def test_every_bad_end_of_a_stage_is_a_line_and_the_next_stage_runs(tmp_path: Path) -> None:
    records = run(tmp_path, "wrong", "raising", "crashing", "half", "good")
    outcomes = {record["stage"]: (record["outcome"], record["reason"]) for record in records}
    assert outcomes["wrong"] == ("failed", "one: differs")
    assert outcomes["raising"] == ("failed", "ValueError: no such kernel")
    assert outcomes["crashing"][0] == "crashed" and "SIGSEGV" in outcomes["crashing"][1]
    assert outcomes["half"][0] == "failed"
    assert outcomes["good"] == ("done", "")
    assert all("one" in record["parts"] for record in records)  # what was finished before the end


@pytest.mark.usefixtures("scripted")
def test_hanging_stage_ends_at_its_share_with_its_children(tmp_path: Path) -> None:
    before = sleeping()
    hanging, good = run(tmp_path, "hanging", "good", seconds=4, each=2)
    assert (hanging["outcome"], good["outcome"]) == ("timeout", "done")
    assert hanging["parts"] == {"one": {}} and 1.9 < hanging["seconds"] < 3.5
    assert sleeping() <= before


def sleeping() -> set[str]:
    """Return the processes `sleep 100` of this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == b"sleep\x00100\x00":
                found.add(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.usefixtures("scripted")
def test_stages_that_do_not_fit_the_deadline_are_skipped_with_the_reason(tmp_path: Path) -> None:
    records = run(tmp_path, "good", "good", seconds=1.0, each=10)
    assert [record["outcome"] for record in records] == ["skipped"] * 2
    assert "of 10 s needed" in records[0]["reason"]


def driver(tmp_path: Path) -> "subprocess.Popen[bytes]":
    """Start the driver in a process of its own, with a good stage and one that hangs."""
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
scripts = {SCRIPTS!r}
gpu.STAGES = [gpu.Stage("good", 50), gpu.Stage("hanging", 50), gpu.Stage("wrong", 50)]
gpu.command = lambda stage, parts, *_: [sys.executable, "-c", {PREAMBLE!r} + scripts[stage.name], str(parts)]
sys.exit(gpu.main(["--dry", "--deadline", "300", "--out", {str(tmp_path / "out.jsonl")!r}]))
"""
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "out.jsonl").exists() and bool(sleeping()))
    return started


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_of_the_driver_ends_the_stage_and_keeps_all_lines(tmp_path: Path) -> None:
    before = sleeping()
    started = driver(tmp_path)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 128 + signal.SIGTERM
    good, hanging, wrong = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["outcome"] == "done" and hanging["outcome"] == "stopped" and wrong["outcome"] == "skipped"
    assert hanging["parts"] == {"one": {}} and hanging["reason"] == wrong["reason"] == "SIGTERM"
    assert sleeping() <= before


def test_killed_driver_leaves_the_finished_lines(tmp_path: Path) -> None:
    before = sleeping()
    started = driver(tmp_path)
    started.kill()
    started.wait()
    (good,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["outcome"] == "done"
    for pid in sleeping() - before:  # a scripted stage does not watch its stdin
        os.kill(int(pid), signal.SIGKILL)


def test_stage_process_ends_when_its_stdin_closes(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = gpu.command(gpu.Stage("machine", 1), tmp_path / "parts", work, dry=True)
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL
    assert not work.exists()


def test_a_gpu_that_is_not_there_is_the_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    record = gpu.run_stage(gpu.Stage("machine", 1), 60, tmp_path, tmp_path / "parts", False, gpu.Stop())
    assert record["outcome"] == "failed" and "finds no usable GPU" in record["reason"]


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert [stage.name for stage in gpu.arguments(["--stages", "ops,machine"]).stages] == ["machine", "ops"]
    with pytest.raises(SystemExit):
        gpu.arguments(["--stages", "ops,op"])
    assert "there is no op" in capsys.readouterr().err


def test_table_shows_figures_failures_and_skipped_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "4096 tokens": {"tokens_per_second": 9700.4, "allocated_bytes": 8 * 2**30},
        "4096 tokens, traced": {"predicted_allocated_bytes": 7.5 * 2**30, "predicted_driver_bytes": 9 * 2**30},
        "rope": {"failed": "a|b"},
        "fine": {"error": 0.1},
    }
    record = {"stage": "qlora_8b", "outcome": "failed", "reason": "rope: a|b", "seconds": 70.4, "parts": parts}
    (tmp_path / "out.jsonl").write_text(json.dumps(record) + "\n")
    assert gpu.main(["--table", str(tmp_path / "out.jsonl")]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["qlora_8b", ""], ["qlora_8b", "4096 tokens"], ["qlora_8b", "rope"]]
    assert rows[1][2:] == ["9,700", "8.00 (7.50, -6.2%)", "", "(9.00)", "", ""]
    assert rows[2][-1] == "failed: a/b" and {len(row) for row in rows} == {8}


# ---- parts of the stages ----


def test_failed_part_is_a_reason_and_frees_its_tensors() -> None:
    import weakref

    seen: list[weakref.ref[torch.Tensor]] = []

    def fail() -> dict[str, Any]:
        held = torch.zeros(3)
        seen.append(weakref.ref(held))
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    assert setting.attempt(fail)["failed"].startswith("OutOfMemoryError: Tried to allocate 9 GiB")
    assert seen[0]() is None


def test_part_of_something_absent_is_skipped() -> None:
    def absent() -> dict[str, Any]:
        raise setting.NotHere("trl is not installed")

    assert setting.attempt(absent) == {"skipped": "trl is not installed"}


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan", "nothing"])
def test_comparison_detects_each_difference(wrong: str) -> None:
    def fast(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        if wrong == "value":
            return y * 1.05
        if wrong == "gradient":
            return y.detach() + (0.05 * x - (0.05 * x).detach())
        return y / 0 * 0 if wrong == "nan" else y

    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = checks.compare(fast, torch.sin, [x])
    assert ("failed" in found) == (wrong != "nothing")
    assert wrong != "gradient" or found["failed"].startswith("gradient 0")
    json.dumps(found, allow_nan=False)


def test_missing_gradient_fails_the_comparison() -> None:
    found = checks.compare(lambda x, y: (x * y.detach()).sum()[None], lambda x, y: (x * y).sum()[None],
                           [torch.ones(3).bfloat16(), torch.ones(3).bfloat16()])  # fmt: skip
    assert found["failed"] == "gradient 1 is missing"


def test_profile_counts_launches_idle_time_and_synchronisations() -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 0, "dur": 30},
        {"cat": "kernel", "name": "gemm", "ts": 20, "dur": 20},  # on another stream
        {"cat": "kernel", "name": "add", "ts": 60, "dur": 10},
        {"cat": "gpu_memcpy", "name": "DtoH", "ts": 90, "dur": 10},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 95, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 99, "dur": 5},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5},
        {"name": "process_name", "ph": "M"},
    ]
    found = profiling.summary(events)
    assert (found["launches"], found["copies_and_fills"], found["synchronisations"]) == (3, 1, 1)
    assert found["idle_share"] == pytest.approx(0.4)  # busy for 40 + 10 + 10 of 100
    assert found["longest"][0] == ["gemm", 0.05, 2]


def test_every_fast_setting_is_varied() -> None:
    named = {variant.partition("=")[0] for variant in fast_paths.variants()}
    assert named == {f"fast.{name}" for name in config.Fast.__dataclass_fields__}


def test_rows_have_their_lengths_and_the_same_tokens_for_all_trainers(tmp_path: Path) -> None:
    from lora_ft.models.load import read_tokenizer

    where = setting.Setting(tmp_path, dry=True)
    lengths = bases.mixed_lengths(300, 40)
    assert sum(lengths) == 300 and max(lengths) <= 40
    assert sum(bases.equal_lengths(64, 3, 16)) == 64 * 3
    rows = bases.write_rows(where, lengths, "rows")
    bases.write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path, "tiny")
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    documents = [row.tolist() for batch in bases.batches_of(rows, 100, 3) for row in batch]
    assert documents == [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts][: len(documents)]
    assert [len(document) for document in documents] == lengths[: len(documents)]


def test_base_of_the_8b_shape_has_the_published_number_of_parameters() -> None:
    from transformers import AutoModelForCausalLM

    counts = {}
    for shape in ("llama3_1_8b", "qwen3_0_6b", "smollm2_135m"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(bases.config_for(shape))
        counts[shape] = sum(parameter.numel() for parameter in model.parameters())
    assert counts == {"llama3_1_8b": 8_030_261_248, "qwen3_0_6b": 596_049_920, "smollm2_135m": 134_515_008}


def test_commands_start_anew_where_a_gpu_is(tmp_path: Path) -> None:
    """A process that is started anew, as on a GPU, and one that fails."""
    where = setting.Setting(tmp_path, dry=False)
    commands.start(where, "help", "train", "--help").finish()
    assert "train.tokens_per_step" in (tmp_path / "help.log").read_text()
    with pytest.raises(RuntimeError, match=r"wrong: exit code 2: .*trian"):
        commands.start(where, "wrong", "trian").finish()
