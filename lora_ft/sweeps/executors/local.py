"""Local processes: a worker process for each group, watched by its heartbeat. No torch here.

    F/children/3.log     everything that child 3 prints
    F/children/3.json    its heartbeat: {"folder": "/abs/F/7", "beat": 17, "doing": "step"}

The child leads a session of its own: Ctrl-C in a terminal reaches the parent only, which passes it on. The pipe to its
stdin ends when the parent does, however that ends; then it saves and leaves.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.errors import LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import devices, jobs
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job

FOLDER = "children"
_GOOD_ENDS = (0, 75, 130, 143)


class Child:
    """A running process and the jobs it was given; `slot` is the device it may use."""

    def __init__(
        self, number: int, given: list[Job], slot: str, process: subprocess.Popen[bytes], heartbeat: Path, line: bytes
    ) -> None:
        self.number, self.jobs, self.slot = number, given, slot
        self.log = heartbeat.with_suffix(".log")
        self.overdue: Beat | None = None  # where it was killed for taking too long
        assert process.stdin
        os.set_blocking(process.stdin.fileno(), False)
        self._process, self._stdin, self._unsent, self._heartbeat = process, process.stdin, line, heartbeat
        self._last_beat, self._beat_began = 0, time.monotonic()

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs. To be asked often: this feeds its stdin as well."""
        if self._process.returncode is None:
            self._feed()
            if self._process.poll() is not None:
                self._stdin.close()
                if self._process.returncode not in _GOOD_ENDS:
                    self._kill_group()  # what it had started
        return self._process.returncode

    def _feed(self) -> None:
        """Give it as much of its jobs as its pipe takes now: a pipe holds about fifteen, and a child may never read."""
        with contextlib.suppress(BrokenPipeError):  # its exit code will say what happened to it
            while self._unsent and (taken := self._stdin.write(self._unsent)):
                self._unsent = self._unsent[taken:]

    def seconds_since_beat(self) -> float:
        """Since its heartbeat was last seen to change, or its start; by this process's clock, which nobody sets."""
        with contextlib.suppress(FileNotFoundError):
            if (changed := self._heartbeat.stat().st_mtime_ns) != self._last_beat:
                self._last_beat, self._beat_began = changed, time.monotonic()
        return time.monotonic() - self._beat_began

    def beat(self) -> Beat:
        """Return the job that it runs, and what it does, by its heartbeat."""
        return beat(self._heartbeat)

    def signal(self, signum: int) -> None:
        self._process.send_signal(signum)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._kill_group()

    def kill_overdue(self) -> None:
        self.overdue = beat(self._heartbeat)
        self.kill()

    def death(self, job: Job, timeout: float | None) -> LoraFtError:
        """Return why a job has no outcome although its process ended."""
        code = self.ended() or 0
        step = _last_step(job.folder)
        when = f"after step {step}" if step else "before its first step"
        see = f"see {self.log}"
        if self.overdue:
            told = f"no progress for {timeout:g} s ({self.overdue.doing}, {when}; "
            return ResourceError(f"{told}hydra.launcher.job_timeout={timeout:g}); {see}")
        if code == -signal.SIGKILL:
            often = "the system's answer to too little memory, often"
            return ResourceError(f"its process was killed by SIGKILL ({often}) {when}; {see}")
        if code < 0:
            return LoraFtError(f"its process was killed by {_name(-code)} {when}; {see}")
        if code in (130, 143):
            return LoraFtError(
                f"its process was stopped by {_name(code - 128)}, which this sweep did not send, {when}; {see}"
            )
        return LoraFtError(f"its process ended with exit code {code} and without an outcome {when}; {see}")

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: nobody is left but the dead
            os.killpg(self._process.pid, signal.SIGKILL)


def command() -> list[str]:
    """What a child runs; the traceback of a crash in compiled code goes into its log."""
    return [sys.executable, "-X", "faulthandler", "-m", "lora_ft.sweeps.worker"]


class LocalProcesses:
    """One worker process at a time on each device."""

    def slots(self, device: str, chosen: list[str]) -> list[str]:
        """Return the devices that can run a job with this setting `device`; [""] for the CPU."""
        return devices.usable(device, chosen)

    def submit(self, group: list[Job], slot: str, sweep: config.Sweep, folder: Path) -> Child:
        """Start a process for a group of the sweep in `folder`; ResourceError if the system refuses."""
        durable.make_folder(folder / FOLDER)
        number = 1 + max((int(p.stem) for p in (folder / FOLDER).iterdir() if p.stem.isdecimal()), default=0)
        heartbeat = (folder / FOLDER / f"{number}.json").absolute()
        order = {
            "jobs": [jobs.to_plain(job) for job in group],
            "heartbeat": str(heartbeat),
            "sweep": validation.to_plain(sweep),
        }
        assigned = slot and ":" not in group[0].cfg.device  # cuda:N counts by what the parent sees
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if assigned else {})
        log = durable.open_log(heartbeat.with_suffix(".log"))
        try:
            process = subprocess.Popen(command(), bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=log,
                                       start_new_session=True, env=environment)  # fmt: skip
        except OSError as error:
            raise ResourceError(f"no process can be started for a job: {error.strerror}") from error
        finally:
            os.close(log)
        return Child(number, group, slot, process, heartbeat, json.dumps(order).encode() + b"\n")


def beat(heartbeat: Path) -> Beat:
    """Read a heartbeat; a child that has none yet, or half of one, has begun no job."""
    try:
        record: dict[str, Any] = json.loads(heartbeat.read_bytes())
        return Beat(Path(record["folder"]) if record["folder"] else None, record["doing"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Beat()


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"


def _last_step(folder: Path) -> int:
    """The last step in metrics.jsonl whose line is whole; 0 where there is none."""
    path = folder / runs.METRICS
    for line in reversed(path.read_bytes().splitlines() if path.is_file() else []):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0
