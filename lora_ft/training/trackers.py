"""Trackers: TensorBoard, Weights & Biases or MLflow show a copy of metrics.jsonl while it grows.

    with tracked(learners) as track:
        track(learner, {"step": 7, "loss": 2.31, ...})    # a line of metrics.jsonl, and what the tracker lacks of it
        track.ended(learner, result)                      # or what it failed of

    metrics.jsonl --+-- tensorboard/     event files
                    +-- wandb/           what `wandb sync` reads, with WANDB_MODE=offline
                    +-- mlflow/          MLflow's file store, where MLFLOW_TRACKING_URI names no other

No result depends on a tracker. One that is out of reach costs a warning; what it has missed is sent when the run is
resumed, to MLflow at the end as well: tracker.json in the run's folder holds the id that finds it again. wandb sends
what its server misses while the run goes on by itself.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.config import Tracker
from lora_ft.errors import ConfigError, LoraFtError, ResourceError
from lora_ft.io import durable, untrusted
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.finish import Result
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

ID = "tracker.json"
_MLFLOW_SECONDS = 1.0  # each batch is a request that training waits for

# Of the tools' own switches, those that say more about a machine than a run does, or send reports of the tool's use.
_UNLESS_SET = {
    Tracker.wandb: {"WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"},
    Tracker.mlflow: {"MLFLOW_DISABLE_TELEMETRY": "true"},
}

Outcome = Result | BaseException


@dataclass(frozen=True)
class Remote:
    """A run in a tracker: the last step it holds, and how it is sent a row of metrics, and its end."""

    last_step: int
    write: Callable[[Metrics], None]
    end: Callable[[Outcome], None]


class TrackerCallback(Callback):
    """Sends the metrics of a run to its tracker."""

    def __init__(self) -> None:
        self._track: _Track | None = None

    def on_start(self, state: TrainingState) -> None:
        self._track = _Track(state)

    def on_step(self, state: TrainingState, metrics: Metrics) -> None:
        assert self._track
        self._track.follow(metrics)

    def on_evaluate(self, state: TrainingState, metrics: Metrics) -> None:
        if metrics["step"] == 0:
            self.on_step(state, metrics)

    def on_end(self, state: TrainingState, outcome: Outcome) -> None:
        if self._track:
            self._track.end(outcome)
        if state.cfg.track.name is Tracker.wandb:
            _end_wandb_service()


def callbacks(track: config.Track) -> list[Callback]:
    """Return the callback that sends metrics to the tracker; raises what `check` raises."""
    check(track)
    return [] if track.name is Tracker.none else [TrackerCallback()]


def check(track: config.Track) -> None:
    """Refuse a tracker that cannot work: ResourceError for a package or an account that is not there."""
    for name, value in _UNLESS_SET.get(track.name, {}).items():
        os.environ.setdefault(name, value)
    try:
        match track.name:
            case Tracker.tensorboard:
                import tensorboard  # noqa: F401
            case Tracker.wandb:
                import wandb

                if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
                    raise ResourceError("track=wandb has no account: set WANDB_API_KEY, or WANDB_MODE=offline")
            case Tracker.mlflow:
                import mlflow  # noqa: F401
    except ImportError as error:
        raise ResourceError(f"track={track.name.value} needs it: pip install 'lora_ft[{track.name.value}]'") from error


class _Track:
    """One learner's run in its tracker, opened with the first metrics; a start that fails before them leaves none."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._open = _OPEN.get(state.cfg.track.name)
        self._remote: Remote | None = None
        self._first: int | None = None
        self._is_lost = False

    def follow(self, metrics: Metrics) -> None:
        if self._open is None:
            return
        if self._first is None:
            self._first = metrics["step"]
        if not self._is_lost:
            with self._warned():
                self._send([metrics])

    def end(self, outcome: Outcome) -> None:
        # wandb's service keeps the id of a run that it failed to begin, and lets none begin under it again.
        lost_for_good = self._is_lost and self._state.cfg.track.name is Tracker.wandb
        if self._first is not None and not lost_for_good:
            with self._warned():
                self._send([])
                assert self._remote
                self._remote.end(outcome)

    def _send(self, rows: list[Metrics]) -> None:
        if self._remote is None:
            assert self._open and self._first is not None
            self._remote = self._open(self._state, self._first)
            rows = runs.read_metrics(self._state.folder)
        for row in rows:
            # A step that was taken again after a resume is there with the same loss.
            if row["step"] > self._remote.last_step:
                self._remote.write(row)

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except LoraFtError:
            raise
        except Exception as error:  # of a client whose failures are its own, and no reason to lose a run
            self._remote, self._is_lost = None, True
            name = self._state.cfg.track.name.value
            log.warning("track=%s failed; %s has all: %s: %s", name, runs.METRICS, type(error).__name__, error)


def _tensorboard(state: TrainingState, first_step: int) -> Remote:
    write = event_file(state.folder / "tensorboard", max(0, first_step - 1))
    return Remote(first_step - 1, write, lambda _: None)


def event_file(folder: Path, first_step: int = 0) -> Callable[[Metrics], None]:
    """Start an event file that `tensorboard --logdir` reads while it grows; returns the function that adds a step.

    A run resumed after `first_step` steps says so, and TensorBoard leaves out what earlier files hold of later ones.
    TensorBoard's own writer keeps its file open and buffered; records are appended here one step at a time.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    durable.make_folder(folder)
    records = RecordWriter(_Appender(folder / f"events.out.tfevents.{time.time_ns()}.lora_ft"))
    records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    if first_step:
        start = SessionLog(status=SessionLog.START)
        records.write(Event(wall_time=time.time(), step=first_step + 1, session_log=start).SerializeToString())

    def write(metrics: Metrics) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in _values(metrics).items()]
        event = Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=scalars))
        records.write(event.SerializeToString())

    return write


class _Appender:
    """The file that TensorBoard's record framing writes to; each record is one append."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, data: bytes) -> None:
        durable.append_bytes(self._path, data)


def _wandb(state: TrainingState, _first_step: int) -> Remote:
    import wandb

    group, name = _place(state.folder)
    # wandb's hooks would print a crash's traceback beside ours, with the secrets that ours leaves out.
    hooks = sys.exit, sys.excepthook
    try:
        run = wandb.init(
            project=state.cfg.track.project, group=group, name=name, id=_id(state.folder), resume="allow",
            dir=str(state.folder), config=validation.to_plain(state.cfg), reinit="create_new",
            settings=wandb.Settings(console="off", symlink=False),
        )  # fmt: skip
    finally:
        sys.exit, sys.excepthook = hooks

    def end(outcome: Outcome) -> None:
        if isinstance(outcome, Result):
            run.summary.update(_summary(outcome))
        run.finish(exit_code=0 if isinstance(outcome, Result) else getattr(outcome, "exit_code", 1))

    # Offline it starts at 0 whatever was kept: so each folder that `wandb sync` reads holds the run from its start.
    return Remote(run.starting_step - 1, lambda row: run.log(_values(row), step=row["step"]), end)


def _end_wandb_service() -> None:
    """End the process that wandb started beside this one, once all runs in it have ended."""
    import wandb

    try:
        wandb.teardown()
    except (Exception, SystemExit) as error:  # it exits this process where the other one failed
        log.warning("track=wandb: its service did not end well: %s: %s", type(error).__name__, error)


def _mlflow(state: TrainingState, _first_step: int) -> Remote:
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (state.folder.resolve() / "mlflow").as_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment, key = _experiment(client, state.cfg.track.project), _id(state.folder)
    if found := client.search_runs([experiment], f"tags.`lora_ft.id` = '{key}'", max_results=1):
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        group, name = _place(state.folder)
        tags = {"lora_ft.id": key} | ({"group": group} if group else {})
        run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        settings = [Param(name, value) for name, value in _flat(validation.to_plain(state.cfg)).items()]
        for start in range(0, len(settings), 100):  # the most that a server takes at a time
            client.log_batch(run_id, params=settings[start : start + 100])
    held = [m.step for name in ("loss", "heldout_loss") for m in client.get_metric_history(run_id, name)]
    unsent: list[Metric] = []
    sent_at = 0.0

    def send() -> None:
        nonlocal sent_at
        for start in range(0, len(unsent), 1000):
            client.log_batch(run_id, metrics=unsent[start : start + 1000])
        unsent.clear()
        sent_at = time.monotonic()

    def write(row: Metrics) -> None:
        now = int(time.time() * 1000)
        unsent.extend(Metric(name, value, now, row["step"]) for name, value in _values(row).items())
        if time.monotonic() - sent_at >= _MLFLOW_SECONDS:
            send()

    def end(outcome: Outcome) -> None:
        if isinstance(outcome, Result):
            summary, now = _summary(outcome), int(time.time() * 1000)
            texts = {name: value for name, value in summary.items() if isinstance(value, str)}
            unsent.extend(Metric(n, float(v), now, outcome.steps) for n, v in summary.items() if n not in texts)
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in texts.items()])
        send()
        failed = "FAILED" if isinstance(outcome, Exception) else "KILLED"
        client.set_terminated(run_id, "FINISHED" if isinstance(outcome, Result) else failed)

    return Remote(max(held, default=-1), write, end)


def _experiment(client: Any, name: str) -> str:
    """The id of MLflow's experiment of this name, made where there is none; another run may make it first."""
    import mlflow

    try:
        return str(client.create_experiment(name))
    except mlflow.MlflowException:
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


_OPEN = {Tracker.tensorboard: _tensorboard, Tracker.wandb: _wandb, Tracker.mlflow: _mlflow}


def _values(row: Metrics) -> Metrics:
    return {name: value for name, value in row.items() if name != "step"}


def _summary(result: Result) -> dict[str, Any]:
    return {f"result/{name}": value for name, value in asdict(result).items() if value is not None}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted key, as text; a mapping of layers stays one value."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and not prefix:
            flat |= _flat(value, f"{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _place(folder: Path) -> tuple[str | None, str]:
    """The name of the sweep that a run belongs to, None where to none, and the run's own name."""
    folder = folder.resolve()
    for above in folder.parents:
        if (above / runs.SWEEP).is_file():
            return above.name, folder.relative_to(above).as_posix()
    return None, folder.name


def _id(folder: Path) -> str:
    """The id of a run in every tracker: of its folder's path and the time it was begun, then what tracker.json says."""
    path = folder / ID
    untrusted.check_place(path, folder)
    if path.is_file():
        kept = untrusted.json_object(path, ConfigError).get("id")
        if not (isinstance(kept, str) and kept.isalnum()):
            raise ConfigError(f"{path} must hold the id of the run in its tracker")
        return kept
    begun = f"{folder.resolve()} {time.time_ns()}"
    made = hashlib.sha256(begun.encode()).hexdigest()[:16]
    durable.write_json(path, {"id": made})
    return made
