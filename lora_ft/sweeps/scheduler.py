"""Schedule the jobs of a sweep: deal groups to workers, watch the workers, rerun what a dead worker left. No torch.

    jobs -grouped-> [0 1 2 3 4 5] [6]  -cut for two GPUs->  [0 2 4] [1 3 5] [6]  -> one worker at a time on each

A job ends with result.json or failure.json in its folder, which its worker writes. If a worker dies, its running job
fails and its other jobs continue in a new worker.
"""

import contextlib
import functools
import os
import shlex
import signal
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted
from lora_ft.io import durable
from lora_ft.sweeps import jobs
from lora_ft.sweeps.executors import executor
from lora_ft.sweeps.executors.interface import BASE_CHANGED, Handle
from lora_ft.sweeps.jobs import Job
from lora_ft.training.signals import handled_by, stops_at_once

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_EXIT = 10.0  # for workers, after an error in this process
_STDERR = 2

Slots = dict[str, list[str]]
Watch = Callable[[Sequence[Handle]], None]


def run(given: list[Job], launcher: config.Launcher, sweep: config.Sweep, folder: Path, watch: Watch) -> None:
    """Bring each job to an outcome.

    `watch` is called with the running workers, many times a second. Raises Interrupted after a signal that stops a run,
    once the workers have saved and exited (a second SIGINT or SIGTERM kills them), and ResourceError if a worker cannot
    be started. No worker is left running, whatever is raised.
    """
    for job in given:
        durable.remove(job.folder / runs.FAILURE)  # of an earlier attempt
    slots = _slots(given, launcher)
    waiting, running, signals = groups(given, launcher), list[Handle](), list[int]()
    with handled_by(functools.partial(_note, signals)):
        try:
            while running or (waiting and not signals):
                while not signals and (ready := _ready(waiting, running, slots)):
                    group, slot = ready
                    waiting.remove(group)
                    running.append(executor(launcher.executor).submit(group, slot, launcher, sweep, folder))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                if signals:
                    _stop(running, kill=stops_at_once(signals))
                for ended in [handle for handle in running if handle.ended() is not None]:
                    running.remove(ended)
                    if not signals and (left := _left(ended)):
                        waiting.append(left)
                watch(running)
        finally:
            until = time.monotonic() + _SECONDS_TO_EXIT
            while any(handle.ended() is None for handle in running):  # something failed in this process
                _stop(running, kill=stops_at_once(signals) or time.monotonic() > until)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    if signals:
        name = signal.Signals(signals[-1]).name
        raise Interrupted(
            signals[-1], f"stopped by {name}; continue with: lora-ft sweep resume={shlex.quote(str(folder))}"
        )


def groups(given: list[Job], launcher: config.Launcher) -> list[list[Job]]:
    """Return the jobs that each worker gets: those that share a base, dealt to all devices that can run them."""
    slots, dealt = _slots(given, launcher), []
    for group in jobs.grouped(given, launcher.share_base):
        count = len(slots[group[0].cfg.device])
        dealt += [group[i::count] for i in range(min(count, len(group)))]
    return dealt


def _slots(given: list[Job], launcher: config.Launcher) -> Slots:
    chosen = executor(launcher.executor)
    return {device: chosen.slots(device, launcher.devices) for device in {job.cfg.device for job in given}}


def _ready(waiting: list[list[Job]], running: list[Handle], slots: Slots) -> tuple[list[Job], str] | None:
    """Return the first waiting group that has a free slot, and that slot."""
    busy = {handle.slot for handle in running}
    free = ((group, slot) for group in waiting for slot in slots[group[0].cfg.device] if slot not in busy)
    return next(free, None)


def _left(ended: Handle) -> list[Job]:
    """Return the jobs that a worker left without an outcome, except the one that it died with, which fails.

    There are fewer after each call: a worker that brought no job to an outcome fails its first.
    """
    left = [job for job in ended.jobs if not _has_outcome(job)]
    base_changed = ended.ended() == BASE_CHANGED and len(left) < len(ended.jobs)
    if left and not base_changed:
        folder = ended.beat().folder
        dead = next((job for job in left if job.folder == folder), left[0])
        durable.make_folder(dead.folder)
        runs.write_failure(dead.folder, ended.death(dead))
        left.remove(dead)
    return [jobs.from_checkpoint(job) for job in left]


def _has_outcome(job: Job) -> bool:
    return (job.folder / runs.FAILURE).is_file() or runs.is_finished(job.folder, job.cfg)


def _stop(running: list[Handle], kill: bool) -> None:
    for handle in running:
        if kill:
            handle.kill()
        else:
            handle.stop()


def _note(signals: list[int], signum: int, _frame: types.FrameType | None) -> None:
    """Handle a signal: it may interrupt anything, such as the start of a worker, so it is only noted here."""
    signals.append(signum)
    if len(signals) == 1:
        name = signal.Signals(signum).name
        text = f"\n{name}: each job finishes its step and saves a checkpoint; SIGINT or SIGTERM twice stops now\n"
        with contextlib.suppress(OSError):  # Ctrl-C ends `| tee log` as well
            os.write(_STDERR, text.encode())
