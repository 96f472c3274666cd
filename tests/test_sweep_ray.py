"""Sweeps on Ray, whose package is a stand-in that runs each task in a thread of this process.

tests/test_sweep_cluster.py has the real one.
"""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sweep_scheduler import after_steps, fake_workers, group_sizes, made, outcomes, run, seen  # noqa: F401

from lora_ft import runs
from lora_ft.errors import Interrupted, ResourceError
from lora_ft.sweeps.executors import ray


class RayError(Exception):
    pass


class Task:
    """A task; `instead` is the error that it ends with in place of the exit code of its worker."""

    def __init__(self, function: Callable[[str], int], heartbeat: str) -> None:
        self.value: Any = None
        self.instead: Exception | None = None
        self.stop = Path(heartbeat).with_suffix(".stop")
        self.ended = threading.Event()
        self._call = lambda: function(heartbeat)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            value = self._call()
        except Exception as error:
            value = self.module.exceptions.RayTaskError(f"{type(error).__name__}: {error}")
        self.end(self.instead or value)

    def end(self, value: Any) -> None:
        if not self.ended.is_set():
            self.value = value
            self.ended.set()


class FakeRay(types.ModuleType):
    """The functions of ray that the executor calls. `hold`: tasks wait for resources."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayError=RayError)
        for name in ("RayTaskError", "OutOfMemoryError", "RuntimeEnvSetupError", "TaskCancelledError", "NodeDied"):
            setattr(self.exceptions, name, type(name, (RayError,), {}))
        self.tasks: list[Task] = []
        self.started: dict[str, Any] | None = None
        self.options: list[dict[str, Any]] = []
        self.hold = False

    def is_initialized(self) -> bool:
        return self.started is not None

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere:1":
            raise ConnectionError("no cluster there")
        self.started = options

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, "memory": 8 * 2**30}

    def remote(self, function: Callable[[str], int]) -> Any:
        def submit(heartbeat: str) -> Task:
            task = Task(function, heartbeat)
            task.module = self
            self.tasks.append(task)
            if not self.hold:
                task.thread.start()
            return task

        def options(**chosen: Any) -> Any:
            self.options.append(chosen)
            return types.SimpleNamespace(remote=submit)

        return types.SimpleNamespace(options=options)

    def wait(self, tasks: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        return [t for t in tasks if t.ended.is_set()], [t for t in tasks if not t.ended.is_set()]

    def get(self, task: Task) -> int:
        if isinstance(task.value, Exception):
            raise task.value
        return task.value

    def cancel(self, task: Task, force: bool) -> None:
        if self.hold:
            task.end(self.exceptions.TaskCancelledError())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr(ray, "_SECONDS_BETWEEN_LOOKS", 0.05)
    return made


def sweep(jobs: list[Any], folder: Path, watch: Callable[[Any], None] = lambda running: None, **more: Any) -> None:
    run(jobs, folder, watch, **{"executor": "ray", "gpus": 0, **more})


def test_groups_run_as_tasks_with_the_resources_that_the_settings_name(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "finish", "fail", "finish")
    sweep(jobs, tmp_path, max_running=2, cpus=2, memory=1.5)
    assert outcomes(jobs) == ["finished", "planted", "finished"]
    assert [group_sizes(job) for job in jobs] == [[2], [1], [2]]
    assert fake.options == [{"max_retries": 0, "num_cpus": 2, "num_gpus": 0, "memory": 1.5 * 2**30}] * 2
    assert fake.started["address"] == "local"


def test_group_asks_an_existing_cluster_for_a_gpu_unless_its_device_is_the_cpu(tmp_path: Path, fake: FakeRay) -> None:
    sweep([*made(tmp_path / "a", "finish", device="auto")], tmp_path, gpus=None, address="auto")
    sweep([*made(tmp_path / "b", "finish", device="cpu")], tmp_path, gpus=None, address="auto")
    assert [(each["num_cpus"], each["num_gpus"]) for each in fake.options] == [(1, 1), (1, 0)]
    assert fake.started["address"] == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 1}, r"hydra\.launcher\.gpus=1 is more than this machine has for Ray: 0"),
        ({"cpus": 9}, r"hydra\.launcher\.cpus=9 is more than this machine has for Ray: 2"),
        ({"memory": 9.5}, r"hydra\.launcher\.memory=9\.5 is more than this machine has for Ray: 8"),
        ({"address": "nowhere:1"}, r"hydra\.launcher\.address=nowhere:1: Ray cannot be reached: no cluster there"),
    ],
)
def test_resources_that_never_come_are_refused(settings, message: str, tmp_path: Path, fake: FakeRay) -> None:
    with pytest.raises(ResourceError, match=message):
        sweep(made(tmp_path, "finish"), tmp_path, **settings)


def test_job_of_a_lost_node_continues_from_its_checkpoint_in_another_task(tmp_path: Path, fake: FakeRay) -> None:
    """The worker saves, as it does when Ray's process dies and closes its pipe."""
    jobs = made(tmp_path, "long", "finish")

    def lose(running: Any) -> None:
        metrics = jobs[0].folder / runs.METRICS
        if not fake.tasks[0].instead and metrics.exists() and metrics.read_bytes().count(b"\n") >= 5:
            fake.tasks[0].instead = fake.exceptions.NodeDied("the node died")
            fake.tasks[0].stop.touch()

    sweep(jobs, tmp_path, lose)
    assert outcomes(jobs) == ["finished"] * 2
    assert len(seen(jobs[0])) == 2 and seen(jobs[0])[1]["from"] >= 4


def test_job_without_progress_fails_after_its_retries(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "hang_loading", "finish")

    def lose(running: Any) -> None:
        if len(seen(jobs[0])) == len(fake.tasks) and not fake.tasks[-1].instead:
            fake.tasks[-1].instead = fake.exceptions.NodeDied("the node died")
            os.killpg(seen(jobs[0])[-1]["pid"], signal.SIGKILL)

    sweep(jobs, tmp_path, lose, retries=2)
    assert len(seen(jobs[0])) == 3
    reason = "Ray ended its task (the node died) too often since the last checkpoint, hydra.launcher.retries=2, before"
    assert outcomes(jobs)[0].startswith(reason) and outcomes(jobs)[1] == "finished"


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "RayTaskError"])
def test_task_that_ends_for_a_reason_of_its_own_fails_its_job(kind: str, tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "long", "finish")

    def end(running: Any) -> None:
        if not fake.tasks[0].instead and (jobs[0].folder / runs.METRICS).exists():
            fake.tasks[0].instead = getattr(fake.exceptions, kind)("the reason\nand more")
            os.killpg(seen(jobs[0])[-1]["pid"], signal.SIGKILL)

    sweep(jobs, tmp_path, end)
    assert outcomes(jobs)[0].startswith("Ray ended its task (the reason), after step ") and len(seen(jobs[0])) == 1
    assert outcomes(jobs)[1] == "finished"


def test_worker_that_dies_of_itself_fails_its_running_job(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "exit", "kill", "finish")
    sweep(jobs, tmp_path)
    assert "ended with exit code 9" in outcomes(jobs)[0] and "killed by SIGKILL" in outcomes(jobs)[1]
    assert outcomes(jobs)[2] == "finished"


def test_stopped_sweep_saves(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "slow", "finish")
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        sweep(jobs, tmp_path, after_steps(jobs[0], 3, signal.SIGTERM))
    assert int((jobs[0].folder / "checkpoint").read_text()) == len(runs.read_metrics(jobs[0].folder))
    assert outcomes(jobs) == ["", ""] and seen(jobs[1]) == []


def test_second_signal_kills_a_worker_that_does_not_stop(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "deaf")
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        sweep(jobs, tmp_path, after_steps(jobs[0], 2, signal.SIGTERM, signal.SIGINT))
    assert outcomes(jobs) == [""]


def test_stopped_sweep_cancels_tasks_that_wait(tmp_path: Path, fake: FakeRay) -> None:
    fake.hold = True
    jobs = made(tmp_path, "finish")
    with pytest.raises(Interrupted):
        sweep(jobs, tmp_path, lambda running: os.kill(os.getpid(), signal.SIGINT) if running else None)
    assert seen(jobs[0]) == []


def test_hanging_job_is_killed_after_job_timeout(tmp_path: Path, fake: FakeRay) -> None:
    jobs = made(tmp_path, "hang", "finish")
    sweep(jobs, tmp_path, job_timeout=1.0)
    assert outcomes(jobs)[0].startswith("no progress for 1 s (step, after step 1; hydra.launcher.job_timeout=1); see ")
    assert outcomes(jobs)[1] == "finished"


def test_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match=r"executor=ray needs the package ray: pip install 'lora_ft\[ray\]'"):
        sweep(made(tmp_path, "finish"), tmp_path)
