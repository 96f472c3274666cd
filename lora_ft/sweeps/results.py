"""Read the state, figures and curves of a sweep's jobs from their files, at any moment. No torch here.

sweep = read(Path("runs/2026-11-24_10-15-00-123456"))
sweep.jobs[3].state, .settings["adapter.r"], .figures.eval_loss, .curve.losses

A file may be half written, damaged or from somebody else: its job is then unreadable with a reason, and the others are
read. Numbers that are not finite become None. Texts hold no secrets and no control characters.
"""

import contextlib
import functools
import json
import math
import os
import platform
import shlex
import time
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.io import redact, untrusted
from lora_ft.metric_table import LOSS, METRICS

ADAPTER = "adapter/adapter_model.safetensors"

_FILES = (runs.OVERRIDES, "config.yaml", "changed.json", runs.METRICS, runs.CHECK, runs.RESULT, runs.FAILURE)
_COMPUTED = ("adapter_bytes", "value", "base_value")
_OF_SOURCES = ("eval_losses", "base_eval_losses")
_LARGEST = 1e30  # larger numbers overflow in the transformations of a chart
_SECONDS_BETWEEN_BEATS = 300.0  # at most, of a worker that runs on another machine
_POINTS = 120  # of a curve; a chart shows no more, and reading all of a long run takes as long as a training step


class State(Enum):
    finished = "finished"
    stopped = "stopped"  # by halving or patience: finished, with fewer steps
    running = "running"
    paused = "paused"  # begun; the running sweep will continue it
    interrupted = "interrupted"
    waiting = "not started"
    failed = "failed"
    unreadable = "unreadable"


@dataclass(frozen=True)
class Figures:
    """The figures in a finished job's result.json and the size of its adapter; None if unknown or not finite.

    eval_losses, base_eval_losses: of each source of data.sources, those that are finite.
    """

    eval_loss: float | None = None
    base_eval_loss: float | None = None
    eval_tokens: int | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None
    steps: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    train_seconds: float | None = None
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None
    adapter_bytes: int | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)
    base_eval_losses: dict[str, float] = field(default_factory=dict)
    value: float | None = None  # of the job's metric, train.best_metric, for the saved adapter
    base_value: float | None = None


@dataclass(frozen=True)
class Curve:
    """Values by step: the train loss of every `stride`-th step, every eval loss, every value of the job's metric."""

    losses: tuple[tuple[int, float], ...] = ()
    eval_losses: tuple[tuple[int, float], ...] = ()
    values: tuple[tuple[int, float], ...] = ()
    stride: int = 1
    last_step: int | None = None
    tokens_per_second: float | None = None  # of the last step


@dataclass(frozen=True)
class JobResult:
    """One job: `number` counts from 0 in the sweep; `settings` by dotted key are empty until its config is written.

    eval_rows: hash of the rows that it was evaluated on; None if unknown.
    """

    name: str
    folder: Path
    number: int = 0
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    state: State = State.waiting
    reason: str = ""
    exit_code: int | None = None
    num_steps: int | None = None  # planned; None if unknown
    figures: Figures = Figures()
    curve: Curve = Curve()
    eval_rows: str | None = None

    @property
    def metric(self) -> str:
        """The metric that the job is ranked by: train.best_metric."""
        named = self.settings.get("train.best_metric")
        return named if named in METRICS else LOSS

    @property
    def has_head(self) -> bool:
        """True for a classifier with a head: its losses are in nats per row."""
        return self.settings.get("objective.name") == "classification"

    @property
    def is_finished(self) -> bool:
        return self.state in (State.finished, State.stopped)

    @property
    def step(self) -> int:
        return self.figures.steps or self.curve.last_step or 0

    @property
    def log(self) -> str | None:
        """The path of its log as text, None if there is no log."""
        path = self.folder / runs.LOG
        return shown(str(path)) if path.is_file() else None


@dataclass(frozen=True)
class Sweep:
    """A sweep folder: the overrides of its command, and its jobs in order."""

    folder: Path
    overrides: tuple[str, ...]
    config_dir: Path | None
    jobs: tuple[JobResult, ...]

    @property
    def own_command(self) -> str:
        return shlex.join(["lora-ft", "sweep", *self._config_dir, *self.overrides])

    def command(self, job: JobResult) -> str:
        """Return the command that runs this job by itself."""
        return shlex.join(["lora-ft", "train", *self._config_dir, *job.overrides])

    @property
    def _config_dir(self) -> list[str]:
        return ["--config-dir", shown(str(self.config_dir))] if self.config_dir else []


def read(folder: Path) -> Sweep:
    """Read a sweep folder; raises ConfigError if it has no sweep.json."""
    overrides, config_dir = runs.read_sweep(folder)
    root = folder.absolute()
    in_use, elsewhere, jobs = _locked_inodes(), _running_elsewhere(root), []
    for number, path in enumerate(_job_folders(root)):
        is_running = path in elsewhere or (None if in_use is None else path.stat().st_ino in in_use)
        job = read_job(path, number, path.relative_to(root).as_posix(), is_running)
        is_paused = job.state is State.interrupted and root.stat().st_ino in (in_use or ())
        jobs.append(replace(job, state=State.paused) if is_paused else job)
    return Sweep(root, tuple(map(shown, overrides)), config_dir, tuple(jobs))


def _job_folders(root: Path) -> list[Path]:
    """Find folders with an overrides.txt at any depth; sort them by number if all names are numbers, else by name."""
    found = []
    for parent, folders, files in os.walk(root):
        if runs.OVERRIDES in files and parent != str(root):
            found.append(Path(parent))
            folders.clear()  # folders inside a run are not jobs
        folders[:] = [name for name in folders if not name.startswith(".")]
    names = {path: path.relative_to(root).as_posix() for path in found}
    if all(name.isdecimal() for name in names.values()):
        return sorted(found, key=lambda path: int(names[path]))
    return sorted(found, key=lambda path: names[path])


def read_job(folder: Path, number: int = 0, name: str = "", is_running: bool | None = None) -> JobResult:
    """Read the folder of a job; is_running: None if unknown."""
    key = number, name, is_running, tuple(stamp(folder / file) for file in _FILES)
    if folder not in _newest or _newest[folder][0] != key:
        _newest[folder] = key, _read_job(folder, number, name or folder.name, is_running, key[-1])
    return _newest[folder][1]


def stamp(path: Path) -> tuple[int, int] | None:
    """Return modification time and size of a file, None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


Stamps = tuple[tuple[int, int] | None, ...]


# The newest result of each job: most files do not change between two looks, and older results are never needed.
_newest: dict[Path, tuple[tuple[Any, ...], JobResult]] = {}


def _read_job(folder: Path, number: int, name: str, is_running: bool | None, stamps: Stamps) -> JobResult:
    known: dict[str, Any] = {"name": shown(name), "folder": folder, "number": number}
    present = {file for file, found in zip(_FILES, stamps, strict=True) if found}
    try:
        for file in present:
            untrusted.check_place(folder / file, folder)
        if runs.OVERRIDES in present:
            lines = shown((folder / runs.OVERRIDES).read_text("utf-8")).split("\n")
            known["overrides"] = tuple(line for line in lines if line)
        if "config.yaml" in present:
            known["settings"] = _settings(folder, stamps[1:3])
        metric = JobResult("", folder, settings=known.get("settings", {})).metric
        curve = known["curve"] = _curve(folder / runs.METRICS, metric) if runs.METRICS in present else Curve()
        if runs.RESULT in present:
            known |= _finished(folder)
        elif runs.FAILURE in present:
            known |= _failed(folder)
        else:
            known |= _unfinished(folder, curve, is_running, present)
    except (LoraFtError, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}: ", "")
        known |= {"state": State.unreadable, "reason": shown(reason)}
    return JobResult(**known)


@functools.lru_cache(maxsize=4096)  # YAML takes 10 ms a file
def _settings(folder: Path, stamps: Stamps) -> dict[str, Any]:
    return _defaults() | _flat(runs.read_config(folder))


@functools.cache
def _defaults() -> dict[str, Any]:
    """Return the defaults of all settings, for those that are newer than a job's config."""
    defaults = {setting.key: setting.default for setting in validation.settings(config.TrainRun)}
    return _flat({key: value.value if isinstance(value, Enum) else value for key, value in defaults.items()})


def _flat(node: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {shown(key): _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    """Convert a setting's value to a JSON value."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else shown(str(value))


def shown(text: str) -> str:
    """Redact secrets and replace control characters, which a terminal would obey.

    Called for each short text: searching a whole page takes a tenth of a second.
    """
    clean = text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return redact.redact(clean)


def _curve(path: Path, metric: str) -> Curve:
    """Read metrics.jsonl, thinned to about `_POINTS` steps, with every evaluation and the last step."""
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # nothing, or a line that is being written
    stride = max(1, math.ceil(len(lines) / _POINTS))
    losses, eval_losses, of_metric, step, values = [], [], [], None, dict[str, Any]()
    for number, line in enumerate(lines):
        if number % stride and number != len(lines) - 1 and b'"eval_loss"' not in line:
            continue
        step, values = _metrics(path, number, line)
        if (loss := finite(values.get("loss"))) is not None:
            losses.append((step, loss))
        if (loss := finite(values.get("eval_loss"))) is not None:
            eval_losses.append((step, loss))
        if (value := finite(values.get(f"eval_{metric}"))) is not None:
            of_metric.append((step, value))
    return Curve(
        tuple(losses), tuple(eval_losses), tuple(of_metric), stride, step, finite(values.get("tokens_per_second"))
    )


def _metrics(path: Path, number: int, line: bytes) -> tuple[int, dict[str, Any]]:
    try:
        values = json.loads(line.decode("utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or type(step := values.get("step")) is not int or finite(step) is None:
        raise ConfigError(f"{path}:{number + 1} holds no step: {line[:60].decode('utf-8', 'replace')!r}")
    return step, values


def finite(value: Any) -> float | None:
    """Return the value if it is a number of a size that can be drawn, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= _LARGEST else None


def _finished(folder: Path) -> dict[str, Any]:
    result = runs.read_result(folder)
    size = stamp(folder / ADAPTER)
    numbers = {f.name: _number(result, f.name) for f in fields(Figures) if f.name not in (*_COMPUTED, *_OF_SOURCES)}
    of_base = result | {"eval_loss": result.get("base_eval_loss"), "metrics": result.get("base_metrics")}
    for name, found in (("value", result), ("base_value", of_base)):
        numbers[name] = _number({name: runs.objective(found)}, name)
    stopped_by, reason = result.get("stopped_by"), ""
    if stopped_by is not None:
        reason = shown(str(stopped_by))
    elif result.get("stopped_early") is True:
        reason = f"patience at step {numbers['steps']}"
    numbers |= {name: _numbers(result, name) for name in _OF_SOURCES}
    figures = Figures(**numbers, adapter_bytes=size[1] if size else None)
    rows = result.get("eval_rows_sha256")
    known = {"figures": figures, "eval_rows": shown(str(rows)) if rows else None}
    if reason:
        return {"state": State.stopped, "reason": reason, **known}
    return {"state": State.finished, "num_steps": figures.steps, **known}


def _number(result: dict[str, Any], name: str) -> Any:
    value = result.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(f"{runs.RESULT}: {name} must be a number, got {str(value)[:60]!r}")
    return finite(value)


def _numbers(result: dict[str, Any], name: str) -> dict[str, float]:
    """Return the finite numbers of a mapping in result.json, empty for a run of an earlier version."""
    values = result.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{runs.RESULT}: {name} must be a mapping, got {str(values)[:60]!r}")
    found = {shown(source): _number(values, source) for source in values}
    return {source: number for source, number in found.items() if number is not None}


def _failed(folder: Path) -> dict[str, Any]:
    failure = runs.read_failure(folder) or {}
    code = failure.get("exit_code")
    kind, message = (shown(str(failure.get(name, ""))) for name in ("kind", "message"))
    return {
        "state": State.failed,
        "reason": message if message.startswith(kind) else f"{kind}: {message}",
        "exit_code": code if type(code) is int and 0 < code < 256 else 1,
    }


def _unfinished(folder: Path, curve: Curve, is_running: bool | None, present: set[str]) -> dict[str, Any]:
    num_steps, reason = _num_steps(folder / runs.CHECK) if runs.CHECK in present else None, ""
    if curve.last_step is not None:
        reason = f"step {curve.last_step}" + (f" of {num_steps}" if num_steps is not None else "")
        reason += f", eval loss {curve.eval_losses[-1][1]:.4f}" if curve.eval_losses else ""
    state = State.interrupted if present & {"config.yaml", runs.METRICS} else State.waiting
    if is_running:
        state, reason = State.running, reason or "loading"
    elif is_running is None and state is State.interrupted:
        reason = ", ".join(filter(None, ["or running", reason]))
    return {"state": state, "reason": reason, "num_steps": num_steps}


def _num_steps(path: Path) -> int | None:
    steps = untrusted.json_object(path, ConfigError).get("steps")
    count = steps.get("count") if isinstance(steps, dict) else None
    return count if type(count) is int else None


def _locked_inodes() -> set[int] | None:
    """Return the inodes that processes of this machine lock, as training locks its folder; None if they are unknown.

    Trying to take a lock could make a job that starts at the same moment fail. Devices are not compared: the kernel's
    list and stat differ on some file systems.
    """
    try:
        lines = Path("/proc/locks").read_text("ascii").splitlines()
    except OSError:
        return None
    locks = [line.split() for line in lines if " FLOCK " in line and "->" not in line]
    return {int(columns[5].rpartition(":")[2]) for columns in locks if len(columns) > 5}


def _running_elsewhere(root: Path) -> set[Path]:
    """Return the folders of the jobs in which workers on other machines made a step in the last minutes."""
    found = set()
    for path in (root / runs.CHILDREN).glob("[0-9]*.json"):
        if not path.stem.isdecimal() or time.time() - path.stat().st_mtime > _SECONDS_BETWEEN_BEATS:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, LoraFtError):
            untrusted.check_place(path, root)
            beat = json.loads(path.read_bytes())
            if beat["host"] != platform.node():
                found.add(Path(beat["folder"]))
    return found
