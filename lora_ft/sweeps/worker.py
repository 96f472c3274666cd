"""The worker process of a sweep: trains its jobs one after the other on one loaded base, each to its outcome.

    argument           {"jobs": [{"number": 3, "folder": ..., "cfg": {...}, "overrides": [...]}, ...],
    (a JSON file)       "heartbeat": FILE, "sweep": {"halving": false, ...}, "watch_stdin": true}
    heartbeat          {"folder": ".../3", "beat": 17, "doing": "step", "host": "node4"}: the running job, as of the
                       file's time
    exit code          0: every job has its result.json or failure.json
                       BASE_CHANGED: a failed job changed the base; the jobs without an outcome need a new process

With watch_stdin, stdin stays open while the parent wants the jobs to run. Its end acts as SIGTERM: the step is
finished, the state saved.

A cluster starts a worker again that it has preempted, with the same order: the jobs that have an outcome are skipped,
and the others continue from their checkpoints.
"""

import gc
import json
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted, out_of_memory
from lora_ft.io import durable, process, redact
from lora_ft.metric_table import LOSS
from lora_ft.models.fingerprint import fingerprint
from lora_ft.sweeps import jobs
from lora_ft.sweeps.executors.interface import BASE_CHANGED
from lora_ft.sweeps.halving import Halving
from lora_ft.sweeps.jobs import Job
from lora_ft.train import train_job
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.deterministic import fix_workspace
from lora_ft.training.progress import displayed
from lora_ft.training.shared import Shared, prepare
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

_SECONDS_TO_UNLOCK = 120.0  # NFS 4 releases the locks of a dead machine after 90 s


class Heartbeat(Callback):
    """Writes the running job and its phase into one file, so that the parent sees a job that hangs."""

    def __init__(self, path: Path) -> None:
        self._path, self._beats = path, 0

    def beat(self, folder: Path, doing: str) -> None:
        self._beats += 1
        record = {"folder": str(folder), "beat": self._beats, "doing": doing, "host": platform.node()}
        durable.beat(self._path, json.dumps(record))

    def on_start(self, state: TrainingState) -> None:
        self.beat(state.folder, "end" if state.is_done else "step")

    def on_step(self, state: TrainingState, metrics: Metrics) -> None:
        self.beat(state.folder, "end" if state.is_done else "step")


class StopAtStart(Callback):
    """Ends a run at its checkpoint, without a further step."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def on_start(self, state: TrainingState) -> None:
        state.request_stop(self._reason)


def main() -> int:
    process.prepare()
    order = json.loads(Path(sys.argv[1]).read_bytes())
    if order["watch_stdin"]:
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()
    group, heartbeat = [jobs.from_plain(job) for job in order["jobs"]], Path(order["heartbeat"])
    if heartbeat.exists():  # started before
        group = [jobs.from_checkpoint(job) for job in group if not jobs.has_outcome(job)]
    sweep = config.Sweep(**order["sweep"])
    halving = Halving(sweep.eta, sweep.min_steps) if sweep.halving and len(group) > 1 else None
    if any(job.cfg.train.deterministic for job in group):
        fix_workspace()  # before the first job, which may be another one, starts CUDA
    with on_signals() as stop:
        worker = Worker(Heartbeat(heartbeat), stop)
        try:
            return worker.run_with_halving(group, halving) if halving else worker.run(group)
        except Interrupted as error:
            log.info(str(error))
            return error.exit_code


def _stop_at_end_of_stdin() -> None:
    os.read(0, 1)  # nothing is ever written to it
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
                return BASE_CHANGED
        return 0

    def run_with_halving(self, group: list[Job], halving: Halving) -> int:
        """Train the jobs from rung to rung, and stop those with the worse values of their metric at each."""
        active = list(group)
        metrics = {job.cfg.train.best_metric for job in group}
        metric = metrics.pop() if len(metrics) == 1 else LOSS
        for rung in halving.rungs():
            for job in list(active):  # each pause at a rung saves a checkpoint
                if jobs.last_checkpoint(job) < rung and self._train(job, until=rung):
                    active.remove(job)
                if self._base_has_changed:
                    return BASE_CHANGED
            at_rung = {job.number: value for job in active if (value := _value_at(job, rung, metric)) is not None}
            stopped = halving.stopped(rung, at_rung, num_beyond=len(active) - len(at_rung), metric=metric)
            # Mark the survivors before any job is stopped: a sweep resumed in between must not choose among them again.
            for job in active:
                if job.number in at_rung and job.number not in stopped:
                    durable.write_json(job.folder / runs.HALVING, {"passed": rung})
            for job in list(active):
                if job.number in stopped:
                    self._train(job, callbacks=[StopAtStart(stopped[job.number])])
                    active.remove(job)
                if self._base_has_changed:
                    return BASE_CHANGED
            if not active:
                return 0
        raise AssertionError("rungs() is infinite")

    def _train(self, job: Job, until: int | None = None, callbacks: Sequence[Callback] = ()) -> bool:
        """Train a job for `until` steps or to its end; return True if it has ended, with a result or a failure."""
        self._heartbeat.beat(job.folder, "loading")
        with displayed(job.folder) as progress:
            try:
                # The process that had a resumed job before may still be saving, or dying on another machine.
                with runs.locked(job.folder, wait_seconds=_SECONDS_TO_UNLOCK if job.cfg.resume else 0):
                    if job.number not in self._begun:
                        runs.begin(job.folder, job.cfg, job.overrides)
                        self._begun.add(job.number)
                    self._shared = self._shared or prepare(job.cfg)
                    callbacks = [self._heartbeat, progress, *callbacks]
                    return train_job(job.cfg, job.folder, self._shared, callbacks, self._stop, until) is not None
            except Exception as error:
                # As text: a handler that keeps its records would keep the exception.
                log.error("job %d failed: %s", job.number, str(error))
                runs.write_failure(job.folder, out_of_memory("train", error) or error)
            # After the handler: while it runs, the exception holds the frames it passed through, and their tensors.
            gc.collect()
            if self._shared and (loaded := self._shared.base):
                self._base_has_changed |= fingerprint(loaded.base.model) != loaded.fingerprint
        return True


def _value_at(job: Job, rung: int, metric: str) -> float | None:
    """Return the metric of a job paused at a rung; None if it passed the rung or was not evaluated there."""
    if jobs.last_checkpoint(job) != rung or _passed(job) >= rung:
        return None
    return next((row.get(f"eval_{metric}") for row in runs.read_metrics(job.folder) if row["step"] == rung), None)


def _passed(job: Job) -> int:
    """Return the last rung that a job survived, 0 before the first."""
    path = job.folder / runs.HALVING
    return int(json.loads(path.read_bytes())["passed"]) if path.is_file() else 0


if __name__ == "__main__":
    with redact.shown():
        code = main()
    sys.exit(code)
