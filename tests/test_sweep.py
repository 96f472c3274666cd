"""Sweeps with real training: shared bases, failures, halving, and resuming give the bytes of single runs."""

import contextlib
import dataclasses
import itertools
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
from finished import call, rows_file, settings
from test_resume import inputs, weights
from tiny import tiny_folder

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError
from lora_ft.sweeps import jobs, worker
from lora_ft.sweeps.halving import Halving
from lora_ft.sweeps.worker import Heartbeat, Worker
from lora_ft.train import train_job
from lora_ft.training import checkpoint
from lora_ft.training.callbacks import Callback
from lora_ft.training.finish import Result
from lora_ft.training.shared import prepare
from lora_ft.training.signals import Stop

PLANTED = Path(__file__).parent / "sweeps" / "planted"
PROGRAM = Path(sys.executable).with_name("lora-ft")


def varied(tmp_path: Path, quant: str) -> list[config.TrainRun]:
    """Jobs that may share a base: they differ in rank, scale, method, targets, dropout, rate, steps, schedule, seed."""
    base = settings(tmp_path, "llama", quant=quant)
    base.train = config.Train(max_steps=6, tokens_per_step=120, samples=0, eval_every_steps=3, save_every_steps=4)
    base.optim = config.Optim(lr=0.01)
    changes: list[dict[str, Any]] = [
        {"adapter": config.Adapter(r=2, lora_alpha=4)},
        {
            "adapter": config.Adapter(r=6, lora_alpha=4, lora_dropout=0.2),
            "optim": config.Optim(lr=0.003, lora_plus_ratio=4),
        },
        {"adapter": config.Adapter(r=3, lora_alpha=6, use_dora=True, lora_dropout=0.1), "seed": 5},
        {"adapter": config.Adapter(r=4, use_rslora=True, target_modules=["q_proj", "v_proj"])},
        {
            "train": dataclasses.replace(
                base.train, max_steps=4, tokens_per_step=90, tokens_per_microbatch=60, packing=False
            )
        },
        {
            "train": dataclasses.replace(
                base.train, keep=config.Keep.best, eval_every_steps=1, gradient_checkpointing="every_1"
            )
        },
        {"optim": config.Optim(lr=0.02, schedule=config.Schedule.cosine, warmup_steps=2, max_grad_norm=0.1), "seed": 9},
    ]
    return [dataclasses.replace(base, **change) for change in changes]


def alone(cfg: config.TrainRun, folder: Path) -> Result:
    """Train a run as `lora-ft train` does."""
    runs.create(folder, validation.to_plain(cfg), [])
    result = train_job(cfg, folder, prepare(cfg))
    assert result
    return result


def together(cfgs: list[config.TrainRun], folder: Path, halving: Halving | None = None) -> list[dict[str, Any]]:
    """Train jobs in one worker on one base; return their results, {} for one that failed."""
    group = [jobs.Job(n, folder / str(n), cfg, []) for n, cfg in enumerate(cfgs)]
    made = Worker(Heartbeat(folder / "heartbeat.json"), Stop())
    folder.mkdir()
    assert (made.run_with_halving(group, halving) if halving else made.run(group)) == 0
    return [runs.read_result(job.folder) if (job.folder / runs.RESULT).is_file() else {} for job in group]


@pytest.mark.closes("E05")
@pytest.mark.parametrize("quant", [pytest.param("none", marks=pytest.mark.nightly), "nf4"])
def test_jobs_on_a_shared_base_train_the_same_bytes_as_alone(quant: str, tmp_path: Path) -> None:
    """One of the jobs fails; it changes neither the base nor the jobs after it."""
    cfgs = varied(tmp_path, quant)
    expected = [alone(cfg, tmp_path / f"alone{n}") for n, cfg in enumerate(cfgs)]
    broken = dataclasses.replace(cfgs[0], optim=config.Optim(lr=1e30, max_grad_norm=0), adapter=config.Adapter(r=5))
    found = together([*cfgs[:3], broken, *cfgs[3:]], tmp_path / "together")
    assert runs.read_failure(tmp_path / "together" / "3")["kind"] == "NonFiniteError"
    assert found.pop(3) == {}
    for key in ("adapter_sha256", "eval_loss", "base_eval_loss"):
        assert [r[key] for r in found] == [getattr(r, key) for r in expected]
    assert len({r["adapter_sha256"] for r in found}) == len(cfgs)
    for number, job in enumerate(n for n in range(len(cfgs) + 1) if n != 3):
        assert steps_of(tmp_path / "together" / str(job)) == steps_of(tmp_path / f"alone{number}")


def steps_of(folder: Path) -> list[tuple[int, Any, Any]]:
    return [(m["step"], m.get("loss"), m.get("eval_loss")) for m in runs.read_metrics(folder)]


@pytest.mark.parametrize("change", [{"quant": config.Quant(config.QuantKind.nf4)}, {"device": "cpu"},
                                    {"fast": config.Fast(lora=False)}, {"data": config.Data(path="elsewhere")},
                                    {"model": config.Model(path="other")},
                                    {"adapter": config.Adapter(modules_to_save=["lm_head"])}])  # fmt: skip
def test_jobs_with_different_bases_rows_or_code_paths_share_no_base(change: dict[str, Any], tmp_path: Path) -> None:
    cfg = config.TrainRun()
    other = dataclasses.replace(cfg, **change)
    given = [jobs.Job(n, tmp_path, c, []) for n, c in enumerate([cfg, other, cfg, other])]
    assert [[j.number for j in g] for g in jobs.grouped(given, True)] == [[0, 2], [1, 3]]
    assert len(jobs.grouped(given, False)) == 4


def test_job_with_added_tokens_shares_no_base(tmp_path: Path) -> None:
    cfg = dataclasses.replace(config.TrainRun(), model=config.Model(added_tokens=["<a>"]))
    assert len(jobs.grouped([jobs.Job(n, tmp_path, cfg, []) for n in range(2)], True)) == 2


def test_job_round_trips_through_json(tmp_path: Path) -> None:
    cfg = config.TrainRun()
    cfg.adapter.rank_pattern, cfg.data.system, cfg.quant.kind = (
        {"layers.0.q_proj": 3},
        "${x} \\${y}",
        config.QuantKind.nf4,
    )
    job = jobs.Job(3, tmp_path / "3", cfg, ["adapter.r=4", "data.system=${x}"])
    assert jobs.from_plain(json.loads(json.dumps(jobs.to_plain(job)))) == job


@pytest.mark.closes("A24")
def test_sweep_of_ranks_with_one_lora_alpha_warns(tmp_path: Path) -> None:
    def warnings(*adapters: config.Adapter) -> list[str]:
        cfgs = [dataclasses.replace(config.TrainRun(), adapter=adapter) for adapter in adapters]
        return warned([jobs.Job(n, tmp_path, cfg, []) for n, cfg in enumerate(cfgs)], config.Sweep())

    [warning] = warnings(config.Adapter(r=4, lora_alpha=32), config.Adapter(r=16, lora_alpha=32))
    assert "falls from 8 to 2" in warning and "adapter.lora_alpha=${adapter.r}" in warning and "rslora" in warning
    assert not warnings(config.Adapter(r=4, lora_alpha=4), config.Adapter(r=16, lora_alpha=16))
    assert not warnings(config.Adapter(r=4, use_rslora=True), config.Adapter(r=16, use_rslora=True))
    assert not warnings(config.Adapter(r=4, lora_alpha=32), config.Adapter(r=4, lora_alpha=64))


def warned(given: list[jobs.Job], sweep: config.Sweep, *, share: bool = True) -> list[str]:
    return list(jobs.warnings(given, jobs.grouped(given, share), sweep))


def test_halving_without_jobs_to_compare_is_an_error_and_with_a_single_job_warns(tmp_path: Path) -> None:
    def made(*changes: dict[str, Any]) -> list[jobs.Job]:
        cfgs = [dataclasses.replace(config.TrainRun(), **change) for change in changes]
        return [jobs.Job(n, tmp_path, cfg, []) for n, cfg in enumerate(cfgs)]

    halving, seeds = config.Sweep(halving=True), [{"seed": 1}, {"seed": 2}]
    other = {"quant": config.Quant(config.QuantKind.nf4)}
    tokens = {"model": config.Model(added_tokens=["<a>"])}
    assert warned(made(*seeds), halving) == []
    [warning] = warned(made(*seeds, other), halving)
    assert "sweep.halving compares job 2 with no other job" in warning
    later = [dataclasses.replace(job, number=2) for job in made({})]  # the last batch of a sweeper, by itself
    [warning] = warned(later, halving)
    assert "sweep.halving compares job 2 with no other job" in warning
    for given, share in ((made(*seeds), False), (made(tokens, tokens), True), (made({}, other), True)):
        with pytest.raises(ConfigError, match=r"sweep\.halving=true has no jobs to compare"):
            warned(given, halving, share=share)
    short = [{"train": config.Train(max_steps=20)}] * 2
    with pytest.raises(ConfigError, match=r"sweep\.min_steps must be below train\.max_steps"):
        warned(made(*short), halving)
    assert warned(made(*short), config.Sweep(halving=True, min_steps=19)) == []


def test_halving_stops_the_higher_losses_and_does_not_change_the_other_jobs(tmp_path: Path) -> None:
    cfgs = six(tmp_path)
    results = together(cfgs, tmp_path / "together", Halving(eta=2, min_steps=2))
    folders = [tmp_path / "together" / str(n) for n in range(6)]
    steps = [results[n]["steps"] for n in range(6)]
    assert sorted(steps) == [2, 2, 2, 4, 8, 10]  # of six jobs three continue, then two, then one
    at = {rung: {n: m["eval_loss"] for n in range(6) for m in runs.read_metrics(folders[n]) if m["step"] == rung}
          for rung in (2, 4, 8)}  # fmt: skip
    for rung, losses in at.items():
        stopped = [n for n in losses if steps[n] == rung]
        assert min(losses[n] for n in stopped) >= max(losses[n] for n in losses if n not in stopped)
        for n in stopped:
            assert f"halving at step {rung}" in results[n]["stopped_by"] and results[n]["stopped_early"]
    [winner] = [n for n in range(6) if steps[n] == 10]
    assert results[winner]["stopped_by"] is None
    assert alone(cfgs[winner], tmp_path / "alone").adapter_sha256 == results[winner]["adapter_sha256"]
    for n, folder in enumerate(folders):
        assert [m["step"] for m in runs.read_metrics(folder)] == list(range(steps[n] + 1))


def six(tmp_path: Path) -> list[config.TrainRun]:
    """Jobs of ten steps that differ in their learning rate."""
    base = settings(tmp_path, "llama")
    base.train = config.Train(max_steps=10, tokens_per_step=120, samples=0)
    return [dataclasses.replace(base, optim=config.Optim(lr=lr)) for lr in (1e-5, 0.03, 1e-4, 0.01, 1e-3, 3e-4)]


@pytest.mark.parametrize(
    "last", [pytest.param(8, marks=pytest.mark.nightly), 10, pytest.param(12, marks=pytest.mark.nightly)]
)
def test_interrupted_halving_stops_the_same_jobs_once_resumed(last: int, tmp_path: Path, monkeypatch) -> None:
    """Calls 1-6 train to rung 2, 7-9 end three jobs there, 10-12 train to rung 4, 13 ends one there."""
    cfgs = six(tmp_path)
    expected = [result["steps"] for result in together(cfgs, tmp_path / "whole", Halving(eta=2, min_steps=2))]
    calls = itertools.count(1)

    def interrupted(*given: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return train_job(*given)

    folder = tmp_path / "interrupted"
    monkeypatch.setattr(worker, "train_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together(cfgs, folder, Halving(eta=2, min_steps=2))
    group = [jobs.from_checkpoint(jobs.Job(n, folder / str(n), cfg, [])) for n, cfg in enumerate(cfgs)]
    left = [job for job in group if not runs.is_finished(job.folder, job.cfg)]
    monkeypatch.setattr(worker, "train_job", train_job)
    assert Worker(Heartbeat(tmp_path / "beat"), Stop()).run_with_halving(left, Halving(eta=2, min_steps=2)) == 0
    assert [runs.read_result(job.folder)["steps"] for job in group] == expected


def test_base_that_a_failed_job_changed_trains_no_further_job(tmp_path: Path, monkeypatch) -> None:
    """Also not to a rung: the checkpoint would hold an adapter trained on a different base."""
    trained = []

    def change_base(cfg: config.TrainRun, folder: Path, shared: Any, *rest: Any) -> Any:
        trained.append(folder.name)
        if folder.name != "1":
            return train_job(cfg, folder, shared, *rest)
        with torch.no_grad():
            next(shared.base.base.model.parameters()).add_(1)
        raise ValueError("planted")

    monkeypatch.setattr(worker, "train_job", change_base)
    group = [jobs.Job(n, tmp_path / str(n), cfg, []) for n, cfg in enumerate(six(tmp_path)[:3])]
    found = Worker(Heartbeat(tmp_path / "beat"), Stop()).run_with_halving(group, Halving(eta=2, min_steps=2))
    assert found == worker.BASE_CHANGED and trained == ["0", "1"]


def test_job_saved_at_a_rung_without_an_evaluation_continues(tmp_path: Path) -> None:
    cfgs = [dataclasses.replace(cfg, resume="auto") for cfg in six(tmp_path)[:2]]
    group = [jobs.Job(n, tmp_path / str(n), cfg, []) for n, cfg in enumerate(cfgs)]

    class Leave(Callback):
        def on_step(self, state: Any, metrics: Any) -> None:
            if state.step == 2:
                checkpoint.save(state)
                raise KeyboardInterrupt

    runs.begin(group[0].folder, cfgs[0], [])
    with pytest.raises(KeyboardInterrupt):
        train_job(cfgs[0], group[0].folder, prepare(cfgs[0]), [Leave()])
    with (group[0].folder / runs.METRICS).open("a") as file:
        file.write('{"step": 3, "lo')  # half a line of a process that was killed
    assert Worker(Heartbeat(tmp_path / "beat"), Stop()).run_with_halving(group, Halving(eta=2, min_steps=2)) == 0
    assert [runs.read_result(job.folder)["steps"] for job in group] == [10, 2]


def test_job_whose_folder_is_in_use_fails_and_the_next_one_trains(tmp_path: Path) -> None:
    cfgs = six(tmp_path)
    with runs.locked(tmp_path / "busy"):
        group = [jobs.Job(n, tmp_path / name, cfgs[n], []) for n, name in enumerate(["busy", "1"])]
        assert Worker(Heartbeat(tmp_path / "beat"), Stop()).run(group) == 0
    failure = runs.read_failure(tmp_path / "busy")
    assert failure and "is in use by another process" in failure["message"]
    assert runs.read_result(tmp_path / "1")["steps"] == 10


def test_halving_needs_eval_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("sweep", "data.path=x", "seed=1,2", "sweep.halving=true", "data.eval_fraction=0") == 2
    assert "sweep.halving needs eval rows" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_folder(folder, "llama")
    rows_file(folder)
    return folder


def swept(source: Path, folder: Path, *overrides: str, **environment: str) -> int:
    """Run a sweep with the installed command; return its exit code."""
    command = [PROGRAM, "sweep", *inputs(source), f"hydra.sweep.dir={folder}", *overrides]
    return subprocess.run(command, env=os.environ | environment, check=False, capture_output=True).returncode


def outcomes(folder: Path) -> dict[int, str]:
    """Return for each job of a sweep finished, the type of its error, or open."""
    found = {}
    for job in (path for path in folder.iterdir() if path.name.isdigit()):
        failure = runs.read_failure(job)
        found[int(job.name)] = failure["kind"] if failure else "finished" if (job / runs.RESULT).is_file() else "open"
    return dict(sorted(found.items()))


@pytest.mark.closes("E01", "E02", "E04")
def test_jobs_that_fail_die_or_hang_run_again_when_resumed_and_the_others_do_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = {1: "raise", 2: "kill", 4: "nan", 5: "hang"}
    sweep = tmp_path / "sweep"
    overrides = ("seed=range(0,6)", "hydra.launcher.job_timeout=20")
    with monkeypatch.context() as planting:
        planting.setenv("PYTHONPATH", str(PLANTED), prepend=os.pathsep)
        assert swept(source, sweep, *overrides, PLANTED=json.dumps(planted)) == 3
    kinds = outcomes(sweep)
    assert {n for n, kind in kinds.items() if kind == "finished"} == {0, 3}
    assert kinds[1] == "ZeroDivisionError" and kinds[4] == "NonFiniteError"
    report = json.loads((sweep / "report.json").read_text())
    reasons = {int(job["name"]): job["reason"] for job in report["jobs"]}
    assert "SIGKILL" in reasons[2] and "no progress" in reasons[5] and "planted" in reasons[1]
    before = {n: (sweep / str(n) / runs.RESULT).stat().st_mtime_ns for n in (0, 3)}
    resumed = subprocess.run([PROGRAM, "sweep", f"resume={sweep}"], check=False, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert set(outcomes(sweep).values()) == {"finished"}
    assert {n: (sweep / str(n) / runs.RESULT).stat().st_mtime_ns for n in (0, 3)} == before
    for n in (2, 3):  # a job that ran again, and one that did not
        assert call("train", *inputs(source), f"seed={n}", f"hydra.run.dir={tmp_path / f'alone{n}'}") == 0
        assert weights(sweep / str(n)) == weights(tmp_path / f"alone{n}")


@pytest.fixture(scope="module")
def ranks_alone(source: Path) -> list[str]:
    """Train adapters of ranks 2 and 3 for 40 steps, each alone; return their hashes."""
    for r in (2, 3):
        overrides = ("train.max_steps=40", f"adapter.r={r}", f"hydra.run.dir={source}/r{r}")
        assert call("train", *inputs(source), *overrides) == 0
    return [weights(source / "r2"), weights(source / "r3")]


@pytest.mark.parametrize(
    "how",
    [*(pytest.param(each, marks=pytest.mark.nightly) for each in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL],
)
def test_resumed_sweep_ends_with_the_bytes_of_one_never_stopped(
    how: signal.Signals, source: Path, ranks_alone: list[str], tmp_path: Path
) -> None:
    sweep, overrides = tmp_path / "sweep", ("adapter.r=2,3", "train.max_steps=40")
    command = [PROGRAM, "sweep", *inputs(source), *overrides, f"hydra.sweep.dir={sweep}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (sweep / "0" / runs.METRICS).exists():
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate()
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 128 + how)
    if how is not signal.SIGKILL:
        assert f"continue with: lora-ft sweep resume={sweep}" in stderr
    wait_until_unlocked(sweep / "0")  # the worker of a killed parent saves and exits
    done = runs.read_metrics(sweep / "0")[-1]["step"]
    assert (sweep / "0" / "checkpoints" / f"step-{done:08d}").is_dir() and not (sweep / "0" / runs.RESULT).exists()
    assert not (sweep / "1" / runs.METRICS).exists()
    assert subprocess.run([PROGRAM, "sweep", f"resume={sweep}"], check=False, capture_output=True).returncode == 0
    assert [weights(sweep / str(n)) for n in (0, 1)] == ranks_alone
    for n in (0, 1):
        assert [m["step"] for m in runs.read_metrics(sweep / str(n))] == list(range(41))


def wait_until_unlocked(job: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(ConfigError), runs.locked(job):
            return
        time.sleep(0.05)
    raise AssertionError(f"{job} is still in use")
