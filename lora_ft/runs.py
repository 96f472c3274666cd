"""The run folder: what a run leaves behind, and the only thing one command hands to another. No torch here.

runs/2026-11-23_10-15-00-123456/
  config.yaml        the composed config, resolved; never rewritten
  changed.json       settings that a resumed run has otherwise, by dotted key: {"train.epochs": 3}
  overrides.txt      the overrides of the command line, one a line
  environment.json   versions, machine, command
  rows.jsonl         rows that were given in Python; eval_rows.jsonl
  check.json         what was known of rows, steps and layers before training (training/dry_run.py)
  metrics.jsonl      one object a step: {"step": 1, "loss": ..., ...}
  checkpoints/       states to resume from (training/checkpoint.py)
  result.json        the outcome: losses, tokens per second, peak memory, where the adapter is
  halving.json       the last rung of successive halving that a job passed: {"passed": 20}
  failure.json       in its place, for a job of a sweep that failed: kind of error, exit code, message
  adapter/           stock PEFT files, tokenizer, lora_ft.json
  tracker.json       the run's tracker and id in it; tensorboard/, wandb/, mlflow/ hold its files on this machine
  eval.json          written by lora-ft eval; merge.json by lora-ft merge, which weights were better to merge onto

A sweep folder holds a run folder for each job, and sweep.json: the overrides that began it.
"""

import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lora_ft import config, validation
from lora_ft.errors import CheckpointError, ConfigError, DataError, LoraFtError
from lora_ft.io import durable, untrusted
from lora_ft.io.redact import redact

PACKAGES = ("lora_ft", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "hydra-core")

METRICS, RESULT, CHECK, CHECKPOINTS = "metrics.jsonl", "result.json", "check.json", "checkpoints"
FAILURE, OVERRIDES, LOG, SWEEP = "failure.json", "overrides.txt", "log.txt", "sweep.json"
HALVING = "halving.json"
ROWS, EVAL_ROWS = "rows.jsonl", "eval_rows.jsonl"  # given in Python
_CONFIG, _CHANGED = "config.yaml", "changed.json"
_BEFORE_TRAINING = {_CONFIG, OVERRIDES, "environment.json", LOG, "tensorboard", CHECK, FAILURE, ROWS, EVAL_ROWS}


def begin(folder: Path, cfg: Any, overrides: list[str]) -> bool:
    """Start the run of a folder that is `locked`, or reopen it where `cfg.resume` says so and it has begun to train.

    False where it is finished and nothing more is asked of it. Raises what `create` and `reopen` raise.
    """
    if cfg.resume and exists(folder):
        goes_on = reopen(folder, cfg)
    else:
        create(folder, validation.to_plain(cfg), overrides)
        goes_on = True
    if goes_on:
        durable.remove(folder / FAILURE)
    return goes_on


def create(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """Start a run: refuse a folder that holds anything, then write what is known before training.

    What a start that failed before its first step left behind is no obstacle to the next.
    """
    durable.make_folder(folder)
    if not _names(folder) <= _BEFORE_TRAINING:
        raise ConfigError(
            f"the run folder must be empty, but {folder} is not: choose another hydra.run.dir, or resume=auto"
        )
    durable.clear_leftovers(folder)
    write_overrides(folder, overrides)
    durable.write_json(folder / "environment.json", environment())
    # Last: a folder that has it holds a run, which can be resumed.
    durable.write_text(folder / _CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def new_folder() -> Path:
    """Return a new folder's path under runs/, named by the time, as the commands do."""
    return Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def with_rows(cfg: Any, folder: Path, rows: Any, eval_rows: Any) -> Any:
    """Return a deep copy of a config; its data are the rows that `write_rows` puts into the run folder, if any.

    A run that is resumed without rows and data finds those that it was begun with.
    """
    cfg = copy.deepcopy(cfg)
    for key, given, name in (("path", rows, ROWS), ("eval_path", eval_rows, EVAL_ROWS)):
        stored = cfg.resume and not getattr(cfg.data, key) and (folder / name).is_file()
        if given is not None or stored:
            setattr(cfg.data, key, str(folder / name))
    return cfg


def folder_of(cfg: Any, folder: str | Path | None) -> Path:
    """Return the absolute folder of a run from Python: the one given, the one that `cfg.resume` names, or a new one."""
    resumed = None if cfg.resume in (None, "auto") else cfg.resume
    if cfg.resume == "auto" and folder is None:
        raise ConfigError("resume=auto continues the run in a folder: name it with folder=")
    if resumed and folder and Path(resumed).expanduser().absolute() != Path(folder).expanduser().absolute():
        raise ConfigError(f"resume={resumed} continues the run in that folder, and folder={folder} names another")
    return Path(folder or resumed or new_folder()).expanduser().absolute()


def write_rows(folder: Path, rows: Any, eval_rows: Any) -> None:
    """Write rows that were given in Python, dicts or a datasets.Dataset, as JSON lines; DataError names a bad one."""
    for name, given in ((ROWS, rows), (EVAL_ROWS, eval_rows)):
        if given is None:
            continue
        text, path = "".join(_json_lines(given, name)), folder / name
        if path.is_file() and path.read_text("utf-8") != text:
            raise CheckpointError(f"{path} holds other rows than those given: the run cannot continue with them")
        durable.write_text(path, text)


def _json_lines(rows: Any, name: str) -> Iterator[str]:
    if hasattr(rows, "with_format"):  # datasets: as stored, for an image's row holds a path that would be opened
        rows = (row for batch in rows.with_format("arrow").iter(1000) for row in batch.to_pylist())
        rows = map(untrusted.without_filled_nulls, rows)
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"it is of type {type(row).__name__}, not a dict")
            line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
            line.encode("utf-8")  # a lone surrogate has no bytes
            yield line
        except (TypeError, ValueError) as error:
            raise DataError(f"{name.partition('.')[0]}[{number - 1}] cannot be stored as JSON: {error}") from None


def write_overrides(folder: Path, overrides: list[str]) -> None:
    durable.write_text(folder / OVERRIDES, "".join(f"{o}\n" for o in overrides))


def write_failure(folder: Path, error: BaseException) -> None:
    """Keep why a job failed; a bug's traceback goes into the run's log."""
    known = isinstance(error, LoraFtError)
    if not known:
        durable.append_line(folder / LOG, "".join(traceback.format_exception(error)))
    failure = {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, LoraFtError) else 1,
        # Redacted before it is JSON, too: what a message quotes is escaped twice there.
        "message": redact(str(error) if known else f"{type(error).__name__}: {error}"),
    }
    durable.write_json(folder / FAILURE, failure)


def fail(folder: Path, error: BaseException, overrides: list[str]) -> None:
    """`write_failure` for a job that may not have come to make its folder."""
    durable.make_folder(folder)
    if not (folder / OVERRIDES).is_file():
        write_overrides(folder, overrides)
    write_failure(folder, error)


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What `write_failure` kept; None where the run has not failed."""
    path = folder / FAILURE
    untrusted.check_place(path, folder)
    return untrusted.json_object(path, ConfigError) if path.is_file() else None


def create_sweep(folder: Path, overrides: list[str], config_dir: Path | None, *, resumed: bool) -> None:
    """Keep the overrides that begin a sweep in its folder, which is `locked`; ConfigError where that holds anything.

    A sweep that is resumed has its overrides already.
    """
    if not any(folder.iterdir()):
        found = {"overrides": overrides, "config_dir": str(config_dir.resolve()) if config_dir else None}
        durable.write_json(folder / SWEEP, found)
    elif not (resumed and (folder / SWEEP).is_file()):
        raise ConfigError(f"the sweep folder must be empty, but {folder} is not: choose another hydra.sweep.dir, or "
                          f"go on with: lora-ft sweep resume={shlex.quote(str(folder))}")  # fmt: skip


def read_sweep(folder: Path) -> tuple[list[str], Path | None]:
    """The overrides that began a sweep, and its folder of configs; ConfigError where the folder holds no sweep."""
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
            raise ConfigError(f"{folder} is a sweep of lora_ft 0.1, which this version cannot resume")
        raise ConfigError(f"{path} must hold overrides and config_dir of a sweep")
    return overrides, Path(config_dir) if config_dir else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a run or sweep while this one works in it; ConfigError where one is.

    The lock is the kernel's, on the folder itself: it ends with the process, however that ends. Where a file system
    has no locks there is none.
    """
    durable.make_folder(folder)
    with durable.writing(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder} is in use: another process works in it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise


def exists(folder: Path) -> bool:
    """Whether a run in this folder has begun to train; what a start that failed left behind is none."""
    return (folder / _CONFIG).is_file() and not _names(folder) <= _BEFORE_TRAINING


def _names(folder: Path) -> set[str]:
    """What lies in a folder; a file that was being written when its process was killed, by the name it was to have."""
    return {durable.meant_name(path.name) for path in folder.iterdir()} if folder.is_dir() else set()


def is_finished(folder: Path, cfg: Any) -> bool:
    """Whether a run has its result, and these settings ask for nothing more; ConfigError for others than its own."""
    return (folder / RESULT).is_file() and not _longer(validation.changes(read_config(folder), cfg))


def reopen(folder: Path, cfg: Any) -> bool:
    """Check that a run can go on with these settings; False where it is finished and they ask nothing more of it.

    Raises ConfigError for settings that a resumed run may not change, CheckpointError where a finished run is to be
    longer and its last state is gone.
    """
    durable.clear_leftovers(folder)
    changed = validation.changes(read_config(folder), cfg)
    if not (folder / RESULT).is_file():
        return True
    if not _longer(changed):
        return False
    if not any((folder / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(f"{folder} is finished, and has no checkpoint to go on from")
    return True


def keep_changes(folder: Path, cfg: Any) -> bool:
    """Write down what a run that goes on does otherwise than before; whether it is longer than it was to be."""
    changed = validation.changes(read_config(folder), cfg)
    if _longer(changed):
        durable.remove(folder / RESULT)  # first: with its result a run that was to go on would count as finished
    if changed:
        durable.write_json(folder / _CHANGED, _read_changed(folder) | changed)
    return _longer(changed)


def _longer(changed: dict[str, Any]) -> bool:
    return "train.epochs" in changed or "train.max_steps" in changed


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run wrote of its outcome."""
    untrusted.check_place(folder / RESULT, folder)
    return untrusted.json_object(folder / RESULT, ConfigError)


def environment() -> dict[str, Any]:
    """Versions and machine of this process: what a reader needs to repeat the run; no paths, no names."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions(),
        "command": Path(sys.argv[0]).stem,
    }


@functools.cache  # read from files, 10 ms, and every checkpoint has them
def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on; absent ones are left out."""
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
    """Read the lines of metrics.jsonl that are whole: a process that was killed may leave half of its last one."""
    text = (folder / METRICS).read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run, which may be somebody else's, with what was changed when it was resumed.

    Raises ConfigError where the folder is not one, and what lora_ft.io.untrusted raises.
    """
    path = folder / _CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {_CONFIG}")
    untrusted.check_place(path, folder)
    untrusted.check_yaml(path.read_bytes(), str(path), ConfigError)
    loaded = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{folder}: {_CONFIG} holds no settings")
    _check_edition(folder, loaded)
    for key, value in _read_changed(folder).items():
        group, _, name = key.rpartition(".")
        settings = loaded.setdefault(group, {}) if group else loaded
        if not isinstance(settings, dict):
            raise ConfigError(f"{folder}: {group} of {_CONFIG} must be a mapping, got {settings}")
        settings[name] = value
    return loaded


def _check_edition(folder: Path, stored: dict[str, Any]) -> None:
    """Raise ConfigError for a config that lora_ft 0.1 wrote: some of its settings have other names now."""
    for group, settings in stored.items():
        for name in settings if isinstance(settings, dict) else ():
            if now := config.RENAMED.get(f"{group}.{name}"):
                raise ConfigError(
                    f"{folder} was written by lora_ft 0.1: its {group}.{name} is now {now}. Train again with this "
                    f"version, or use the adapter alone: adapter_path={folder / 'adapter'}"
                )


def _read_changed(folder: Path) -> dict[str, Any]:
    path = folder / _CHANGED
    untrusted.check_place(path, folder)
    return untrusted.json_object(path, ConfigError) if path.is_file() else {}


def adapter_folder(folder: Path) -> Path:
    """The adapter of a finished run; ConfigError where the run has not written one."""
    path = folder / "adapter"
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(f"run={folder} has no adapter: the run did not finish (see {folder / LOG})")
    return path
