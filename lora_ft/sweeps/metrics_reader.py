"""Read the files of a sweep's jobs while they grow, each line once. No torch here.

metrics.jsonl   {"step": 7, "loss": 2.31, "tokens_per_second": 143.0, "eval_loss": 2.29}     one line a step
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.sweeps import scheduler
from lora_ft.sweeps.executors import local
from lora_ft.sweeps.executors.interface import Beat
from lora_ft.sweeps.jobs import Job

ENDS = ("finished", "stopped", "failed")
_MOST_BYTES = 2**18  # of one job's metrics at a time, so that the display of 50 long resumed jobs starts at once


@dataclass(frozen=True)
class View:
    """The state of one job now: waiting, loading, running, finished, stopped or failed. Losses in nats per token."""

    job: Job
    state: str
    step: int
    num_steps: int | None
    loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    tokens_per_second: float | None
    seconds: float | None  # of training, once there is a result
    reason: str  # of stopping or failing


class MetricsReader:
    """Read the files of one job as they grow."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._offset, self._step, self._last = 0, 0, dict[str, Any]()
        self._eval_loss: float | None = None
        self._best: float | None = None
        self._num_steps: int | None = None
        self._end: View | None = None
        result = job.folder / runs.RESULT  # left by an earlier, shorter run
        self._outdated = (
            result.stat().st_mtime_ns if result.is_file() and not runs.is_finished(job.folder, job.cfg) else 0
        )

    def view(self, beat: Beat | None) -> View:
        """Return the job's present state; `beat` is from the worker that runs it, None if none does."""
        if self._end:
            return self._end
        folder = self.job.folder
        self._read_on()
        running = bool(beat and beat.doing != "loading" and self._offset)
        if not running or self._num_steps is None:
            self._num_steps = _number(_mapping(_read(folder / runs.CHECK).get("steps")).get("count"), int)
        if result := _read(folder / runs.RESULT, self._outdated):
            reason = result.get("stopped_by")
            self._end = self._view("stopped" if reason else "finished", result, str(reason or ""))
            return self._end
        if failure := _read(folder / runs.FAILURE):
            return self._view("failed", {}, str(failure.get("message")))
        return self._view("running" if running else "loading" if beat else "waiting", {}, "")

    def _view(self, state: str, result: dict[str, Any], reason: str) -> View:
        found = self._last | {"eval_loss": self._eval_loss, "best_eval_loss": self._best} | result
        return View(
            job=self.job,
            state=state,
            step=_number(result.get("steps"), int) or self._step,
            num_steps=self._num_steps,
            loss=_number(found.get("loss")),
            eval_loss=_number(found["eval_loss"]),
            best_eval_loss=_number(found["best_eval_loss"]),
            tokens_per_second=_number(found.get("tokens_per_second")),
            seconds=_number(result.get("train_seconds")),
            reason=reason,
        )

    def _read_on(self) -> None:
        """Read the next lines; from the start if the file became shorter, as it does when a run is resumed."""
        try:
            with (self.job.folder / runs.METRICS).open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self._step, self._eval_loss, self._best = 0, 0, None, None
                file.seek(self._offset)
                data = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        for line in lines:
            if line is not lines[-1] and b'"eval_loss"' not in line:
                continue  # parsing it would only take time
            metrics = _object(line)
            self._last = metrics or self._last
            self._step = _number(metrics.get("step"), int) or self._step
            if (eval_loss := _number(metrics.get("eval_loss"))) is not None:
                self._eval_loss = eval_loss
                self._best = eval_loss if self._best is None else min(self._best, eval_loss)


def beats(folder: Path) -> dict[Path, Beat]:
    """Return the heartbeats of the workers of a sweep by the folder of the job that each runs now."""
    found = (local.beat(folder / local.FOLDER / f"{number}.json") for number in _read(folder / scheduler.RUNNING))
    return {beat.folder: beat for beat in found if beat.folder}


def _read(path: Path, outdated: int = 0) -> dict[str, Any]:
    """Read a JSON file of one of our processes; {} if it does not exist or is outdated."""
    try:
        return {} if path.stat().st_mtime_ns == outdated else _object(path.read_bytes())
    except FileNotFoundError:
        return {}


def _object(data: bytes) -> dict[str, Any]:
    try:
        return _mapping(json.loads(data))
    except ValueError:  # a killed process left half a line
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any, kind: type = float) -> Any:
    """Return the value as this kind of number; None if it is not a number that a float can hold."""
    return kind(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None
