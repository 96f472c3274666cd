"""The interface between the scheduler of a sweep and its executors. No torch here.

settings                            the settings of hydra.launcher that the executor honours
slots(device, launcher)             the slots for such jobs; one group runs in a slot at a time
submit(group, slot, ...) -> Handle  start a worker that trains the jobs of a group, in order
adopt(folder) -> [Handle]           the workers of an earlier command that still run
handle.ended()                      None while the worker runs, then its exit code
handle.lost()                       True if a machine failed, and not a job: the running job continues in a new worker
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_ft import config
from lora_ft.errors import LoraFtError
from lora_ft.sweeps.jobs import Job

BASE_CHANGED = 75  # exit code of a worker whose base a failed job changed (EX_TEMPFAIL of sysexits.h)


@dataclass(frozen=True)
class Beat:
    """The folder of the job that a worker is running, None before the first, and its phase: loading, step or end."""

    folder: Path | None = None
    doing: str = "loading"


class Handle(Protocol):
    """A submitted group."""

    jobs: list[Job]
    slot: str

    def ended(self) -> int | None:
        """Return the exit code, negative for a signal; None while the worker runs. Called many times a second.

        A worker that waits for a machine, or that its cluster starts again, runs.
        """

    def lost(self) -> bool:
        """Return True if the worker has ended for a reason outside of its jobs, such as a lost machine."""

    def beat(self) -> Beat:
        """Return the job that is running, and its phase."""

    def stop(self) -> None:
        """Ask the worker to finish its step, save a checkpoint and exit. May be called again."""

    def kill(self) -> None:
        """Kill the worker."""

    def death(self, job: Job) -> LoraFtError:
        """Return the reason why a job has no outcome although its worker has ended."""


class Executor(Protocol):
    """Runs groups of jobs."""

    settings: frozenset[str]  # of hydra.launcher, besides executor and share_base

    def slots(self, device: str, launcher: config.Launcher) -> list[str]:
        """Return the slots for jobs with this setting `device`."""

    def submit(
        self, group: list[Job], slot: str, launcher: config.Launcher, sweep: config.Sweep, folder: Path
    ) -> Handle:
        """Start a worker for a group of the sweep in `folder`; raises ResourceError if it cannot be started."""

    def adopt(self, folder: Path, launcher: config.Launcher) -> list[Handle]:
        """Return the workers that an earlier command started for the sweep in `folder` and that have not ended."""
