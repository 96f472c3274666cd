"""Sweeps on Slurm, whose programs are stand-ins that run each batch job as processes of this machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished import settings
from test_sweep_hydra import hashes
from test_sweep_scheduler import HERE, after_steps, fake_workers, group_sizes, made, outcomes, run, seen, wait_for  # noqa: F401  (a fixture)

from lora_ft import config, runs
from lora_ft.cli import composition
from lora_ft.errors import ConfigError, Interrupted, ResourceError
from lora_ft.sweeps.executors import EXECUTORS, children, slurm
from lora_ft.sweeps.jobs import Job

INTERVAL = 0.2
REAL_COMMAND = children.command


class Cluster:
    """The stand-in for Slurm: its state is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def call(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-I", "-S", str(HERE / "fake_slurm.py"), *arguments], check=True)

    def calls(self, program: str) -> int:
        path = self.root / "calls"
        return path.read_text().splitlines().count(program) if path.exists() else 0

    def states(self) -> list[str]:
        jobs = sorted((path for path in self.root.glob("[0-9]*")), key=lambda path: int(path.name))
        return [(path / "state").read_text() for path in jobs]

    def flags(self, number: int = 1) -> list[str]:
        return json.loads((self.root / str(number) / "flags").read_text())


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    root, programs = tmp_path / "slurm", tmp_path / "bin"
    root.mkdir()
    programs.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {HERE / "fake_slurm.py"} {name} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(root))
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_LOOKS", INTERVAL)
    monkeypatch.setitem(EXECUTORS, "slurm", slurm.SlurmJobs())  # with a queue of its own
    return Cluster(root)


def sweep(jobs: list[Any], folder: Path, watch: Callable[[Any], None] = lambda running: None, **more: Any) -> None:
    run(jobs, folder, watch, **{"executor": "slurm", **more})


def once(job: Any, steps: int, *actions: Callable[[], None]) -> Callable[[Any], None]:
    """A watch that does the actions, one a call, once the job has made so many steps."""
    left = list(actions)

    def watch(running: Any) -> None:
        metrics = job.folder / runs.METRICS
        if left and metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            left.pop(0)()

    return watch


def test_groups_run_as_batch_jobs_with_the_resources_that_the_settings_name(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path / "50% done", *["finish"] * 3)
    sweep(jobs, tmp_path / "50% done", max_running=2, cpus=4, memory=1.5, time_limit=90, partition="gpu", notice=300,
          extra=["--account=lab", "--nodes=7"])  # fmt: skip
    assert outcomes(jobs) == ["finished"] * 3
    assert [group_sizes(job) for job in jobs] == [[2], [1], [2]]
    assert cluster.states() == ["COMPLETED"] * 2
    *flags, name, output = cluster.flags()
    assert flags == ["--parsable", "--account=lab", "--nodes=7", "--gres=gpu:1", "--cpus-per-task=4", "--mem=1536M",
                     "--time=90", "--partition=gpu", "--signal=B:USR2@300", "--nodes=1", "--ntasks=1", "--requeue",
                     "--open-mode=append"]  # fmt: skip
    assert name.startswith("--job-name=lora_ft-50__done-")
    assert output == f"--output={tmp_path}/50%% done/children/1.log"
    assert (tmp_path / "50% done/children/1.log").read_text() == "worker with 2 jobs\n"


@pytest.mark.parametrize(("device", "gpus", "flag"), [("cpu", None, []), ("auto", 0, []), ("cpu", 1, ["--gres=gpu:1"])])
def test_group_asks_for_a_gpu_unless_its_device_is_the_cpu(
    device, gpus, flag, tmp_path: Path, cluster: Cluster
) -> None:
    sweep(made(tmp_path, "finish", device=device), tmp_path, gpus=gpus)
    assert [each for each in cluster.flags() if each.startswith("--gres")] == flag


@pytest.mark.parametrize("command", ["requeue", "fail"])
def test_preempted_or_lost_job_that_slurm_requeues_continues_from_its_checkpoint(
    command: str, tmp_path: Path, cluster: Cluster
) -> None:
    jobs = made(tmp_path, "finish", "fail", "long", "finish")
    sweep(jobs, tmp_path, once(jobs[2], 5, lambda: cluster.call("scontrol", command, "1")))
    assert outcomes(jobs) == ["finished", "planted", "finished", "finished"]
    assert [group_sizes(job) for job in jobs] == [[4], [4], [4, 2], [2]], "jobs with an outcome are skipped"
    assert seen(jobs[2])[1]["from"] >= 4
    assert cluster.calls("sbatch") == 1


def test_notice_before_the_time_limit_saves_and_requeues(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "long", "finish")
    notice = lambda: cluster.call("scancel", "--batch", "--signal=USR2", "1")  # noqa: E731  (what --signal=B: does)
    sweep(jobs, tmp_path, once(jobs[0], 5, notice))
    assert outcomes(jobs) == ["finished"] * 2
    steps = [row["step"] for row in runs.read_metrics(jobs[0].folder)]
    assert steps == [*range(1, 41)], "no step is done twice"
    assert cluster.calls("scontrol") == 1 and cluster.calls("sbatch") == 1


def test_group_that_never_saves_before_its_limit_fails_after_its_retries(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "hang_loading", "finish")
    sent = []

    def watch(running: Any) -> None:
        number = len(seen(jobs[0]))
        if number > len(sent) and not (jobs[0].folder / runs.FAILURE).exists():
            cluster.call("scancel", "--batch", "--signal=USR2", str(number))
            sent.append(number)

    sweep(jobs, tmp_path, watch, retries=1)
    assert outcomes(jobs)[1] == "finished"
    ended = "its Slurm job 2 ended too often since the last checkpoint (FAILED, hydra.launcher.retries=1), before its"
    assert outcomes(jobs)[0].startswith(ended)
    assert cluster.calls("scontrol") == 0 and len(seen(jobs[0])) == 2


def test_job_of_a_lost_node_continues_in_another_batch_job(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "long", "finish")
    sweep(jobs, tmp_path, once(jobs[0], 5, lambda: cluster.call("scontrol", "lose", "1")))
    assert outcomes(jobs) == ["finished"] * 2
    assert group_sizes(jobs[0]) == [2, 2] and seen(jobs[0])[1]["from"] >= 4
    assert cluster.states() == ["NODE_FAIL", "COMPLETED"]


def test_batch_job_that_slurm_has_forgotten_is_judged_by_its_files(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.root / "forget").touch()
    jobs = made(tmp_path, "finish", "exit", "long", "finish")
    sweep(jobs, tmp_path, once(jobs[2], 5, lambda: cluster.call("scontrol", "lose", "2")))
    assert [outcome.partition(" and ")[0] for outcome in outcomes(jobs)] == [
        "finished", "its process ended with exit code 9", "finished", "finished"]  # fmt: skip
    assert group_sizes(jobs[2]) == [2, 2]


def test_cancelled_batch_job_fails_its_running_job_and_the_others_continue(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "finish", "long", "finish")
    sweep(jobs, tmp_path, once(jobs[1], 5, lambda: cluster.call("scancel", "1")))
    found = outcomes(jobs)
    assert found[0] == found[2] == "finished"
    assert found[1].startswith("its Slurm job 1 was cancelled, which this sweep did not do, after step ")
    assert cluster.states() == ["CANCELLED", "COMPLETED"]


def test_worker_that_dies_of_itself_fails_its_running_job(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "exit", "kill", "finish")
    sweep(jobs, tmp_path)
    found = outcomes(jobs)
    assert "ended with exit code 9 and without a result after step 1" in found[0]
    assert "killed by SIGKILL, often for lack of memory, after step 1" in found[1]
    assert found[2] == "finished" and cluster.states() == ["FAILED", "FAILED", "COMPLETED"]


def test_outage_of_slurm_does_not_end_the_sweep(tmp_path: Path, cluster: Cluster, caplog) -> None:
    """At submission, and while the jobs run."""
    down = cluster.root / "down"
    down.touch()
    jobs = made(tmp_path, "long", "finish", "finish")
    looked = []

    def watch(running: Any) -> None:
        looked.append(cluster.calls("squeue"))
        if down.exists() and looked[-1] - looked[0] >= 3:
            down.unlink()
        elif (jobs[0].folder / runs.METRICS).exists() and len(caplog.records) == 1:
            down.touch()
            looked.clear()

    sweep(jobs, tmp_path, watch)
    assert outcomes(jobs) == ["finished"] * 3
    assert [group_sizes(job) for job in jobs] == [[3]] * 3
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Slurm does not answer, its jobs go on"] * 2  # fmt: skip


def test_one_question_answers_for_all_groups_and_is_seldom_asked(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, *["finish"] * 6)
    began = time.monotonic()
    sweep(jobs, tmp_path, max_running=6, gpus=0)
    assert cluster.calls("sbatch") == 6
    assert cluster.calls("squeue") <= 1 + (time.monotonic() - began) / INTERVAL


def test_stopped_sweep_saves_and_is_not_requeued(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "slow", "finish")
    with pytest.raises(Interrupted, match="stopped by SIGTERM; continue with"):
        sweep(jobs, tmp_path, after_steps(jobs[0], 3, signal.SIGTERM))
    assert outcomes(jobs) == ["", ""] and seen(jobs[1]) == []
    assert int((jobs[0].folder / "checkpoint").read_text()) == len(runs.read_metrics(jobs[0].folder))
    assert cluster.states() == ["FAILED"] and cluster.calls("scontrol") == 0


def test_stopped_sweep_cancels_batch_jobs_that_wait(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.root / "hold").touch()
    jobs = made(tmp_path, "finish")
    with pytest.raises(Interrupted):
        sweep(jobs, tmp_path, lambda running: os.kill(os.getpid(), signal.SIGINT) if cluster.states() else None)
    assert cluster.states() == ["CANCELLED"] and seen(jobs[0]) == []


def test_second_signal_cancels_batch_jobs(tmp_path: Path, cluster: Cluster) -> None:
    jobs = made(tmp_path, "deaf")
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        sweep(jobs, tmp_path, after_steps(jobs[0], 2, signal.SIGTERM, signal.SIGINT))
    assert cluster.states() == ["CANCELLED"] and outcomes(jobs) == [""]


def test_hanging_job_is_cancelled_after_job_timeout_but_may_wait_in_the_queue(tmp_path: Path, cluster: Cluster) -> None:
    hold = cluster.root / "hold"
    hold.touch()
    jobs, began = made(tmp_path, "hang", "finish"), time.monotonic()
    release = lambda _: hold.unlink(missing_ok=True) if time.monotonic() - began > 1.5 else None  # noqa: E731
    sweep(jobs, tmp_path, release, job_timeout=1.0)
    assert outcomes(jobs)[0].startswith("no progress for 1 s (step, after step 1; hydra.launcher.job_timeout=1); see ")
    assert outcomes(jobs)[1] == "finished"


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_batch_jobs_of_a_killed_command_go_on_and_are_adopted(
    executor: str, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, HERE / "parent.py", tmp_path, "slurm", "long"])
    jobs = made(tmp_path, "long", "finish")
    wait_for((jobs[0].folder / "checkpoint").exists)
    process.kill()
    process.wait()
    sweep(jobs, tmp_path, executor=executor)
    assert outcomes(jobs) == ["finished"] * 2
    assert len(seen(jobs[0])) == 1, "it was not started twice"
    assert cluster.calls("sbatch") == (2 if executor == "slurm" else 1)


def test_sweep_with_batch_jobs_needs_slurm_to_be_resumed(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.root / "hold").touch()
    EXECUTORS["slurm"].submit(made(tmp_path, "finish"), "", config.Launcher(), config.Sweep(), tmp_path)
    (cluster.root / "down").touch()
    with pytest.raises(ResourceError, match=r"must tell which jobs .* still run, and does not answer: squeue: error"):
        run(made(tmp_path, "finish"), tmp_path)
    (cluster.root / "down").unlink()
    cluster.call("scancel", "1")


def test_refused_batch_job_ends_the_sweep_with_the_reason(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.root / "refuse").touch()
    with pytest.raises(ResourceError, match=r"(?s)Slurm refused .*Invalid partition name.*its flags: --gres=gpu:1"):
        sweep(made(tmp_path, "finish"), tmp_path)


def test_missing_slurm_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="sbatch is not on the PATH: run it on a login node of the cluster"):
        sweep(made(tmp_path, "finish"), tmp_path)


@pytest.mark.parametrize("flag", ["account=lab", "--array=0-3", "-a0-3", "--wrap", "-M", "--test-only", ":", "--x=\ny"])
def test_flags_that_are_no_flags_of_one_batch_job_are_refused(flag: str, tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.extra must be flags of sbatch for one batch job, got"):
        sweep(made(tmp_path, "finish"), tmp_path, extra=[flag])
    assert cluster.states() == []


def test_sweep_resumed_with_another_executor_leaves_out_the_settings_of_the_first(tmp_path: Path) -> None:
    typed = ["seed=1,2", "hydra.launcher.executor=slurm", "hydra.launcher.partition=gpu",
             "hydra.launcher.share_base=false"]  # fmt: skip
    runs.create_sweep(tmp_path, typed, None, resumed=False)

    def resumed(*added: str) -> list[str]:
        line = composition.CommandLine("sweep", [f"resume={tmp_path}", *added], multirun=True)
        return composition._resumed_sweep(line).overrides[:-2]

    assert resumed() == typed
    assert resumed("hydra.launcher.partition=cpu") == [*typed, "hydra.launcher.partition=cpu"]
    local = "hydra.launcher.executor=local"
    assert resumed(local) == ["seed=1,2", "hydra.launcher.share_base=false", local]


def test_real_workers_train_the_adapters_of_a_local_sweep(tmp_path: Path, cluster: Cluster, monkeypatch) -> None:
    """One of the two jobs is interrupted: the batch job is requeued, as after a preemption."""
    monkeypatch.setattr(children, "command", REAL_COMMAND)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = settings(tmp_path, "llama")
    base.train = config.Train(max_steps=12, tokens_per_step=64, samples=0, save_every_steps=2)
    cfgs = [dataclasses.replace(base, adapter=config.Adapter(r=r)) for r in (2, 4)]

    def swept(name: str, **launcher: Any) -> list[str]:
        jobs = [Job(number, tmp_path / name / str(number), cfg, []) for number, cfg in enumerate(cfgs)]

        def watch(running: Any) -> None:
            if name == "batch" and not requeued and any((jobs[0].folder / "checkpoints").glob("step-*")):
                requeued.append(cluster.call("scontrol", "requeue", "1"))

        run(jobs, tmp_path / name, watch, **launcher)
        assert outcomes(jobs) == ["finished"] * 2
        return hashes(tmp_path / name)

    requeued: list[None] = []
    local = swept("local", executor="local")
    assert swept("batch", executor="slurm") == local and len({*local, ""}) == 3
    assert requeued and cluster.calls("sbatch") == 1
