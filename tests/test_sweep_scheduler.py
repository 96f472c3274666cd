"""Jobs in child processes: one that fails, dies or hangs takes no other along, and nothing is left behind."""

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
from lora_ft.sweeps import devices, scheduler
from lora_ft.sweeps.executors import EXECUTORS, local
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job

HERE = Path(__file__).parent / "sweeps"


@pytest.fixture(autouse=True)
def fake_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", lambda: [sys.executable, "-I", "-S", str(HERE / "fake_worker.py")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def made(folder: Path, *words: str, device: str = "auto") -> list[Job]:
    return [Job(n, folder / str(n), config.TrainRun(device=device), w.split()) for n, w in enumerate(words)]


def run(jobs: list[Job], folder: Path, watch: Callable[[], None] = lambda: None, **launcher: Any) -> None:
    """Run the jobs; afterwards no process is left that they had, and no sign of one."""
    try:
        scheduler.run(jobs, config.Launcher(**launcher), config.Sweep(), folder, watch)
    finally:
        for job in jobs:
            for process in seen(job):
                with pytest.raises(ProcessLookupError):  # a zombie could still be sent a signal
                    os.kill(process["pid"], 0)
        assert not (folder / scheduler.RUNNING).exists()


def seen(job: Job) -> list[dict[str, Any]]:
    """The processes that had a job, in order: pid, device, first step, jobs beside it."""
    path = job.folder / "seen.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def beside(job: Job) -> list[int]:
    return [process["with"] for process in seen(job)]


def outcomes(jobs: list[Job]) -> list[str]:
    """finished, the message of a failure, or nothing."""
    found = []
    for job in jobs:
        failure = runs.read_failure(job.folder)
        assert not (failure and (job.folder / runs.RESULT).exists())
        found.append(failure["message"] if failure else "finished" if (job.folder / runs.RESULT).exists() else "")
    return found


@pytest.mark.closes("E01")
def test_eight_of_twenty_jobs_fail_in_every_way_and_twelve_finish(tmp_path: Path) -> None:
    ways = {3: "fail", 5: "exit", 6: "kill", 9: "crash", 12: "memory", 13: "exit", 17: "fail", 19: "kill_loading"}
    jobs = made(tmp_path, *(ways.get(n, "finish") for n in range(20)))
    run(jobs, tmp_path)
    found = outcomes(jobs)
    assert [n for n, outcome in enumerate(found) if outcome != "finished"] == sorted(ways)
    assert found[3] == found[17] == "planted"
    assert re.fullmatch(r"its process ended with exit code 9 .* after step 1; see .*/children/\d+\.log", found[5])
    assert re.fullmatch(r"its process was killed by SIGKILL \(.*memory.*\) after step 1; see .*\.log", found[6])
    assert re.search(r"killed by SIGABRT after step 1", found[9])
    assert "out of memory" in found[12]
    assert "killed by SIGKILL" in found[19] and "before its first step" in found[19]
    assert all(Path(message.partition("see ")[2]).is_file() for message in found if "; see " in message)
    assert all(len(seen(job)) == 1 for job in jobs), "no job is run again"
    assert [beside(jobs[n]) for n in (0, 6, 7, 10, 14, 19)] == [[20], [14], [13], [10], [6], [6]]


def test_what_one_job_kills_fails_it_and_the_jobs_after_it_go_on_in_a_new_process(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "kill", "finish", "finish")
    run(jobs, tmp_path)
    assert [outcome[:22] for outcome in outcomes(jobs)] == [
        "finished",
        "its process was killed",
        "finished",
        "finished",
    ]
    assert [beside(job) for job in jobs] == [[4], [4], [2], [2]]
    assert len({seen(job)[-1]["pid"] for job in jobs}) == 2


def test_a_job_that_dies_alone_is_not_tried_again(tmp_path: Path) -> None:
    (job,) = jobs = made(tmp_path, "exit")
    run(jobs, tmp_path)
    assert beside(job) == [1]
    failure = runs.read_failure(job.folder)
    assert failure and failure["kind"] == "LoraFtError" and failure["exit_code"] == 1


def test_the_jobs_behind_one_that_changed_the_base_have_a_new_one(tmp_path: Path) -> None:
    jobs = made(tmp_path, "taint", "finish", "taint", "finish")
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["tainted", "finished", "tainted", "finished"]
    assert [beside(job) for job in jobs] == [[4], [3], [3], [1]]


def test_a_child_that_brings_no_job_to_an_outcome_is_not_started_for_ever(tmp_path: Path, monkeypatch) -> None:
    for code in (0, 75):
        monkeypatch.setattr(local, "command", lambda: [sys.executable, "-I", "-S", "-c", f"raise SystemExit({code})"])  # noqa: B023
        jobs = made(tmp_path / str(code), "finish", "finish")
        run(jobs, tmp_path / str(code))
        assert all(f"ended with exit code {code} and without an outcome" in outcome for outcome in outcomes(jobs))


@pytest.mark.closes("E02")
def test_a_job_without_memory_fails_and_the_next_go_on(tmp_path: Path) -> None:
    jobs = made(tmp_path, "memory", "finish")
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["CUDA out of memory", "finished"]
    assert [beside(job) for job in jobs] == [[2], [2]]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.closes("E05")
def test_jobs_that_share_no_base_share_no_process(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "finish", "finish")
    run(jobs, tmp_path, share_base=False)
    assert len({seen(job)[0]["pid"] for job in jobs}) == 3
    assert [seen(job)[0]["leaks"] for job in jobs] == [None] * 3


def test_what_is_finished_is_left_alone_and_what_had_failed_is_not(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "fail", "finish")
    run(jobs, tmp_path)
    result = (jobs[0].folder / runs.RESULT).stat()
    jobs[1].words[0] = "finish"
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["finished"] * 3
    assert [beside(job) for job in jobs] == [[3], [3, 1], [3]]
    assert (jobs[0].folder / runs.RESULT).stat().st_mtime_ns == result.st_mtime_ns


def test_every_child_keeps_a_log_of_its_own_also_over_two_sweeps(tmp_path: Path) -> None:
    jobs = made(tmp_path, "exit", "finish")
    run(jobs, tmp_path)
    assert sorted(p.name for p in (tmp_path / local.FOLDER).glob("*.log")) == ["1.log", "2.log"]
    run(jobs, tmp_path)
    logs = [(tmp_path / local.FOLDER / f"{n}.log").read_text() for n in (1, 2, 3)]
    assert logs == [f"worker with {count} jobs\n" for count in (2, 1, 1)]
    assert not (tmp_path / local.FOLDER / "4.log").exists()


def test_a_child_gets_more_jobs_than_a_pipe_holds(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 60)
    run(jobs, tmp_path)
    assert outcomes(jobs) == ["finished"] * 60
    assert {tuple(beside(job)) for job in jobs} == {(60,)}
    assert seen(jobs[0])[0]["sweep"] == {"halving": False, "eta": 3, "min_steps": 20}


def test_a_child_that_dies_before_it_reads_its_jobs_fails_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        local, "command", lambda: [sys.executable, "-I", "-S", "-c", "raise SystemExit('no such module')"]
    )
    jobs = made(tmp_path, *["finish"] * 30)
    run(jobs[:2], tmp_path, share_base=False)
    assert all("exit code 1 and without an outcome before its first step" in message for message in outcomes(jobs[:2]))
    assert (tmp_path / local.FOLDER / "1.log").read_text() == "no such module\n"


def test_no_child_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(ResourceError, match="no process can be started for a job: No such file"):
        run(made(tmp_path, "finish"), tmp_path)


def test_a_job_that_hangs_fails_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = made(tmp_path, "finish", "hang", "finish", "hang_loading", "finish")
    run(jobs, tmp_path, job_timeout=1.0)
    told = outcomes(jobs)
    assert told[0] == told[2] == told[4] == "finished"
    assert told[1].startswith("no progress for 1 s (step, after step 1; hydra.launcher.job_timeout=1); see ")
    assert told[3].startswith("no progress for 1 s (loading, before its first step; ")
    assert [beside(job) for job in jobs] == [[5], [5], [3], [3], [1]], "who hung is known, and not tried again"


def test_a_child_without_a_heartbeat_is_timed_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", lambda: ["sleep", "60"])
    jobs = made(tmp_path, "finish")
    run(jobs, tmp_path, job_timeout=0.3)
    assert outcomes(jobs)[0].startswith("no progress for 0.3 s (loading")


def test_many_short_steps_are_no_long_one(tmp_path: Path) -> None:
    jobs = made(tmp_path, "slow")
    stop = after_steps(jobs[0], 40, signal.SIGTERM)  # 2 s
    with pytest.raises(Interrupted):
        run(jobs, tmp_path, stop, job_timeout=1.0)
    assert outcomes(jobs) == [""]


def after_steps(job: Job, steps: int, *signals: int) -> Callable[[], None]:
    """A watch that sends this process the signals, one a call, once the job has made so many steps."""
    left = list(signals)

    def watch() -> None:
        metrics = job.folder / runs.METRICS
        if left and metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            os.kill(os.getpid(), left.pop(0))

    return watch


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_all_children_save_and_begins_no_more(
    signum: signal.Signals, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = made(tmp_path, "slow", "slow", "finish", "finish", device="cuda")
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"stopped by {signum.name}; go on with: lora-ft sweep resume=") as stopped:
        run(jobs, tmp_path, after_steps(jobs[0], 2, signum), devices=["0", "1"])
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert "again to stop now" in capfd.readouterr().err
    assert outcomes(jobs) == [""] * 4
    for job in (job for job in jobs[:2] if seen(job)):
        assert int((job.folder / "checkpoint").read_text()) == len(runs.read_metrics(job.folder)), "the step had ended"
    assert seen(jobs[2]) == seen(jobs[3]) == []


def test_a_second_signal_ends_children_that_do_not_listen(tmp_path: Path) -> None:
    jobs = made(tmp_path, "deaf")
    with pytest.raises(Interrupted, match="stopped by SIGINT") as stopped:
        run(jobs, tmp_path, after_steps(jobs[0], 2, signal.SIGTERM, signal.SIGINT))
    assert stopped.value.exit_code == 130
    assert outcomes(jobs) == [""], "it can go on"


def test_a_signal_that_the_parent_was_started_to_ignore_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        jobs = made(tmp_path, "finish", "finish")
        run(jobs, tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcomes(jobs) == ["finished"] * 2


def test_a_job_that_somebody_else_stops_fails(tmp_path: Path) -> None:
    (job,) = jobs = made(tmp_path, "slow")

    def watch() -> None:
        if job.folder.exists() and (job.folder / runs.METRICS).exists() and exists(pid := seen(job)[-1]["pid"]):
            os.kill(pid, signal.SIGTERM)

    run(jobs, tmp_path, watch)
    assert "stopped by SIGTERM, which this sweep did not send, after step" in outcomes(jobs)[0]


@pytest.mark.parametrize("what", ["slow", "deaf"])
def test_an_error_of_the_parent_ends_its_children(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_SECONDS_TO_LEAVE", 0.5)
    jobs = made(tmp_path, what, what, device="cuda")

    def watch() -> None:
        if all((job.folder / runs.METRICS).exists() for job in jobs):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run(jobs, tmp_path, watch, devices=["0", "1"])
    assert outcomes(jobs) == ["", ""]
    assert all((job.folder / "checkpoint").exists() for job in jobs)


def test_the_child_of_a_parent_that_is_killed_saves_and_leaves(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, HERE / "parent.py", tmp_path])
    job = Job(0, tmp_path / "0", config.TrainRun(), ["slow"])
    wait_for((job.folder / "checkpoint").exists)
    process.kill()
    process.wait()
    pid = seen(job)[0]["pid"]
    wait_for(lambda: not exists(pid) or state(pid) == "Z")  # a zombie where nobody adopts orphans
    steps = len((job.folder / runs.METRICS).read_text().splitlines())
    assert int((job.folder / "checkpoint").read_text()) == steps


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until, "waited for 20 s"
        time.sleep(0.02)


def test_each_device_has_a_child_with_a_part_of_each_group(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 6, device="cuda")
    most = []
    run(jobs, tmp_path, lambda: most.append(running(tmp_path)), devices=["4", "7"])
    assert [seen(job)[0]["device"] for job in jobs] == ["4", "7"] * 3
    assert max(most) <= 2
    assert {tuple(beside(job)) for job in jobs} == {(3,)}


def running(folder: Path) -> int:
    path = folder / scheduler.RUNNING
    return len(json.loads(path.read_text())) if path.exists() else 0


def test_no_device_has_two_children_at_a_time(tmp_path: Path) -> None:
    """Jobs of cuda:1 count on the device that any job may get, and keep the environment that their number is of."""
    anywhere = made(tmp_path / "a", *["slow"] * 2, device="cuda")
    there = made(tmp_path / "b", *["slow"] * 2, device="cuda:1")
    jobs = [Job(n, job.folder, job.cfg, job.overrides) for n, job in enumerate([*there, *anywhere])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        at_once: list[int] = []

        def watch() -> None:
            at_once.append(running(tmp_path))
            begun = [job for job in jobs if (job.folder / runs.METRICS).exists()]
            if len(begun) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted):
            run(jobs, tmp_path, watch)
    assert max(at_once) == 2
    assert [process["device"] for job in there for process in seen(job)] == ["2,3"]
    assert [process["device"] for job in anywhere for process in seen(job)] == ["2"]


def test_on_a_cpu_one_child_runs_at_a_time(tmp_path: Path) -> None:
    jobs = made(tmp_path, *["finish"] * 4, device="cpu")
    at_once: list[int] = []
    run(jobs, tmp_path, lambda: at_once.append(running(tmp_path)), devices=["0", "1"])
    assert max(at_once) <= 1
    assert [beside(job) for job in jobs] == [[4]] * 4


@pytest.mark.parametrize(
    ("said", "names"),
    [("0,2", ["0", "2"]), ("GPU-8932f937, MIG-1", ["GPU-8932f937", "MIG-1"]), ("1,-1,2", ["1"]), ("", []), ("-1", [])],
)
def test_devices_are_those_that_cuda_will_see(said: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert devices.visible() == names
    assert devices.usable("auto", []) == (names or [""])
    assert devices.usable("cuda", ["5"]) == ["5"]
    assert devices.usable("cpu", ["5"]) == devices.usable("mps", []) == [""]


def test_without_a_word_of_the_environment_device_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        self.number, self.jobs, self.slot, self.overdue = 0, [], "here", None

    def slots(self, device, chosen):
        return ["here"]

    def submit(self, group, slot, sweep, folder):
        for job in group:
            runs.create(job.folder, validation.to_plain(job.cfg), job.overrides)
            (job.folder / runs.RESULT).write_text("{}")
        self.jobs = group
        return self

    def ended(self):
        return 0

    def beat(self):
        return Beat()


def test_another_executor_is_one_class_and_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(EXECUTORS, "toy", InOrder())
    jobs = made(tmp_path, "finish", "finish")
    run(jobs, tmp_path, executor="toy")
    assert outcomes(jobs) == ["finished"] * 2 and seen(jobs[0]) == []
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.executor must be one of local, toy, got slurm"):
        run(made(tmp_path / "other", "finish"), tmp_path, executor="slurm")
