"""The tracker of a run: TensorBoard, Weights & Biases, MLflow, Comet, Trackio and others, through accelerate.

    track=wandb track.project=my_project        # TrackerCallback sends settings, metrics and result
    tracker.json                                # {"tracker": "wandb", "id": "..."}: where a resumed run continues

metrics.jsonl is complete without a tracker. After an error of a tracker, training continues without it.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.config import Tracker
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import durable, untrusted
from lora_ft.io.redact import redact
from lora_ft.training.callbacks import Callback, Metrics, Outcome
from lora_ft.training.finish import Result
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

ID = "tracker.json"

# Defaults that turn off usage reports and the upload of code, command line and machine details.
_UNLESS_SET = {
    Tracker.wandb: {"WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"},
    Tracker.mlflow: {"MLFLOW_DISABLE_TELEMETRY": "true"},
    Tracker.comet_ml: {
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "COMET_AUTO_LOG_ENV_DETAILS": "false",
        "COMET_AUTO_LOG_CLI_ARGUMENTS": "false",
        "COMET_AUTO_LOG_CODE": "false",
        "COMET_AUTO_LOG_GIT_METADATA": "false",
        "COMET_AUTO_LOG_GIT_PATCH": "false",
    },
}

# The run id inside the tracker. Trackers that are not listed cannot continue a run: a resumed run becomes a new one.
_ID: dict[Tracker, Callable[[Any], str]] = {
    Tracker.wandb: lambda run: run.id,
    Tracker.mlflow: lambda run: run.info.run_id,
    Tracker.trackio: lambda run: run.name,
    Tracker.comet_ml: lambda experiment: experiment.get_key(),
}


def callbacks(track: config.Track) -> list[Callback]:
    """Return the callback that sends metrics to the tracker; raises what `check` raises."""
    check(track)
    return [] if track.name is Tracker.none else [TrackerCallback(track)]


def check(track: config.Track) -> None:
    """Raise ResourceError if the tracker's package or account is missing."""
    name = track.name.value
    if track.name is Tracker.none:
        return
    for variable, value in _UNLESS_SET.get(track.name, {}).items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec(name) is None:
        extras = (Tracker.tensorboard, Tracker.wandb, Tracker.mlflow)
        package = f"'lora_ft[{name}]'" if track.name in extras else name
        raise ResourceError(f"track={name} needs the package {name}: pip install {package}")
    if track.name is Tracker.wandb:
        import wandb

        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise ResourceError("track=wandb has no account: set WANDB_API_KEY, or WANDB_MODE=offline")


class TrackerCallback(Callback):
    """Sends settings, metrics and result of a run to its tracker, started with the first metrics."""

    def __init__(self, track: config.Track) -> None:
        self._name, self._project = track.name, track.project
        self._tracker: Any = None
        self._has_failed = False
        self._undo = contextlib.ExitStack()

    def on_step(self, state: TrainingState, metrics: Metrics) -> None:
        if self._has_failed:
            return
        values = dict(metrics)
        step = values.pop("step")
        with self._warned():
            if self._tracker is None:
                self._start(state, step)
            self._tracker.log(values, step=step)

    def on_evaluate(self, state: TrainingState, metrics: Metrics) -> None:
        if "lr" not in metrics:  # not part of a step that is sent already
            self.on_step(state, metrics)

    def on_end(self, state: TrainingState, outcome: Outcome) -> None:
        if self._has_failed or (self._tracker is None and not isinstance(outcome, Result)):
            return
        with self._warned():
            if isinstance(outcome, Result):
                if self._tracker is None:  # a resumed run without further steps
                    self._start(state, outcome.steps + 1)
                self._log_result(outcome)
            self._finish(outcome)

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        """Log an error of the tracker as a warning and stop using it."""
        try:
            yield
        except Exception as error:
            name = self._name.value
            log.warning("track=%s failed; %s is complete: %s: %s", name, runs.METRICS, type(error).__name__, error)
            self._has_failed = True
            with contextlib.suppress(Exception):  # it may have failed before it started
                self._tracker.finish()
            self._undo.close()

    def _start(self, state: TrainingState, first_step: int) -> None:
        """Start a run in the tracker, or continue the one that tracker.json names."""
        from accelerate import PartialState  # takes a second
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logging needs it
        known_id = _read_id(state.folder, self._name)
        kind = LOGGER_TYPE_TO_CLASS[self._name.value]
        folders = [str(state.folder)] if kind.requires_logging_directory else []
        # TensorBoard's writer puts its files into the folder of this name.
        project = self._name.value if self._name is Tracker.tensorboard else self._project
        hooks = sys.exit, sys.excepthook
        self._tracker = kind(project, *folders, **self._options(state.folder, first_step, known_id))
        try:
            self._tracker.start()
        finally:
            sys.exit, sys.excepthook = hooks  # wandb replaces them and would print tracebacks, which may hold secrets
        if known_id is None:
            found = _ID[self._name](self._tracker.tracker) if self._name in _ID else ""
            durable.write_json(state.folder / ID, {"tracker": self._name.value, "id": found})
            self._tracker.store_init_configuration(_flat(validation.to_plain(state.cfg)))

    def _options(self, folder: Path, first_step: int, known_id: str | None) -> dict[str, Any]:
        """Return the arguments of the tracker's own start function."""
        group, name = _group_and_name(folder)
        match self._name:
            case Tracker.tensorboard:
                return {"purge_step": first_step}  # hides later steps of earlier files
            case Tracker.wandb:
                resume = {"id": known_id, "resume": "allow"} if known_id else {}
                settings = {"console": "off", "symlink": False}
                return {"name": name, "group": group, "dir": str(folder), "settings": settings, **resume}
            case Tracker.mlflow:
                if not os.environ.get("MLFLOW_TRACKING_URI"):
                    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                    os.environ["MLFLOW_TRACKING_URI"] = (folder.resolve() / "mlflow").as_uri()
                    self._undo.callback(os.environ.pop, "MLFLOW_TRACKING_URI", None)
                return {"run_name": name, "run_id": known_id, "tags": {"group": group} if group else None}
            case Tracker.trackio:
                return {"name": known_id or name, "group": group, "resume": "allow" if known_id else "never"}
            case Tracker.comet_ml:
                from comet_ml import ExperimentConfig

                settings = ExperimentConfig(
                    name=name,
                    tags=[group] if group else None,
                    auto_output_logging=False,
                    offline_directory=str(folder / "comet_ml"),
                )
                return {"experiment_key": known_id, "experiment_config": settings}
            case Tracker.dvclive:
                return {"dir": str(folder / "dvclive"), "resume": known_id is not None}
            case Tracker.swanlab:
                return {"name": name, "group": group, "log_dir": str(folder / "swanlab")}
            case Tracker.clearml:
                return {"task_name": name}
        return {}

    def _log_result(self, result: Result) -> None:
        values = {f"result/{name}": value for name, value in _values(result) if value is not None}
        if self._name is Tracker.wandb:  # its history rejects a repeated step
            self._tracker.run.summary.update(values)
        else:
            numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str)}
            self._tracker.log(numbers, step=result.steps)

    def _finish(self, outcome: Outcome) -> None:
        """End the run in the tracker; wandb and MLflow also show how it ended."""
        succeeded = outcome is None or isinstance(outcome, Result)
        if self._name is Tracker.wandb:
            self._tracker.run.finish(exit_code=0 if succeeded else getattr(outcome, "exit_code", 1))
        elif self._name is Tracker.mlflow:
            import mlflow

            failed = "FAILED" if isinstance(outcome, Exception) else "KILLED"
            mlflow.end_run("FINISHED" if succeeded else failed)
        else:
            self._tracker.finish()
        self._tracker = None
        self._undo.close()


def _values(result: Result) -> Iterator[tuple[str, Any]]:
    """Yield the single values of a result; a classification has its metrics among them."""
    for name, value in asdict(result).items():
        if isinstance(value, dict):
            yield from ((f"{name}/{metric}", each) for metric, each in value.items() if name != "classification")
        else:
            yield name, value


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted key; a list, a mapping below a group, and null become JSON text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and not prefix:
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, str):
            flat[prefix + name] = redact(value)
        else:
            flat[prefix + name] = value if isinstance(value, int | float) else redact(json.dumps(value))
    return flat


def _group_and_name(folder: Path) -> tuple[str | None, str]:
    """Return the name of the sweep that a run belongs to, if any, and the name of the run."""
    folder = folder.resolve()
    for above in folder.parents:
        if (above / runs.SWEEP).is_file():
            return above.name, folder.relative_to(above).as_posix()
    return None, folder.name


def _read_id(folder: Path, name: Tracker) -> str | None:
    """Return the id that tracker.json holds for this tracker; None if the run is new to it."""
    path = folder / ID
    untrusted.check_place(path, folder)
    found = untrusted.json_object(path, ConfigError) if path.is_file() else {}
    return str(found["id"]) if found.get("tracker") == name.value else None
