"""The run folder, the only interface between commands. No torch here.

runs/2026-11-23_10-15-00-123456/
  config.yaml        the composed config, resolved; never rewritten
  changed.json       settings that a resumed run changed, by dotted key: {"train.epochs": 3}
  overrides.txt      the overrides of the command line, one per line
  environment.json   versions, machine, device, command
  rows.jsonl         rows given in Python (run_rows.py); eval_rows.jsonl
  check.json         the dry run: rows, steps, layers, warnings (training/dry_run.py)
  metrics.jsonl      one object per step: {"step": 1, "loss": ..., ...}
  checkpoints/       states to resume from (training/checkpoint.py)
  result.json        the outcome: losses, metrics, tokens per second, peak memory, sha256 of the adapter
  confusion.png      with data.labels: the confusion matrix of the eval rows
  halving.json       the last rung of successive halving that a job passed: {"passed": 20}
  failure.json       instead of result.json, for a failed job of a sweep: kind of error, exit code, message
  adapter/           stock PEFT files, tokenizer, lora_ft.json
  tracker.json       name and run id of the tracker; tensorboard/, wandb/, mlflow/ hold its local files
  eval.json          written by lora-ft eval; merge.json by lora-ft merge: losses of the two merges of a quantized run

A sweep folder holds a run folder per job, sweep.json with the overrides of the sweep, and children/ with the files of
its workers (sweeps/executors/children.py).
"""

import contextlib
import datetime
import errno
import functools
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lora_ft import config, validation
from lora_ft.errors import CheckpointError, ConfigError, LoraFtError
from lora_ft.io import durable, untrusted
from lora_ft.io.redact import redact
from lora_ft.metric_table import LOSS

PACKAGES = ("lora_ft", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "hydra-core")

METRICS, RESULT, CHECK, CHECKPOINTS = "metrics.jsonl", "result.json", "check.json", "checkpoints"
FAILURE, OVERRIDES, LOG, SWEEP = "failure.json", "overrides.txt", "log.txt", "sweep.json"
HALVING = "halving.json"
CHILDREN = "children"
CONFUSION = "confusion.png"
ROWS, EVAL_ROWS = "rows.jsonl", "eval_rows.jsonl"  # given in Python
_CONFIG, _CHANGED, _ENVIRONMENT = "config.yaml", "changed.json", "environment.json"
_SECONDS_BETWEEN_LOCKS = 0.2
_BEFORE_TRAINING = {_CONFIG, OVERRIDES, _ENVIRONMENT, LOG, "tensorboard", CHECK, FAILURE, ROWS, EVAL_ROWS}


def begin(folder: Path, cfg: Any, overrides: list[str]) -> bool:
    """Create the run of a `locked` folder, or reopen it if `cfg.resume` is set and it has begun to train.

    Returns False if the run is finished. Raises the errors of `create` and `reopen`.
    """
    if cfg.resume and exists(folder):
        has_work = reopen(folder, cfg)
    else:
        create(folder, validation.to_plain(cfg), overrides)
        has_work = True
    if has_work:
        durable.remove(folder / FAILURE)
    return has_work


def create(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """Create a run: write its config, overrides and environment.

    Raises ConfigError if the folder is not empty; the files of a run that failed before its first step are allowed.
    """
    durable.make_folder(folder)
    if not _names(folder) <= _BEFORE_TRAINING:
        raise ConfigError(
            f"the run folder must be empty, but {folder} is not: choose another folder, or continue its run with "
            "resume=auto"
        )
    durable.clear_leftovers(folder)
    write_overrides(folder, overrides)
    durable.write_json(folder / _ENVIRONMENT, environment())
    # Written last: it marks a run that can be resumed.
    durable.write_text(folder / _CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def new_folder() -> Path:
    """Return the path of a new folder under runs/, named by the time."""
    return Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def folder_of(cfg: Any, folder: str | Path | None) -> Path:
    """Return the absolute folder of a run: `folder`, the one that `cfg.resume` names, or a new one."""
    resumed = None if cfg.resume in (None, "auto") else cfg.resume
    if cfg.resume == "auto" and folder is None:
        raise ConfigError("resume=auto continues the run in a folder: name it with folder=")
    if resumed and folder and Path(resumed).expanduser().absolute() != Path(folder).expanduser().absolute():
        raise ConfigError(f"resume={resumed} and folder={folder} name two folders: give one of them")
    return Path(folder or resumed or new_folder()).expanduser().absolute()


def write_overrides(folder: Path, overrides: list[str]) -> None:
    durable.write_text(folder / OVERRIDES, "".join(f"{o}\n" for o in overrides))


def write_failure(folder: Path, error: BaseException) -> None:
    """Write failure.json; the traceback of an unexpected error is appended to log.txt."""
    known = isinstance(error, LoraFtError)
    if not known:
        durable.append_line(folder / LOG, "".join(traceback.format_exception(error)))
    failure = {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, LoraFtError) else 1,
        # Redacted before it becomes JSON too, which escapes quotes in the message twice.
        "message": redact(str(error) if known else f"{type(error).__name__}: {error}"),
    }
    durable.write_json(folder / FAILURE, failure)


def fail(folder: Path, error: BaseException, overrides: list[str]) -> None:
    """Write failure.json for a job whose folder may not exist yet."""
    durable.make_folder(folder)
    if not (folder / OVERRIDES).is_file():
        write_overrides(folder, overrides)
    write_failure(folder, error)


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Return the content of failure.json, or None if the run has not failed."""
    path = folder / FAILURE
    untrusted.check_place(path, folder)
    return untrusted.json_object(path, ConfigError) if path.is_file() else None


def create_sweep(folder: Path, overrides: list[str], config_dir: Path | None, *, resumed: bool) -> None:
    """Write sweep.json into the `locked` folder of a sweep, unless a resumed sweep has it already.

    Raises ConfigError if the folder holds anything else.
    """
    if not any(folder.iterdir()):
        found = {"overrides": overrides, "config_dir": str(config_dir.resolve()) if config_dir else None}
        durable.write_json(folder / SWEEP, found)
    elif not (resumed and (folder / SWEEP).is_file()):
        raise ConfigError(f"the sweep folder must be empty, but {folder} is not: choose another hydra.sweep.dir, or "
                          f"continue with: lora-ft sweep resume={shlex.quote(str(folder))}")  # fmt: skip


def read_sweep(folder: Path) -> tuple[list[str], Path | None]:
    """Return the overrides of a sweep and its --config-dir; raises ConfigError if the folder is not a sweep's."""
    path = folder / SWEEP
    if not path.is_file():
        raise ConfigError(f"{folder} is not a sweep folder: it has no {SWEEP}")
    untrusted.check_place(path, folder)
    found = untrusted.json_object(path, ConfigError)
    overrides, config_dir = found.get("overrides"), found.get("config_dir")
    if not (
        isinstance(overrides, list)
        and all(isinstance(w, str) for w in overrides)
        and isinstance(config_dir, str | None)
    ):
        if "words" in found:
            raise ConfigError(f"{folder} is a sweep of lora_ft 0.1, which this version cannot read")
        raise ConfigError(f"{path} must contain overrides and config_dir of a sweep")
    return overrides, Path(config_dir) if config_dir else None


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Lock the folder of a run or sweep until the block ends; raises ConfigError if another process keeps it locked.

    The kernel releases the lock when the process ends in any way. File systems without locks are used without one.
    """
    durable.make_folder(folder)
    with durable.writing(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until = time.monotonic() + wait_seconds
        while not _lock(descriptor):
            if time.monotonic() >= until:
                raise ConfigError(f"{folder} is in use by another process: wait until it ends, or use another folder")
            time.sleep(_SECONDS_BETWEEN_LOCKS)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; return False if another process has locked it."""
    import fcntl  # here: native Windows has none, and process.prepare refuses it with a message

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def exists(folder: Path) -> bool:
    """Return True if the run in this folder has begun to train."""
    return (folder / _CONFIG).is_file() and not _names(folder) <= _BEFORE_TRAINING


def _names(folder: Path) -> set[str]:
    """Return the names in a folder; temporary files count by their final names."""
    return {durable.final_name(path.name) for path in folder.iterdir()} if folder.is_dir() else set()


def is_finished(folder: Path, cfg: Any) -> bool:
    """Return True if a run has a result and `cfg` does not make it longer; raises ConfigError for other settings."""
    return (folder / RESULT).is_file() and not _longer(validation.changes(read_config(folder), cfg))


def reopen(folder: Path, cfg: Any) -> bool:
    """Check that a run can continue with these settings; return False if it is finished and they do not make it longer.

    Raises ConfigError for settings that a resumed run cannot change, CheckpointError if a finished run should be longer
    and has no checkpoint.
    """
    durable.clear_leftovers(folder)
    changed = validation.changes(read_config(folder), cfg)
    if not (folder / RESULT).is_file():
        return True
    if not _longer(changed):
        return False
    if not any((folder / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(f"{folder} is finished and has no checkpoint to continue from")
    return True


def keep_changes(folder: Path, cfg: Any) -> bool:
    """Write the settings that a resumed run changes to changed.json; return True if they make the run longer."""
    changed = validation.changes(read_config(folder), cfg)
    if _longer(changed):
        durable.remove(folder / RESULT)  # first: a run with a result counts as finished
    if changed:
        durable.write_json(folder / _CHANGED, _read_changed(folder) | changed)
    return _longer(changed)


def _longer(changed: dict[str, Any]) -> bool:
    return "train.epochs" in changed or "train.max_steps" in changed


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of result.json of a finished run."""
    untrusted.check_place(folder / RESULT, folder)
    return untrusted.json_object(folder / RESULT, ConfigError)


def objective(result: dict[str, Any]) -> Any:
    """Return the value in a result.json of the metric that train.best_metric named; None if it was not evaluated."""
    metric = result.get("best_metric", LOSS)
    metrics = result.get("metrics")
    return result.get("eval_loss") if metric == LOSS else metrics.get(metric) if isinstance(metrics, dict) else None


def environment() -> dict[str, Any]:
    """Return versions and machine of this process, as needed to reproduce a run; no paths and no names."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions(),
        "command": Path(sys.argv[0]).stem,
    }


def record_device(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts about the device to environment.json, when the run first trains.

    A checkpoint has those of the process that wrote it, so that a resume can compare.
    """
    path = folder / _ENVIRONMENT
    found = untrusted.json_object(path, ConfigError) if path.is_file() else {}
    if "device" not in found:
        durable.write_json(path, found | {"device": facts})


@functools.cache  # takes 10 ms, and every checkpoint needs them
def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    durable.append_line(folder / METRICS, json.dumps(values, allow_nan=False))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl; a killed process may leave a partial last one."""
    text = (folder / METRICS).read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a run, including the changes of resumed runs. The folder may be from another person.

    Raises ConfigError if the folder is not a run folder, and the errors of lora_ft.io.untrusted.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {_CONFIG}")
    untrusted.check_place(path, folder)
    untrusted.check_yaml(path.read_bytes(), str(path), ConfigError)
    loaded = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{folder}: {_CONFIG} contains no settings")
    _check_edition(folder, loaded)
    for key, value in _read_changed(folder).items():
        group, _, name = key.rpartition(".")
        settings = loaded.setdefault(group, {}) if group else loaded
        if not isinstance(settings, dict):
            raise ConfigError(f"{folder}: {group} of {_CONFIG} must be a mapping, got {settings}")
        settings[name] = value
    return loaded


def _check_edition(folder: Path, stored: dict[str, Any]) -> None:
    """Raise ConfigError for a config of an earlier version, some of whose settings have other names now."""
    for group, settings in stored.items():
        for name in settings if isinstance(settings, dict) else ():
            if now := config.RENAMED.get(f"{group}.{name}"):
                raise ConfigError(
                    f"{folder} was written by an earlier version: its {group}.{name} is now {now}. Train again "
                    f"with this version, or use the adapter alone: adapter_path={folder / 'adapter'}"
                )


def _read_changed(folder: Path) -> dict[str, Any]:
    path = folder / _CHANGED
    untrusted.check_place(path, folder)
    return untrusted.json_object(path, ConfigError) if path.is_file() else {}


def adapter_folder(folder: Path) -> Path:
    """Return the adapter folder of a finished run; raises ConfigError if the run has none."""
    path = folder / "adapter"
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"run={folder} has no adapter: the run did not finish (see {folder / LOG}). Continue it with: "
            f"lora-ft train resume={shlex.quote(str(folder))}"
        )
    return path
