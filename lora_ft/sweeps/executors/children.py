"""The files of a worker in the folder of its sweep, and what they tell about it. No torch here.

F/children/3.jobs.json    its order: the jobs, and how it is to run
F/children/3.json         its heartbeat: {"folder": "/abs/F/7", "beat": 17, "doing": "step", "host": "node4"}
F/children/3.log          everything that it prints
F/children/3.stop         asks it to save and exit, where it has no pipe to the command
"""

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.errors import LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import jobs, results
from lora_ft.sweeps.executors.interface import BASE_CHANGED, Beat
from lora_ft.sweeps.jobs import Job
from lora_ft.training.signals import STOPPING

ORDER, LOG, STOP = ".jobs.json", ".log", ".stop"
STOPPED = tuple(128 + signum for signum in STOPPING)
EXPECTED_CODES = (0, BASE_CHANGED, *STOPPED)


def command() -> list[str]:
    """Return the command of a worker; the traceback of a crash in compiled code goes into its log."""
    return [sys.executable, "-X", "faulthandler", "-m", "lora_ft.sweeps.worker"]


def write_order(group: list[Job], sweep: config.Sweep, folder: Path, *, watch_stdin: bool = True, **more: Any) -> Path:
    """Write the order of a new worker of the sweep in `folder`; return the path of its heartbeat."""
    children = folder / runs.CHILDREN
    durable.make_folder(children)
    number = 1 + max((int(path.name.partition(".")[0]) for path in children.glob("[0-9]*.*")), default=0)
    heartbeat = (children / f"{number}.json").absolute()
    given = [jobs.to_plain(job) for job in group]
    order = {"jobs": given, "heartbeat": str(heartbeat), "sweep": validation.to_plain(sweep)}
    durable.write_json(heartbeat.with_suffix(ORDER), {**order, "watch_stdin": watch_stdin, **more})
    return heartbeat


class Child:
    """A worker, its jobs and its files. The base of handles."""

    def __init__(self, group: list[Job], slot: str, heartbeat: Path, timeout: float | None) -> None:
        self.jobs, self.slot = group, slot
        self._heartbeat, self._timeout = heartbeat, timeout
        self._last_beat, self._last_beat_at = 0, time.monotonic()
        self._overdue: Beat | None = None  # the last heartbeat, if the worker was killed for taking too long

    def beat(self) -> Beat:
        """Read the heartbeat; a worker without one, or with half of one, has not started a job."""
        try:
            record = json.loads(self._heartbeat.read_bytes())
        except (FileNotFoundError, ValueError):
            return Beat()
        return Beat(Path(record["folder"]), record["doing"])

    def _is_overdue(self) -> bool:
        """Return True once, when the heartbeat is older than the timeout: the worker is to be killed."""
        if not self._timeout or self._overdue or self._seconds_since_beat() <= self._timeout:
            return False
        self._overdue = self.beat()
        return True

    def _seconds_since_beat(self) -> float:
        """Return the time since the heartbeat was seen to change, by the clock of this process that nobody sets."""
        with contextlib.suppress(FileNotFoundError):
            if (changed := self._heartbeat.stat().st_mtime_ns) != self._last_beat:
                self._last_beat, self._last_beat_at = changed, time.monotonic()
        return time.monotonic() - self._last_beat_at

    def _death(self, job: Job, code: int, reason: str = "") -> LoraFtError:
        """Return the reason why a job has no outcome: `reason` if it is known, else from the exit code."""
        step = results.read_job(job.folder).step
        when = f"after step {step}" if step else "before its first step"
        see = f"see {self._heartbeat.with_suffix(LOG)}"
        if self._overdue:
            limit = f"hydra.launcher.job_timeout={self._timeout:g}"
            return ResourceError(f"no progress for {self._timeout:g} s ({self._overdue.doing}, {when}; {limit}); {see}")
        if reason:
            return ResourceError(f"{reason}, {when}; {see}")
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return ResourceError(f"its process was killed by SIGKILL, often for lack of memory, {when}; {see}")
        if code < 0:
            return LoraFtError(f"its process was killed by {_name(-code)} {when}; {see}")
        if code in STOPPED:
            sent = "which this sweep did not send"
            return LoraFtError(f"its process was stopped by {_name(code - 128)}, {sent}, {when}; {see}")
        return LoraFtError(f"its process ended with exit code {code} and without a result {when}; {see}")


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
