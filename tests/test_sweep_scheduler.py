"""Jobs in worker processes: a job that fails, dies or hangs affects no other, and no process is left behind."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError, Interrupted, ResourceError
from lora_ft.settings.model import Model
from lora_ft.sweeps import devices, scheduler
from lora_ft.sweeps.executors import EXECUTORS, check, children
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job

HERE = Path(__file__).parent / "sweeps"


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "command", lambda: [sys.executable, "-I", "-S", str(HERE / "fake_worker.py")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def use_command(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    monkeypatch.setattr(children, "command", lambda: list(command))


def exiting(code: str) -> tuple[str, ...]:
    """A command that does nothing but exit."""
    return (sys.executable, "-I", "-S", "-c", f"raise SystemExit({code})")


def made(folder: Path, *behaviours: str, device: str = "auto") -> list[Job]:
    return [Job(n, folder / str(n), config.TrainRun(device=device), [b]) for n, b in enumerate(behaviours)]


def run(jobs: list[Job], folder: Path, watch: Callable[[Any], None] = lambda running: None, **launcher: Any) -> None:
    """Run the jobs; check that none of their processes is left."""
    try:
        scheduler.run(jobs, config.Launcher(**launcher), config.Sweep(), folder, watch)
    finally:
        for job in jobs:
            for process in seen(job):
                with pytest.raises(ProcessLookupError):  # a zombie could still be sent a signal
                    os.kill(process["pid"], 0)


def seen(job: Job) -> list[dict[str, Any]]:
    """The processes that had a job, in order: pid, device, first step, number of their jobs."""
    path = job.folder / "seen.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def group_sizes(job: Job) -> list[int]:
    """The number of jobs of each process that had this job."""
    return [process["with"] for process in seen(job)]


def outcomes(jobs: list[Job]) -> list[str]:
    """For each job finished, the message of its failure, or an empty string."""
    found = []
    for job in jobs:
        failure = runs.read_failure(job.folder)
        assert not (failure and (job.folder / runs.RESULT).exists())
        found.append(failure["message"] if failure else "finished" if (job.folder / runs.RESULT).exists() else "")
    return found


@pytest.mark.closes("E01", "E02")
def test_eight_jobs_fail_in_different_ways_and_the_other_twelve_finish(tmp_path: Path) -> None:
    behaviours = {3: "fail", 5: "exit", 6: "kill", 9: "crash", 12: "memory", 13: "exit", 17: "fail", 19: "kill_loading"}
    jobs = made(tmp_path, *(behaviours.get(n, "finish") for n in range(20)))
    run(jobs, tmp_path)
    found = outcomes(jobs)
    assert [n for n, outcome in enumerate(found) if outcome != "finished"] == sorted(behaviours)
    assert found[3] == found[17] == "planted"
    assert re.fullmatch(r"its process ended with exit code 9 .* after step 1; see .*/children/\d+\.log", found[5])
    assert re.fullmatch(r"its process was killed by SIGKILL, .*memory, after step 1; see .*\.log", found[6])
    assert re.search(r"killed by SIGABRT after step 1", found[9])
    assert found[12] == "CUDA out of memory"
    assert "killed by SIGKILL" in found[19] and "before its first step" in found[19]
    assert all(Path(message.partition("see ")[2]).is_file() for message in found if "; see " in message)
    assert all(len(seen(job)) == 1 for job in jobs), "no job runs again"
    assert [group_sizes(jobs[n]) for n in (0, 6, 7, 10, 14, 19)] == [[20], [14], [13], [10], [6], [6]]


def test_jobs_after_one_that_changed_the_base_get_a_new_process(tmp_path: Path) -> None:
    jobs = made(tmp_path, "taint", "finish", "taint", "finish")
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["tainted", "finished", "tainted", "finished"]
    assert [group_sizes(job) for job in jobs] == [[4], [3], [3], [1]]


@pytest.mark.parametrize("code", ["0", "75", "'no such module'"])
def test_worker_without_any_outcome_fails_its_first_job_and_keeps_its_log(
    code: str, tmp_path: Path, monkeypatch
) -> None:
    use_command(monkeypatch, *exiting(code))
    jobs = made(tmp_path, "finish", "finish")
    run(jobs, tmp_path)
    assert all("and without a result before its first step" in outcome for outcome in outcomes(jobs))
    assert (tmp_path / runs.CHILDREN / "1.log").read_text() == ("" if code.isdigit() else "no such module\n")


@pytest.mark.closes("E05")
def test_jobs_that_share_no_base_share_no_process(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "finish", "finish")
    run(jobs, tmp_path, share_base=False)
    assert len({seen(job)[0]["pid"] for job in jobs}) == 3
    assert [seen(job)[0]["leaks"] for job in jobs] == [None] * 3


def test_failed_job_runs_again_and_each_worker_has_its_own_log(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "exit", "finish")
    run(jobs, tmp_path)
    jobs[1].overrides[0] = "finish"
    run(jobs[1:2], tmp_path)
    assert outcomes(jobs) == ["finished"] * 3
    assert [group_sizes(job) for job in jobs] == [[3], [3, 1], [1]]
    logs = [(tmp_path / runs.CHILDREN / f"{n}.log").read_text() for n in (1, 2, 3)]
    assert logs == [f"worker with {count} jobs\n" for count in (3, 1, 1)]


def test_worker_gets_its_jobs_and_the_settings_of_the_sweep(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 60)
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["finished"] * 60
    assert {tuple(group_sizes(job)) for job in jobs} == {(60,)}
    assert seen(jobs[0])[0]["sweep"] == {"halving": False, "eta": 3, "min_steps": 20}


def test_command_that_cannot_be_started_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match="no process can be started for a job: No such file"):
        run(made(tmp_path, "finish"), tmp_path)


def test_hanging_job_fails_after_job_timeout_and_the_others_finish(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "hang", "finish", "hang_loading", "finish")
    run(jobs, tmp_path, job_timeout=1.0)
    found = outcomes(jobs)
    assert found[0] == found[2] == found[4] == "finished"
    assert found[1].startswith("no progress for 1 s (step, after step 1; hydra.launcher.job_timeout=1); see ")
    assert found[3].startswith("no progress for 1 s (loading, before its first step; ")
    assert [group_sizes(job) for job in jobs] == [[5], [5], [3], [3], [1]], "the heartbeat names the job that hung"


def test_job_timeout_counts_from_the_start_without_a_heartbeat(tmp_path: Path, monkeypatch) -> None:
    use_command(monkeypatch, "sh", "-c", "sleep 60")
    jobs = made(tmp_path, "finish")
    run(jobs, tmp_path, job_timeout=0.3)
    assert outcomes(jobs)[0].startswith("no progress for 0.3 s (loading")


def test_job_timeout_limits_one_step_and_not_the_sum_of_steps(tmp_path: Path) -> None:
    jobs = made(tmp_path, "slow")
    stop = after_steps(jobs[0], 40, signal.SIGTERM)  # 2 s
    with pytest.raises(Interrupted):
        run(jobs, tmp_path, stop, job_timeout=1.0)
    assert outcomes(jobs) == [""]


def after_steps(job: Job, steps: int, *signals: int) -> Callable[[Any], None]:
    """A watch that sends this process the signals, one a call, once the job has made so many steps."""
    left = list(signals)

    def watch(running: Any) -> None:
        metrics = job.folder / runs.METRICS
        if left and metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            os.kill(os.getpid(), left.pop(0))

    return watch


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 128 + signal.SIGUSR1),
        (signal.SIGUSR2, 128 + signal.SIGUSR2),
    ],
)
def test_signal_lets_all_workers_save_and_starts_no_more(
    signum: signal.Signals, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = made(tmp_path, "slow", "slow", "finish", "finish", device="cuda")
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"stopped by {signum.name}; continue with: lora-ft sweep resume=") as stopped:
        run(jobs, tmp_path, after_steps(jobs[0], 2, signum), devices=["0", "1"])
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert "SIGINT or SIGTERM twice stops now" in capfd.readouterr().err
    assert outcomes(jobs) == [""] * 4
    for job in (job for job in jobs[:2] if seen(job)):
        assert int((job.folder / "checkpoint").read_text()) == len(runs.read_metrics(job.folder)), "the step had ended"
    assert seen(jobs[2]) == seen(jobs[3]) == []


def test_second_signal_kills_workers_that_do_not_stop(tmp_path: Path) -> None:
    jobs = made(tmp_path, "deaf")
    with pytest.raises(Interrupted, match="stopped by SIGINT") as stopped:
        run(jobs, tmp_path, after_steps(jobs[0], 2, signal.SIGTERM, signal.SIGINT))
    assert stopped.value.exit_code == 130
    assert outcomes(jobs) == [""], "it can be resumed"


def test_signal_that_the_parent_was_started_to_ignore_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        jobs = made(tmp_path, "finish", "finish")
        run(jobs, tmp_path, lambda running: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcomes(jobs) == ["finished"] * 2


def test_job_whose_worker_somebody_else_stops_fails(tmp_path: Path) -> None:
    (job,) = jobs = made(tmp_path, "slow")

    def watch(running: Any) -> None:
        if running and (job.folder / runs.METRICS).exists():
            os.kill(seen(job)[-1]["pid"], signal.SIGTERM)

    run(jobs, tmp_path, watch)
    assert "stopped by SIGTERM, which this sweep did not send, after step" in outcomes(jobs)[0]


@pytest.mark.parametrize("behaviour", ["slow", "deaf"])
def test_error_in_the_parent_ends_its_workers(behaviour: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "_SECONDS_TO_EXIT", 0.5)
    jobs = made(tmp_path, behaviour, behaviour, device="cuda")

    def watch(running: Any) -> None:
        if all((job.folder / runs.METRICS).exists() for job in jobs):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run(jobs, tmp_path, watch, devices=["0", "1"])
    assert outcomes(jobs) == ["", ""]
    assert all((job.folder / "checkpoint").exists() for job in jobs)


def test_worker_of_a_killed_parent_saves_and_exits(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, HERE / "parent.py", tmp_path, "local", "slow"])
    job = Job(0, tmp_path / "0", config.TrainRun(), ["slow"])
    wait_for((job.folder / "checkpoint").exists)
    process.kill()
    process.wait()
    pid = seen(job)[0]["pid"]
    wait_for(lambda: not exists(pid) or state(pid) == "Z")  # a zombie on a system that adopts no orphans
    steps = len((job.folder / runs.METRICS).read_text().splitlines())
    assert int((job.folder / "checkpoint").read_text()) == steps


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited for {seconds} s"
        time.sleep(0.02)


def test_each_device_has_a_worker_with_a_part_of_each_group(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 6, device="cuda")
    at_once: list[int] = []
    run(jobs, tmp_path, lambda running: at_once.append(len(running)), devices=["4", "7"])
    assert [seen(job)[0]["device"] for job in jobs] == ["4", "7"] * 3
    assert max(at_once) <= 2
    assert {tuple(group_sizes(job)) for job in jobs} == {(3,)}


def test_no_device_has_two_workers_at_a_time(tmp_path: Path) -> None:
    """Jobs with cuda:1 share its slot with jobs of any device, and keep the environment that their number counts by."""
    anywhere = made(tmp_path / "a", *["slow"] * 2, device="cuda")
    there = made(tmp_path / "b", *["slow"] * 2, device="cuda:1")
    jobs = [Job(n, job.folder, job.cfg, job.overrides) for n, job in enumerate([*there, *anywhere])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        at_once: list[int] = []

        def watch(running: Any) -> None:
            at_once.append(len(running))
            begun = [job for job in jobs if (job.folder / runs.METRICS).exists()]
            if len(begun) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted):
            run(jobs, tmp_path, watch)
    assert max(at_once) == 2
    assert [process["device"] for job in there for process in seen(job)] == ["2,3"]
    assert [process["device"] for job in anywhere for process in seen(job)] == ["2"]


def test_one_worker_runs_at_a_time_on_a_cpu(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 4, device="cpu")
    at_once: list[int] = []
    run(jobs, tmp_path, lambda running: at_once.append(len(running)), devices=["0", "1"])
    assert max(at_once) <= 1
    assert [group_sizes(job) for job in jobs] == [[4]] * 4


@pytest.mark.parametrize(
    ("value", "names"),
    [("0,2", ["0", "2"]), ("GPU-8932f937, MIG-1", ["GPU-8932f937", "MIG-1"]), ("1,-1,2", ["1"]), ("", []), ("-1", [])],
)
def test_devices_are_those_of_cuda_visible_devices(value: str, names: list[str], monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices.visible() == names
    assert devices.usable("auto", []) == (names or [""])
    assert devices.usable("cuda", ["5"]) == ["5"]
    assert devices.usable("cpu", ["5"]) == devices.usable("mps", []) == [""]


def test_device_files_are_counted_without_cuda_visible_devices(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "_FILES", ((str(tmp_path / "none"), "*"), (str(tmp_path), "nvidia[0-9]*")))
    assert devices.visible() == ["0", "1"]
    assert devices.usable("cuda:1", []) == ["1"]
    assert devices.usable("cuda:6", []) == ["6"]


class InOrder:
    """A toy executor: no processes, each group is brought to its outcome when it is submitted."""

    def __init__(self) -> None:
        self.jobs, self.slot = [], "here"

    settings = frozenset()

    def slots(self, device, launcher):
        return ["here"]

    def adopt(self, folder, launcher):
        return []

    def submit(self, group, slot, launcher, sweep, folder):
        for job in group:
            runs.create(job.folder, validation.to_plain(job.cfg), job.overrides)
            (job.folder / runs.RESULT).write_text("{}")
        self.jobs = group
        return self

    def ended(self):
        return 0

    def beat(self):
        return Beat()


def test_executor_is_one_class_and_one_entry_of_the_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(EXECUTORS, "toy", InOrder())
    jobs = made(tmp_path, "finish", "finish")
    run(jobs, tmp_path, executor="toy")
    assert outcomes(jobs) == ["finished"] * 2 and seen(jobs[0]) == []
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.executor must be one of local, slurm, ray, toy, got pbs"):
        run(made(tmp_path / "other", "finish"), tmp_path, executor="pbs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"partition": "gpu"},
            r"partition needs hydra\.launcher\.executor=slurm, got local: leave out .*partition=gpu",
        ),
        ({"gpus": 0, "address": "auto"}, r"(?s)gpus needs .*=slurm or ray, got local.*address needs .*=ray, got local"),
        ({"executor": "slurm", "devices": ["0"]}, r"devices needs hydra\.launcher\.executor=local, got slurm"),
        ({"executor": "ray", "time_limit": 5}, r"time_limit needs hydra\.launcher\.executor=slurm, got ray"),
    ],
)
def test_setting_that_the_executor_does_not_honour_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config.Launcher(**settings))


def test_each_setting_is_honoured_by_an_executor() -> None:
    honoured = {"executor", "share_base"}.union(*(each.settings for each in EXECUTORS.values()))
    assert honoured == {field.name for field in dataclasses.fields(config.Launcher)}


def test_groups_get_their_share_of_the_slots() -> None:
    def sizes(slots: int, *groups: int) -> list[int]:
        cfgs = [config.TrainRun(model=Model(path=str(n))) for n, size in enumerate(groups) for _ in range(size)]
        jobs = [Job(n, Path(str(n)), cfg, []) for n, cfg in enumerate(cfgs)]
        launcher = config.Launcher(executor="slurm", max_running=slots)
        return [len(group) for group in scheduler.groups(jobs, launcher)]

    assert sizes(1, 3, 3) == sizes(2, 3, 3) == [3, 3]
    assert sizes(4, 3, 3) == [2, 1, 2, 1]
    assert sizes(8, 23, 1) == [3] * 7 + [2, 1]
    assert sizes(5, 2) == [1, 1]
