"""Run each group of jobs as a task of Ray. No torch here.

The task starts the same worker process as the other executors, and holds its stdin: if Ray's process dies, the worker
saves and exits. Ray itself retries nothing, because only the scheduler knows which jobs are left.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_ft import config
from lora_ft.errors import LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps.executors import children
from lora_ft.sweeps.executors.interface import Handle
from lora_ft.sweeps.jobs import Job

_SECONDS_BETWEEN_LOOKS = 0.5
_KILL = "kill"  # in the file that stops a worker


def run_worker(heartbeat: str) -> int:
    """Run a worker until it ends, in a process of Ray on any machine; return its exit code."""
    order, log_file, stop = (Path(heartbeat).with_suffix(end) for end in (children.ORDER, children.LOG, children.STOP))
    log = durable.open_log(log_file)
    try:
        # A session of its own: what ends Ray's process leaves the worker the time to save.
        process = subprocess.Popen([*children.command(), str(order)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    finally:
        os.close(log)
    with process, contextlib.suppress(KeyboardInterrupt):  # the task was cancelled; the end closes stdin and waits
        assert process.stdin
        while process.poll() is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if stop.exists():
                process.stdin.close()
                if stop.read_text("utf-8") == _KILL and process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


class RayTask(children.Child):
    """A group in a task; `slot` is one of hydra.launcher.max_running."""

    def __init__(
        self, group: list[Job], slot: str, heartbeat: Path, launcher: config.Launcher, ray: ModuleType, task: Any
    ) -> None:
        super().__init__(group, slot, heartbeat, launcher.job_timeout)
        self._ray, self._task, self._retries = ray, task, launcher.retries
        self._looked = -float("inf")
        self._code: int | None = None
        self._error: Exception | None = None
        self._is_lost = False

    def ended(self) -> int | None:
        if self._code is None and time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            self._look()
        return self._code

    def _look(self) -> None:
        if self._ray.wait([self._task], timeout=0)[0]:
            self._end()
        elif not self._heartbeat.exists():
            self._last_beat_at = time.monotonic()  # it may wait for resources
        elif self._is_overdue():
            self.kill()

    def _end(self) -> None:
        """Read the exit code of the worker, or the reason why Ray has none."""
        errors = self._ray.exceptions
        try:
            self._code = self._ray.get(self._task)
        except (errors.RayTaskError, errors.OutOfMemoryError, errors.RuntimeEnvSetupError) as error:
            self._code, self._error = 1, error
        except errors.TaskCancelledError:
            self._code = -signal.SIGTERM
        except errors.RayError as error:  # a process or a node of Ray that died
            self._code, self._error, self._is_lost = -signal.SIGKILL, error, True
            self._write_stop("")  # for a worker that still runs on a machine that only lost its connection

    def lost(self) -> bool:
        return self._is_lost and not self._overdue

    def stop(self) -> None:
        if not self._heartbeat.with_suffix(children.STOP).exists():
            self._write_stop("")

    def kill(self) -> None:
        self._write_stop(_KILL)

    def _write_stop(self, text: str) -> None:
        durable.write_text(self._heartbeat.with_suffix(children.STOP), text)
        if not self._heartbeat.exists():  # it may wait for resources
            self._ray.cancel(self._task, force=False)

    def death(self, job: Job) -> LoraFtError:
        """Return the reason why a job has no outcome although its task has ended."""
        assert self._code is not None
        reason = f"Ray ended its task ({str(self._error).splitlines()[0]})" if self._error else ""
        if self._is_lost:
            reason += f" too often since the last checkpoint, hydra.launcher.retries={self._retries}"
        return self._death(job, self._code, reason)


class RayTasks:
    """One task for each group, so many of them at a time."""

    settings = frozenset({"job_timeout", "max_running", "gpus", "cpus", "memory", "retries", "address"})

    def slots(self, device: str, launcher: config.Launcher) -> list[str]:
        """Return the slots, connected to Ray: not later, because Ray sets handlers of signals when it starts."""
        _connected(launcher.address)
        return [f"ray {number}" for number in range(launcher.max_running)]

    def submit(
        self, group: list[Job], slot: str, launcher: config.Launcher, sweep: config.Sweep, folder: Path
    ) -> RayTask:
        """Start a task for a group of the sweep in `folder`; raises ResourceError if this machine cannot run it."""
        ray = _connected(launcher.address)
        gpus = launcher.gpus if launcher.gpus is not None else int(group[0].cfg.device != "cpu")
        resources: dict[str, float] = {"num_cpus": launcher.cpus or 1, "num_gpus": gpus}
        if launcher.memory:
            resources["memory"] = round(launcher.memory * 2**30)
        if launcher.address is None:  # a cluster may grow
            _check_fits(resources, ray.cluster_resources())
        heartbeat = children.write_order(group, sweep, folder)
        # Ray sends the function by its name, because all nodes have this package, and texts as arguments.
        task = ray.remote(run_worker).options(max_retries=0, **resources).remote(str(heartbeat))
        return RayTask(group, slot, heartbeat, launcher, ray, task)

    def adopt(self, folder: Path, launcher: config.Launcher) -> list[Handle]:
        return []  # Ray ends the tasks of a command that has ended; a folder is locked until its job has saved


def _connected(address: str | None) -> ModuleType:
    """Return the package, connected to the cluster at `address` or to a new one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise ResourceError(
            f"hydra.launcher.executor=ray needs the package ray: pip install 'lora_ft[ray]' ({error})"
        ) from None
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if address is None:
            options["include_dashboard"] = False
        try:
            ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ResourceError(f"hydra.launcher.address={address}: Ray cannot be reached: {error}") from error
    return ray


def _check_fits(wanted: dict[str, float], found: dict[str, float]) -> None:
    """Raise ResourceError for resources that this machine lacks: Ray would wait for them without an end."""
    names = {"num_cpus": ("cpus", "CPU", 1), "num_gpus": ("gpus", "GPU", 1), "memory": ("memory", "memory", 2**30)}
    for key, amount in wanted.items():
        setting, name, unit = names[key]
        if amount > found.get(name, 0):
            raise ResourceError(
                f"hydra.launcher.{setting}={amount / unit:g} is more than this machine has for Ray: "
                f"{found.get(name, 0) / unit:g}"
            )
