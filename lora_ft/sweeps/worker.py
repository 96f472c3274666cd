"""The worker process of a sweep: trains its jobs one after the other on one loaded base, each to its outcome.

    stdin, one line    {"jobs": [{"number": 3, "folder": ..., "cfg": {...}, "overrides": [...]}, ...],
                        "heartbeat": FILE, "sweep": {"halving": false, ...}}
    heartbeat          {"folder": ".../3", "beat": 17, "doing": "step"}     the running job, since the file's time
    exit code          0: every job has its result.json or failure.json
                       AGAIN: a failed job changed the base; the jobs without outcome need a new process

stdin stays open as long as the parent lives. Its end is what SIGTERM is: the step is finished, the state is saved.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted, out_of_memory
from lora_ft.io import durable, process, redact
from lora_ft.models.fingerprint import fingerprint
from lora_ft.sweeps import jobs
from lora_ft.sweeps.halving import Halving
from lora_ft.sweeps.jobs import Job
from lora_ft.train import train_job
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.progress import displayed
from lora_ft.training.shared import Shared, prepare
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import TrainingState

AGAIN = 75  # EX_TEMPFAIL of sysexits.h

log = logging.getLogger("lora_ft")


class Heartbeat(Callback):
    """Writes which job is running, and what it does, into one file; the parent sees a job that hangs by it."""

    def __init__(self, path: Path) -> None:
        self._path, self._beats = path, 0

    def beat(self, folder: Path, doing: str) -> None:
        self._beats += 1
        durable.beat(self._path, json.dumps({"folder": str(folder), "beat": self._beats, "doing": doing}))

    def on_start(self, state: TrainingState) -> None:
        self.beat(state.folder, "end" if state.is_done else "step")

    def on_step(self, state: TrainingState, metrics: Metrics) -> None:
        self.beat(state.folder, "end" if state.is_done else "step")


class StopAtStart(Callback):
    """Ends a run that fell behind where its checkpoint stands."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def on_start(self, state: TrainingState) -> None:
        state.request_stop(self._reason)


def main() -> int:
    process.prepare()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    group = [jobs.from_plain(job) for job in order["jobs"]]
    sweep = config.Sweep(**order["sweep"])
    halving = Halving(sweep.eta, sweep.min_steps) if sweep.halving and len(group) > 1 else None
    with contextlib.ExitStack() as locks, on_signals() as stop:
        for job in group:
            locks.enter_context(runs.locked(job.folder))
        try:
            worker = Worker(Heartbeat(Path(order["heartbeat"])), stop)
            return worker.run_with_halving(group, halving) if halving else worker.run(group)
        except Interrupted as error:
            log.info(str(error))
            return error.exit_code


def _stop_without_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


class Worker:
    """Trains jobs in turn on one base, which is loaded with the first of them."""

    def __init__(self, heartbeat: Heartbeat, stop: Stop) -> None:
        self._heartbeat, self._stop = heartbeat, stop
        self._shared: Shared | None = None
        self._begun: set[int] = set()
        self._base_has_changed = False

    def run(self, group: list[Job]) -> int:
        """Train each job to its outcome; return the exit code of the process."""
        for job in group:
            self._train(job)
            if self._base_has_changed:
                return AGAIN
        return 0

    def run_with_halving(self, group: list[Job], halving: Halving) -> int:
        """Train the jobs from rung to rung, and stop those that fall behind."""
        active = list(group)
        for rung in halving.rungs():
            for job in list(active):
                if _steps(job) < rung and self._train(job, until=rung):
                    active.remove(job)
                if self._base_has_changed:
                    return AGAIN
            at_rung = {job.number: loss for job in active if (loss := _loss_at(job, rung)) is not None}
            stopped = halving.stopped(rung, at_rung, len(active) - len(at_rung))
            # First those that go on: a sweep that is resumed in between must not choose among them again.
            for job in active:
                if job.number in at_rung and job.number not in stopped:
                    durable.write_json(job.folder / runs.HALVING, {"passed": rung})
            for job in list(active):
                if job.number in stopped:
                    self._train(job, callbacks=[StopAtStart(stopped[job.number])])
                    active.remove(job)
                if self._base_has_changed:
                    return AGAIN
            if not active:
                return 0
        raise AssertionError("rungs have no end")

    def _train(self, job: Job, until: int | None = None, callbacks: Sequence[Callback] = ()) -> bool:
        """Train a job until `until` steps or its end; return True if it has an outcome, good or bad."""
        self._heartbeat.beat(job.folder, "loading")
        with displayed(job.folder) as progress:
            try:
                if job.number not in self._begun:
                    runs.begin(job.folder, job.cfg, job.overrides)
                    self._begun.add(job.number)
                self._shared = self._shared or prepare(job.cfg)
                told = [self._heartbeat, progress, *callbacks]
                return train_job(job.cfg, job.folder, self._shared, told, self._stop, until) is not None
            except Exception as error:
                log.error("job %d failed: %s", job.number, error)
                runs.write_failure(job.folder, out_of_memory("train", error) or error)
            # Behind the handler: a handled exception holds the frames it came through, and their tensors.
            gc.collect()
            if self._shared and (loaded := self._shared.base):
                self._base_has_changed |= fingerprint(loaded.base.model) != loaded.fingerprint
        return True


def _steps(job: Job) -> int:
    """Return the steps of a job's newest checkpoint, which every pause at a rung leaves; 0 if it has none."""
    found = (job.folder / runs.CHECKPOINTS).glob("step-[0-9]*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def _loss_at(job: Job, rung: int) -> float | None:
    """Return the eval loss of a job that waits at a rung; None if it has passed it, or was not evaluated there."""
    if _steps(job) != rung or _passed(job) >= rung:
        return None
    return next((row.get("eval_loss") for row in runs.read_metrics(job.folder) if row["step"] == rung), None)


def _passed(job: Job) -> int:
    """Return the last rung from which a job was chosen to go on, 0 if there is none."""
    path = job.folder / runs.HALVING
    return int(json.loads(path.read_bytes())["passed"]) if path.is_file() else 0


if __name__ == "__main__":
    with redact.shown():
        code = main()
    sys.exit(code)
