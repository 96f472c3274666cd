"""Sweeps on a real Slurm and a real Ray on this machine end with the adapters of an undisturbed local sweep.

python -m pytest -m cluster tests/test_sweep_cluster.py
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import real_slurm
from finished import rows_file
from test_sweep_hydra import hashes
from test_sweep_scheduler import wait_for
from tiny import tiny_folder

pytestmark = pytest.mark.cluster

SECONDS = 180


class Sweeps:
    """Six jobs in two groups, for each executor in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bases = ",".join(str(tiny_folder(folder / name, "llama", seed=ord(name))) for name in "ab")
        self._overrides = [f"model.path=choice({bases})", f"data.path={rows_file(folder)}", "data.eval_fraction=0.2",
                           "adapter.r=2,3,4", "device=cpu", "train.tokens_per_step=64", "train.max_steps=120",
                           "train.save_every_steps=10", "train.samples=0"]  # fmt: skip

    def start(self, name: str, *settings: str, path: Path | None = None) -> subprocess.Popen[str]:
        settings = tuple(f"hydra.launcher.{setting}" for setting in settings)
        return self._run(*self._overrides, f"hydra.sweep.dir={self.folder / name}", *settings, path=path)

    def resume(self, name: str, executor: str, path: Path | None = None) -> subprocess.Popen[str]:
        return self._run(f"resume={self.folder / name}", f"hydra.launcher.executor={executor}", path=path)

    def _run(self, *words: str, path: Path | None) -> subprocess.Popen[str]:
        programs = [str(path)] if path else []
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([*programs, os.environ["PATH"]])}
        return subprocess.Popen([sys.executable, "-m", "lora_ft", "sweep", *words], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def wait_for_checkpoints(self, name: str) -> None:
        for job in (0, 3):  # the first of each group
            wait_for(lambda job=job: any((self.folder / name / str(job)).glob("checkpoints/step-*")), SECONDS)

    def log(self, name: str, number: int) -> str:
        return (self.folder / name / "children" / f"{number}.log").read_text()


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    printed = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == code, printed
    return printed


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    made = Sweeps(tmp_path_factory.mktemp("sweeps"))
    finished(made.start("local"))
    assert len({*hashes(made.folder / "local"), ""}) == 7
    return made


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if reason := real_slurm.why_not():
        pytest.skip(f"a real Slurm {reason}")
    with real_slurm.started(tmp_path_factory.mktemp("slurm") / "packages") as programs:
        yield programs


def jobs_in_queue(slurm: Path) -> dict[str, str]:
    answer = subprocess.run([slurm / "squeue", "--noheader", "--states=all", "--format=%i %T"], check=True, text=True,
                            capture_output=True).stdout  # fmt: skip
    return dict(line.split() for line in answer.splitlines())


def test_preempted_and_requeued_groups_end_with_the_same_adapters(sweeps: Sweeps, slurm: Path) -> None:
    process = sweeps.start("slurm", "executor=slurm", "partition=low", "max_running=2", "cpus=1", path=slurm)
    sweeps.wait_for_checkpoints("slurm")
    first, second = sorted(jobs_in_queue(slurm), key=int)
    subprocess.run([slurm / "scancel", "--batch", "--signal=USR2", first], check=True)  # as before its time limit
    wait_for(lambda: "DUE TO JOB REQUEUE" in sweeps.log("slurm", 1), SECONDS)
    subprocess.run(
        [slurm / "sbatch", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"], check=True
    )
    printed = finished(process)
    assert hashes(sweeps.folder / "slurm") == hashes(sweeps.folder / "local"), printed
    assert len([*(sweeps.folder / "slurm" / "children").glob("*.sh")]) == 2
    logs = [sweeps.log("slurm", number) for number in (1, 2)]
    assert "SIGUSR2: finishing this step" in logs[0] and "DUE TO PREEMPTION" in logs[1]
    assert all("resuming after step" in log for log in logs)
    assert {jobs_in_queue(slurm)[number] for number in (first, second)} == {"COMPLETED"}


def test_sweep_stopped_on_slurm_continues_here(sweeps: Sweeps, slurm: Path) -> None:
    before = jobs_in_queue(slurm)
    process = sweeps.start("both", "executor=slurm", "max_running=2", path=slurm)
    sweeps.wait_for_checkpoints("both")
    process.send_signal(signal.SIGINT)
    assert "stopped by SIGINT" in finished(process, 130)
    assert {state for number, state in jobs_in_queue(slurm).items() if number not in before} <= {"FAILED", "COMPLETING"}
    finished(sweeps.resume("both", "local", path=slurm))
    assert hashes(sweeps.folder / "both") == hashes(sweeps.folder / "local")


def test_batch_jobs_of_a_killed_command_are_adopted(sweeps: Sweeps, slurm: Path) -> None:
    before = jobs_in_queue(slurm)
    process = sweeps.start("adopted", "executor=slurm", "max_running=2", path=slurm)
    sweeps.wait_for_checkpoints("adopted")
    process.kill()
    process.communicate()
    finished(sweeps.resume("adopted", "slurm", path=slurm))
    assert len(jobs_in_queue(slurm).keys() - before) == 2
    assert hashes(sweeps.folder / "adopted") == hashes(sweeps.folder / "local")


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray: pip install 'lora_ft[ray]'")
def test_killed_worker_of_ray_is_retried_to_the_same_adapters(sweeps: Sweeps) -> None:
    process = sweeps.start("ray", "executor=ray", "max_running=2", "cpus=1")
    sweeps.wait_for_checkpoints("ray")
    [worker] = processes(lambda words: words[-1] == str(sweeps.folder / "ray" / "children" / "1.jobs.json"))
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    printed = finished(process)
    assert hashes(sweeps.folder / "ray") == hashes(sweeps.folder / "local"), printed
    orders = sorted((sweeps.folder / "ray" / "children").glob("*.jobs.json"))
    assert [order.name for order in orders] == ["1.jobs.json", "2.jobs.json", "3.jobs.json"]
    again = json.loads(orders[2].read_bytes())["jobs"]
    assert all(job["cfg"]["resume"] == "auto" for job in again)
    assert "TERM: finishing this step and saving a checkpoint" in sweeps.log("ray", 1)


def processes(is_wanted: Callable[[list[str]], bool]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().rstrip("\0").split("\0")
        except OSError:  # it has just ended
            continue
        if is_wanted(words):
            found.append(int(path.parent.name))
    return found
