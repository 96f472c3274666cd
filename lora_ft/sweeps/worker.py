"""The child process of a sweep: trains the jobs it is told of over one base, each to its outcome.

    stdin, one line    {"jobs": [{"number": 3, "folder": ..., "cfg": {...}, "words": [...]}, ...],
                        "heartbeat": FILE, "sweep": {"halving": false, ...}}
    heartbeat          {"folder": ".../3", "turn": 17, "doing": "step"}     whose turn it is, since the file's time
    exit code          0: every job has its result.json or failure.json, or was left out as memory did not allow it;
                       AGAIN: the jobs without are to be run again, as one that failed may have left its traces

stdin stays open as long as the parent lives. Its end is what SIGTERM is: the step is finished, all is saved.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from lora_ft import config, runs
from lora_ft.errors import Interrupted, out_of_memory
from lora_ft.io import durable, process, redact
from lora_ft.sweeps import jobs
from lora_ft.sweeps.jobs import Job
from lora_ft.train import BaseTouched, train_each
from lora_ft.training.halving import Halving
from lora_ft.training.progress import displayed
from lora_ft.training.signals import Stop, on_signals
from lora_ft.training.state import Learner
from lora_ft.training.trainer import Metrics

AGAIN = 75  # EX_TEMPFAIL of sysexits.h

log = logging.getLogger("lora_ft")


class Heartbeat:
    """Follows a training: whose turn it is goes into one file, steps into the log."""

    def __init__(self, path: Path) -> None:
        self._path, self._turns = path, 0

    def __call__(self, learner: Learner, metrics: Metrics) -> None:
        log.debug("%s step %d of %d %s", learner.folder.name, metrics["step"], len(learner.steps), metrics)

    def turn(self, folder: Path | None, doing: str) -> None:
        self._turns += 1
        durable.beat(
            self._path, json.dumps({"folder": str(folder) if folder else None, "turn": self._turns, "doing": doing})
        )

    def end(self) -> None:
        """What follows is a turn of its own."""


def main() -> int:
    process.prepare()
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    group = [jobs.from_plain(job) for job in told["jobs"]]
    sweep = config.Sweep(**told["sweep"])
    halving = Halving(sweep.eta, sweep.min_steps) if sweep.halving and len(group) > 1 else None
    try:
        with _opened(group), displayed([job.folder for job in group]), on_signals() as stop:
            _run(group, Heartbeat(Path(told["heartbeat"])), stop, halving)
    except BaseTouched:
        return AGAIN
    except Interrupted as error:
        log.info(str(error))
        return error.exit_code
    return 0


def _stop_without_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _opened(group: list[Job]) -> Iterator[None]:
    """The jobs' folders locked, and each run begun or reopened."""
    with contextlib.ExitStack() as stack:
        for job in group:
            stack.enter_context(runs.locked(job.folder))
            runs.begin(job.folder, job.cfg, job.words)
        yield


def _run(group: list[Job], heartbeat: Heartbeat, stop: Stop, halving: Halving | None) -> None:
    """Train; what fails for one job, or for all that have no outcome yet, is kept in their folders."""
    left = {number: job for number, job in enumerate(group)}
    outcomes = train_each([job.cfg for job in group], [job.folder for job in group], heartbeat, stop, halving)
    try:
        for number, outcome in outcomes:
            job = left.pop(number)
            if isinstance(outcome, Exception):
                _fail(job, outcome)
    except BaseTouched:
        raise
    except Exception as error:
        for job in left.values():
            _fail(job, error)


def _fail(job: Job, error: Exception) -> None:
    log.error("job %d failed: %s", job.number, error)
    runs.write_failure(job.folder, out_of_memory("train", error) or error)


if __name__ == "__main__":
    with redact.shown():
        code = main()
    sys.exit(code)
