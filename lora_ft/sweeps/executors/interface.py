"""What the scheduler of a sweep asks of an executor. No torch here.

slots(device)                       where a group can run: one group at a time in each
submit(group, slot, ...) -> Handle  start a worker that trains the jobs of a group, in order
handle.ended()                      None while it runs, then its exit code
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_ft import config
from lora_ft.errors import LoraFtError
from lora_ft.sweeps.jobs import Job


@dataclass(frozen=True)
class Beat:
    """The job that a worker is running, None before the first, and what it does: loading, step or end."""

    folder: Path | None = None
    doing: str = "loading"


class Handle(Protocol):
    """A submitted group. `overdue` is where it was killed for taking too long."""

    number: int
    jobs: list[Job]
    slot: str
    overdue: Beat | None

    def ended(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs. Called often."""

    def beat(self) -> Beat:
        """Return the job that it runs, and what it does."""

    def seconds_since_beat(self) -> float:
        """Return the time since its heartbeat last changed, or since its start."""

    def signal(self, signum: int) -> None:
        """Let it finish its step, save and leave."""

    def kill(self) -> None:
        """End it at once."""

    def kill_overdue(self) -> None:
        """End it at once, and note what it was doing."""

    def death(self, job: Job, timeout: float | None) -> LoraFtError:
        """Return why a job has no outcome although its worker ended."""


class Executor(Protocol):
    """Runs groups of jobs."""

    def slots(self, device: str, chosen: list[str]) -> list[str]:
        """Return the slots for jobs with this setting `device`; `chosen` is hydra.launcher.devices."""

    def submit(self, group: list[Job], slot: str, sweep: config.Sweep, folder: Path) -> Handle:
        """Start a worker for a group of the sweep in `folder`; ResourceError if it cannot be started."""
