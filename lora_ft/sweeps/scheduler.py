"""The scheduler of a sweep: groups dealt to workers, workers watched, jobs left by one that died run again. No torch.

    jobs -grouped-> [0 1 2 3 4 5] [6]  -cut for two GPUs->  [0 2 4] [1 3 5] [6]  -> one worker at a time on each

A job ends with result.json or failure.json in its folder, which its worker writes. If a worker dies, its running job
fails and its other jobs go on in a new worker. While workers run, running.json holds the folders of the jobs of each.
"""

import contextlib
import shlex
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted
from lora_ft.io import durable
from lora_ft.sweeps import jobs
from lora_ft.sweeps.executors import executor
from lora_ft.sweeps.executors.interface import Handle
from lora_ft.sweeps.jobs import Job
from lora_ft.training.signals import handled_by

RUNNING = "running.json"
_SECONDS_BETWEEN_WATCHES = 0.25
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_TO_LEAVE = 10.0  # for children, where the parent itself fails

Slots = dict[str, list[str]]


def run(
    given: list[Job], launcher: config.Launcher, sweep: config.Sweep, folder: Path, watch: Callable[[], None]
) -> None:
    """Bring each job to an outcome; those that are finished are left alone.

    `watch` is called about four times a second, and whenever a worker has ended. Raises Interrupted when SIGINT or
    SIGTERM came and the workers, which got it as well, have saved and left (a second signal kills them), and
    ResourceError where a process cannot be started. Whatever it raises, no worker is left behind.
    """
    todo = [job for job in given if not runs.is_finished(job.folder, job.cfg)]
    for job in todo:
        durable.remove(job.folder / runs.FAILURE)  # of an earlier attempt
    chosen = executor(launcher.executor)
    usable = {setting: chosen.slots(setting, launcher.devices) for setting in {job.cfg.device for job in todo}}
    waiting, running = _cut(todo, launcher, usable), list[Handle]()
    with _on_signals() as signals:
        try:
            while running or (waiting and not signals.came):
                while not signals.came and (ready := _ready(waiting, running, usable)):
                    piece, slot = ready
                    waiting.remove(piece)
                    running.append(chosen.submit(piece, slot, sweep, folder))
                    _note(running, folder)
                _pause(running, signals)
                signals.pass_on(running)
                for ended in [c for c in running if c.ended() is not None]:
                    if not signals.came and (left := _left(ended, launcher.job_timeout)):
                        waiting.append(left)
                    running.remove(ended)
                    _note(running, folder)
                if launcher.job_timeout:
                    _kill_overdue(running, launcher.job_timeout)
                watch()
        finally:
            _end(running, signals)
            durable.remove(folder / RUNNING)
    if signals.came:
        raise Interrupted(signals.came[-1], f"stopped by {signal.Signals(signals.came[-1]).name}; "
                                            f"go on with: lora-ft sweep resume={shlex.quote(str(folder))}")  # fmt: skip


def _cut(todo: list[Job], launcher: config.Launcher, usable: Slots) -> list[list[Job]]:
    """Cut groups that share a base so that every device has a part of each."""
    pieces = []
    for group in jobs.grouped(todo, launcher.share_base):
        pieces += jobs.pieces(group, len(usable[group[0].cfg.device]))
    return pieces


def _ready(waiting: list[list[Job]], running: list[Handle], usable: Slots) -> tuple[list[Job], str] | None:
    """The first piece in line that has a free device, and that device."""
    busy = {c.slot for c in running}
    free = ((piece, name) for piece in waiting for name in usable[piece[0].cfg.device] if name not in busy)
    return next(free, None)


def _pause(running: list[Handle], signals: "_Signals") -> None:
    """Until a child has ended or a signal came, a quarter of a second at most."""
    until = time.monotonic() + _SECONDS_BETWEEN_WATCHES
    while time.monotonic() < until and not signals.new() and all(c.ended() is None for c in running):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _note(running: list[Handle], folder: Path) -> None:
    durable.write_json(folder / RUNNING, {str(c.number): [str(job.folder) for job in c.jobs] for c in running})


def _left(ended: Handle, timeout: float | None) -> list[Job]:
    """Write the failure of the job that a child died with; return its other jobs without outcome.

    Each call leaves fewer jobs: a child that brought none to an outcome fails its first.
    """
    left = [job for job in ended.jobs if not _has_outcome(job)]
    changed_base = ended.ended() == 75 and len(left) < len(ended.jobs)
    if left and not changed_base:
        folder = (ended.overdue or ended.beat()).folder
        dead = next((job for job in left if job.folder == folder), left[0])
        durable.make_folder(dead.folder)
        runs.write_failure(dead.folder, ended.death(dead, timeout))
        left.remove(dead)
    return [jobs.from_checkpoint(job) for job in left]


def _has_outcome(job: Job) -> bool:
    return (job.folder / runs.FAILURE).is_file() or runs.is_finished(job.folder, job.cfg)


def _kill_overdue(running: list[Handle], timeout: float) -> None:
    for late in running:
        if not late.overdue and late.seconds_since_beat() > timeout:
            late.kill_overdue()


def _end(running: list[Handle], signals: "_Signals") -> None:
    """End the children that are left, in peace if they can: the parent leaves because something failed in it."""
    for left in running:
        left.signal(signal.SIGTERM)
    _wait(running, lambda: len(signals.came) > 1)
    for left in running:
        left.kill()
    _wait(running, lambda: False)


def _wait(running: list[Handle], enough: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS_TO_LEAVE
    while any(c.ended() is None for c in running) and time.monotonic() < until and not enough():
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class _Signals:
    """SIGINT and SIGTERM as they came, and how many of them the children know of."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._passed = 0

    def hear(self, signum: int, _frame: types.FrameType | None) -> None:
        """The signals' handler: it may interrupt anything, such as the start of a child, and so only takes note."""
        self.came.append(signum)

    def new(self) -> bool:
        return len(self.came) > self._passed

    def pass_on(self, running: list[Handle]) -> None:
        """Give the children a first signal, and end them at a second."""
        for signum in self.came[self._passed :]:
            self._passed += 1
            for c in running:
                if self._passed == 1:
                    c.signal(signum)
                else:
                    c.kill()
            if self._passed == 1:
                with contextlib.suppress(OSError):  # Ctrl-C ends `| tee log` as well
                    sys.stderr.write(f"{signal.Signals(signum).name}: the step of each job, then a checkpoint; "
                                     "again to stop now\n")  # fmt: skip


@contextlib.contextmanager
def _on_signals() -> Iterator[_Signals]:
    """Note SIGINT and SIGTERM until the block ends; what the process was started to ignore stays ignored."""
    signals = _Signals()
    with handled_by(signals.hear):
        yield signals
