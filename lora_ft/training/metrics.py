"""Where a step's metrics go: metrics.jsonl always, TensorBoard's event files when asked; and peak memory.

{"step": 7, "loss": 2.31, "grad_norm": 0.84, "lr": 0.0002, "tokens": 1011, "tokens_per_second": 141.2, ...}
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lora_ft import config, durable, runs
from lora_ft.errors import ResourceError
from lora_ft.training.learner import Learner
from lora_ft.training.loop import Metrics, Observer


def observers(learner: Learner) -> list[Observer]:
    """The recipients of a learner's metrics, as its `track` settings say."""
    chosen: list[Observer] = [lambda who, metrics: runs.append_metrics(who.folder, metrics)]
    if learner.cfg.track.name is config.Tracker.tensorboard:
        write = event_file(learner.folder / "tensorboard", learner.step)
        chosen.append(lambda _, metrics: write(metrics))
    return chosen


def event_file(folder: Path, first_step: int = 0) -> Callable[[Metrics], None]:
    """Start an event file that `tensorboard --logdir` reads while it grows; returns the function that adds a step.

    A run resumed after `first_step` steps says so, and TensorBoard leaves out what earlier files hold of later ones.
    TensorBoard's own writer keeps its file open and buffered; records are appended here one step at a time.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        raise ResourceError("track=tensorboard needs TensorBoard: pip install 'lora_ft[tensorboard]'") from error
    durable.make_folder(folder)
    records = RecordWriter(_Appender(folder / f"events.out.tfevents.{time.time_ns()}.lora_ft"))
    records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    if first_step:
        start = SessionLog(status=SessionLog.START)
        records.write(Event(wall_time=time.time(), step=first_step + 1, session_log=start).SerializeToString())

    def write(metrics: Metrics) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if name != "step"]
        event = Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=scalars))
        records.write(event.SerializeToString())

    return write


class _Appender:
    """The file that TensorBoard's record framing writes to; each record is one append."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, data: bytes) -> None:
        durable.append_bytes(self._path, data)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU where there is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
