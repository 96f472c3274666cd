"""Schedule the jobs of a sweep: deal groups to workers, watch the workers, rerun what a dead worker left. No torch.

    jobs -grouped-> [0 1 2 3 4 5] [6]  -cut for two GPUs->  [0 2 4] [1 3 5] [6]  -> one worker at a time on each

A job ends with result.json or failure.json in its folder, which its worker writes. If a worker dies, its running job
fails and its other jobs continue in a new worker. If its machine is lost, the running job continues as well, unless
that happened `hydra.launcher.retries` times since its last checkpoint.
"""

import contextlib
import functools
import math
import os
import shlex
import signal
import time
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted
from lora_ft.io import durable
from lora_ft.sweeps import jobs
from lora_ft.sweeps.executors import EXECUTORS, executor
from lora_ft.sweeps.executors.interface import BASE_CHANGED, Handle
from lora_ft.sweeps.jobs import Job
from lora_ft.training.signals import handled_by, stops_at_once

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_EXIT = 10.0  # for workers, after an error in this process
_STDERR = 2

Slots = dict[str, list[str]]
Watch = Callable[[Sequence[Handle]], None]
Losses = Counter[tuple[int, int]]  # of machines, by the number of the job and the steps of its last checkpoint


def run(given: list[Job], launcher: config.Launcher, sweep: config.Sweep, folder: Path, watch: Watch) -> None:
    """Bring each job to an outcome. Workers of an earlier command that still run keep their jobs.

    `watch` is called with the running workers, many times a second. Raises Interrupted after a signal that stops a run,
    once the workers have saved and exited (a second SIGINT or SIGTERM kills them), and ResourceError if a worker cannot
    be started. No worker is left running, whatever is raised.
    """
    running = [handle for each in EXECUTORS.values() for handle in each.adopt(folder, launcher)]
    adopted = {job.number for handle in running for job in handle.jobs}
    given = [job for job in given if job.number not in adopted]
    for job in given:
        durable.remove(job.folder / runs.FAILURE)  # of an earlier attempt
    slots = _slots([*given, *(job for handle in running for job in handle.jobs)], launcher)
    waiting, signals, losses = groups(given, launcher), list[int](), Losses()
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
                    if not signals and (left := _left(ended, losses, launcher.retries)):
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
    """Return the jobs that each worker gets: those that share a base, cut into their share of the slots."""
    slots, dealt = _slots(given, launcher), []
    num_jobs = Counter(job.cfg.device for job in given)
    for group in jobs.grouped(given, launcher.share_base):
        device = group[0].cfg.device
        share = math.ceil(len(slots[device]) * len(group) / num_jobs[device])  # of the slots
        dealt += [group[i::share] for i in range(min(share, len(group)))]
    return dealt


def _slots(given: list[Job], launcher: config.Launcher) -> Slots:
    chosen = executor(launcher.executor)
    return {device: chosen.slots(device, launcher) for device in {job.cfg.device for job in given}}


def _ready(waiting: list[list[Job]], running: list[Handle], slots: Slots) -> tuple[list[Job], str] | None:
    """Return the first waiting group that has a free slot, and that slot."""
    busy = {handle.slot for handle in running}
    free = ((group, slot) for group in waiting for slot in slots[group[0].cfg.device] if slot not in busy)
    return next(free, None)


def _left(ended: Handle, losses: Losses, retries: int) -> list[Job]:
    """Return the jobs that a worker left without an outcome, except the one that it died with, which fails.

    There are fewer after each call, since a worker that brought no job to an outcome fails its first; or a job has a
    new checkpoint, or one of its retries is used.
    """
    left = [job for job in ended.jobs if not jobs.has_outcome(job)]
    base_changed = ended.ended() == BASE_CHANGED and len(left) < len(ended.jobs)
    if left and not base_changed:
        folder = ended.beat().folder
        dead = next((job for job in left if job.folder == folder), left[0])
        place, is_lost = (dead.number, jobs.last_checkpoint(dead)), ended.lost()
        losses[place] += is_lost
        if not is_lost or losses[place] > retries:
            durable.make_folder(dead.folder)
            runs.write_failure(dead.folder, ended.death(dead))
            left.remove(dead)
    return [jobs.from_checkpoint(job) for job in left]


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
