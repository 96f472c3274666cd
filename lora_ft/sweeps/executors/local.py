"""Run each group of jobs in a worker process on this machine. No torch here.

A worker leads its own session, so Ctrl-C in a terminal reaches this process only. It reads its stdin until the end of
the file, which asks it to save and exit: this process closes the pipe to stop a worker, and the system closes it if
this process dies.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from lora_ft import config
from lora_ft.errors import LoraFtError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import devices
from lora_ft.sweeps.executors import children
from lora_ft.sweeps.executors.interface import Handle
from lora_ft.sweeps.jobs import Job


class LocalProcess(children.Child):
    """A worker process and its jobs; `slot` is the device that it may use."""

    def __init__(
        self, group: list[Job], slot: str, process: subprocess.Popen[bytes], heartbeat: Path, timeout: float | None
    ) -> None:
        super().__init__(group, slot, heartbeat, timeout)
        self._process = process

    def ended(self) -> int | None:
        """Return the exit code, None while the process runs; kill it if its heartbeat is older than the timeout."""
        code = self._process.poll()
        if code is not None:
            assert self._process.stdin
            if code not in children.EXPECTED_CODES and not self._process.stdin.closed:
                self._kill_group()  # processes that a library of a crashed worker has started
            self.stop()  # closes our end of the pipe
        elif self._is_overdue():
            self.kill()
        return code

    def lost(self) -> bool:
        return False  # with the machine, this process is lost as well

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
        return self._death(job, self._process.returncode)


class LocalProcesses:
    """One worker process at a time on each device."""

    settings = frozenset({"devices", "job_timeout"})

    def slots(self, device: str, launcher: config.Launcher) -> list[str]:
        """Return the devices that can run a job with this setting `device`; [""] for the CPU."""
        return devices.usable(device, launcher.devices)

    def submit(
        self, group: list[Job], slot: str, launcher: config.Launcher, sweep: config.Sweep, folder: Path
    ) -> LocalProcess:
        """Start a process for a group of the sweep in `folder`; raises ResourceError if the system refuses."""
        heartbeat = children.write_order(group, sweep, folder)
        # The number of cuda:N counts the devices that this process sees: such a job keeps its environment.
        assigned = slot and ":" not in group[0].cfg.device
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if assigned else {})
        command = [*children.command(), str(heartbeat.with_suffix(children.ORDER))]
        log = durable.open_log(heartbeat.with_suffix(children.LOG))
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log,
                                       start_new_session=True, env=environment)  # fmt: skip
        except OSError as error:
            raise ResourceError(f"no process can be started for a job: {error.strerror}") from error
        finally:
            os.close(log)
        return LocalProcess(group, slot, process, heartbeat, launcher.job_timeout)

    def adopt(self, folder: Path, launcher: config.Launcher) -> list[Handle]:
        return []  # a worker exits with the command that started it; the folder of its job is locked until then
