"""Run each group of jobs in a worker process on this machine. No torch here.

    F/children/3.jobs.json    the jobs of worker 3
    F/children/3.json         its heartbeat: {"folder": "/abs/F/7", "beat": 17, "doing": "step"}
    F/children/3.log          everything that it prints

A worker leads its own session, so Ctrl-C in a terminal reaches this process only. It reads its stdin until the end of
the file, which asks it to save and exit: this process closes the pipe to stop a worker, and the system closes it if
this process dies.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lora_ft import config, validation
from lora_ft.errors import LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import devices, jobs, results
from lora_ft.sweeps.executors.interface import BASE_CHANGED, Beat
from lora_ft.sweeps.jobs import Job
from lora_ft.training.signals import STOPPING

FOLDER = "children"
_STOPPED = tuple(128 + signum for signum in STOPPING)
_EXPECTED_CODES = (0, BASE_CHANGED, *_STOPPED)


class LocalProcess:
    """A worker process and its jobs; `slot` is the device that it may use."""

    def __init__(
        self, group: list[Job], slot: str, process: subprocess.Popen[bytes], heartbeat: Path, timeout: float | None
    ) -> None:
        self.jobs, self.slot = group, slot
        self._process, self._heartbeat, self._timeout = process, heartbeat, timeout
        self._last_beat, self._last_beat_at = 0, time.monotonic()
        self._overdue: Beat | None = None  # the last heartbeat, if the process was killed for taking too long

    def ended(self) -> int | None:
        """Return the exit code, None while the process runs; kill it if its heartbeat is older than the timeout."""
        code = self._process.poll()
        if code is not None:
            assert self._process.stdin
            if code not in _EXPECTED_CODES and not self._process.stdin.closed:
                self._kill_group()  # processes that a library of a crashed worker has started
            self.stop()  # closes our end of the pipe
        elif self._timeout and not self._overdue and self._seconds_since_beat() > self._timeout:
            self._overdue = self.beat()
            self.kill()
        return code

    def _seconds_since_beat(self) -> float:
        """Return the time since the heartbeat was seen to change, by the clock of this process that nobody sets."""
        with contextlib.suppress(FileNotFoundError):
            if (changed := self._heartbeat.stat().st_mtime_ns) != self._last_beat:
                self._last_beat, self._last_beat_at = changed, time.monotonic()
        return time.monotonic() - self._last_beat_at

    def beat(self) -> Beat:
        """Read the heartbeat; a process without one, or with half of one, has not started a job."""
        try:
            record = json.loads(self._heartbeat.read_bytes())
        except (FileNotFoundError, ValueError):
            return Beat()
        return Beat(Path(record["folder"]), record["doing"])

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: only zombies are left in the group
            os.killpg(self._process.pid, signal.SIGKILL)

    def death(self, job: Job) -> LoraFtError:
        """Return the reason why a job has no outcome although its process has ended."""
        code, step = self._process.returncode, results.read_job(job.folder).step
        when = f"after step {step}" if step else "before its first step"
        see = f"see {self._heartbeat.with_suffix('.log')}"
        if self._overdue:
            limit = f"hydra.launcher.job_timeout={self._timeout:g}"
            return ResourceError(f"no progress for {self._timeout:g} s ({self._overdue.doing}, {when}; {limit}); {see}")
        if code == -signal.SIGKILL:
            return ResourceError(f"its process was killed by SIGKILL, often for lack of memory, {when}; {see}")
        if code < 0:
            return LoraFtError(f"its process was killed by {_name(-code)} {when}; {see}")
        if code in _STOPPED:
            sent = "which this sweep did not send"
            return LoraFtError(f"its process was stopped by {_name(code - 128)}, {sent}, {when}; {see}")
        return LoraFtError(f"its process ended with exit code {code} and without a result {when}; {see}")


def command() -> list[str]:
    """Return the command of a worker; the traceback of a crash in compiled code goes into its log."""
    return [sys.executable, "-X", "faulthandler", "-m", "lora_ft.sweeps.worker"]


class LocalProcesses:
    """One worker process at a time on each device."""

    def slots(self, device: str, chosen: list[str]) -> list[str]:
        """Return the devices that can run a job with this setting `device`; [""] for the CPU."""
        return devices.usable(device, chosen)

    def submit(
        self, group: list[Job], slot: str, launcher: config.Launcher, sweep: config.Sweep, folder: Path
    ) -> LocalProcess:
        """Start a process for a group of the sweep in `folder`; raises ResourceError if the system refuses."""
        durable.make_folder(folder / FOLDER)
        number = 1 + max((int(p.stem) for p in (folder / FOLDER).iterdir() if p.stem.isdecimal()), default=0)
        heartbeat = (folder / FOLDER / f"{number}.json").absolute()
        order = heartbeat.with_suffix(".jobs.json")
        given = [jobs.to_plain(job) for job in group]
        durable.write_json(order, {"jobs": given, "heartbeat": str(heartbeat), "sweep": validation.to_plain(sweep)})
        # The number of cuda:N counts the devices that this process sees: such a job keeps its environment.
        assigned = slot and ":" not in group[0].cfg.device
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if assigned else {})
        log = durable.open_log(heartbeat.with_suffix(".log"))
        try:
            process = subprocess.Popen([*command(), str(order)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                                       start_new_session=True, env=environment)  # fmt: skip
        except OSError as error:
            raise ResourceError(f"no process can be started for a job: {error.strerror}") from error
        finally:
            os.close(log)
        return LocalProcess(group, slot, process, heartbeat, launcher.job_timeout)


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
