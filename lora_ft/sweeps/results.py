"""Read the state, figures and curves of a sweep's jobs from their files, running or ended. No torch here.

sweep = read(Path("runs/2026-11-24_10-15-00-123456"))
sweep.jobs[3].state, .settings["adapter.r"], .figures.eval_loss, .curve.losses

A file may be half written, damaged or from somebody else: its job is then unreadable with a reason, and the others are
read. Numbers that are not finite become None. Texts hold no secrets and no control characters.
"""

import functools
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.io import redact, untrusted

ADAPTER = "adapter/adapter_model.safetensors"

_POINTS = 120  # of a curve; a chart shows no more, and reading all of a long run takes as long as a training step
_MOST_METRICS_BYTES = 256 * 2**20
_MOST_OVERRIDES_BYTES = 2**20


class State(Enum):
    finished = "finished"
    stopped = "stopped"  # by halving or patience: finished, with fewer steps
    running = "running"
    interrupted = "interrupted"
    waiting = "not started"
    failed = "failed"
    unreadable = "unreadable"


@dataclass(frozen=True)
class Figures:
    """The figures in a finished job's result.json and the size of its adapter; None if unknown or not finite."""

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


@dataclass(frozen=True)
class Curve:
    """Losses by step: the train loss of every `stride`-th step, and every eval loss."""

    losses: tuple[tuple[int, float], ...] = ()
    eval_losses: tuple[tuple[int, float], ...] = ()
    stride: int = 1
    last_step: int | None = None


@dataclass(frozen=True)
class JobResult:
    """One job: `number` counts from 0 in the sweep; `settings` by dotted key are empty until its config is written."""

    name: str
    folder: Path
    number: int = 0
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    state: State = State.waiting
    reason: str = ""
    exit_code: int | None = None
    figures: Figures = Figures()
    curve: Curve = Curve()

    @property
    def is_finished(self) -> bool:
        return self.state in (State.finished, State.stopped)

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
        return shlex.join(["lora-ft", "sweep", *self._choices, *self.overrides])

    def command(self, job: JobResult) -> str:
        """The command that runs this job alone."""
        return shlex.join(["lora-ft", "train", *self._choices, *job.overrides])

    @property
    def _choices(self) -> list[str]:
        return ["--config-dir", shown(str(self.config_dir))] if self.config_dir else []


def read(folder: Path) -> Sweep:
    """Read a sweep folder; ConfigError if it has no sweep.json."""
    overrides, config_dir = runs.read_sweep(folder)
    root = folder.absolute()
    in_use = _locked_inodes()
    jobs = tuple(_job(root, path, number, in_use) for number, path in enumerate(_job_folders(root)))
    return Sweep(root, tuple(map(shown, overrides)), config_dir, jobs)


def _job_folders(root: Path) -> list[Path]:
    """Find folders with an overrides.txt at any depth; sort them by number if all names are numbers, else by name."""
    found = []
    for place, folders, files in os.walk(root):
        if runs.OVERRIDES in files and place != str(root):
            found.append(Path(place))
            folders.clear()  # folders inside a run are not jobs
        folders[:] = [name for name in folders if not name.startswith(".")]
    names = {path: path.relative_to(root).as_posix() for path in found}
    if all(name.isdecimal() for name in names.values()):
        return sorted(found, key=lambda path: int(names[path]))
    return sorted(found, key=lambda path: names[path])


def _job(root: Path, folder: Path, number: int, in_use: set[int] | None) -> JobResult:
    name = shown(folder.relative_to(root).as_posix())
    known: dict[str, Any] = {"name": name, "folder": folder, "number": number}
    try:
        overrides = _checked(folder / runs.OVERRIDES, _MOST_OVERRIDES_BYTES).read_text("utf-8")
        known["overrides"] = tuple(line for line in shown(overrides).split("\n") if line)
        known["settings"] = _settings(folder, _stamp(folder / "config.yaml"), _stamp(folder / "changed.json"))
        known["curve"] = _curve(folder, _stamp(folder / runs.METRICS))
        known |= _outcome(folder, known["curve"], in_use)
    except (LoraFtError, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}: ", "")
        known |= {"state": State.unreadable, "reason": shown(reason)}
    return JobResult(**known)


def _checked(path: Path, most_bytes: int) -> Path:
    untrusted.check_place(path, path.parent)
    if path.stat().st_size > most_bytes:
        raise ConfigError(f"{path} is larger than {most_bytes // 2**20} MiB")
    return path


def _stamp(path: Path) -> tuple[int, int]:
    """Return modification time and size, (0, 0) if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)  # YAML takes 10 ms a file, and a report is written after each job
def _settings(folder: Path, config_stamp: tuple[int, int], changed_stamp: tuple[int, int]) -> dict[str, Any]:
    if config_stamp == (0, 0):
        return {}
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

    Done on each short text: searching a whole page takes a tenth of a second.
    """
    clean = text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return redact.redact(clean)


@functools.lru_cache(maxsize=1024)  # the files of most jobs no longer change
def _curve(folder: Path, stamp: tuple[int, int]) -> Curve:
    path = folder / runs.METRICS
    if not os.path.lexists(path):
        return Curve()
    lines = _checked(path, _MOST_METRICS_BYTES).read_bytes().split(b"\n")
    lines.pop()  # nothing, or a line that is being written
    stride = max(1, math.ceil(len(lines) / _POINTS))
    losses, eval_losses, last_step = [], [], None
    for number, line in enumerate(lines):
        if number % stride and number != len(lines) - 1 and b'"eval_loss"' not in line:
            continue
        last_step, values = _metrics(path, number, line)
        if (loss := finite(values.get("loss"))) is not None:
            losses.append((last_step, loss))
        if (loss := finite(values.get("eval_loss"))) is not None:
            eval_losses.append((last_step, loss))
    return Curve(tuple(losses), tuple(eval_losses), stride, last_step)


def _metrics(path: Path, number: int, line: bytes) -> tuple[int, dict[str, Any]]:
    try:
        values = json.loads(line.decode("utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict) or type(step := values.get("step")) is not int:
        raise ConfigError(f"{path}:{number + 1} is no step: {line[:60].decode('utf-8', 'replace')!r}")
    return step, values


def finite(value: Any) -> float | None:
    """Return the value if it is a number that a float can hold, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def _outcome(folder: Path, curve: Curve, in_use: set[int] | None) -> dict[str, Any]:
    if os.path.lexists(folder / runs.RESULT):
        return _finished(folder)
    if failure := runs.read_failure(folder):
        code = failure.get("exit_code")
        kind, message = (shown(str(failure.get(name, ""))) for name in ("kind", "message"))
        reason = message if message.startswith(kind) else f"{kind}: {message}"
        known = type(code) is int and 0 < code < 256
        return {"state": State.failed, "reason": reason, "exit_code": code if known else 1}
    return _unfinished(folder, curve, in_use)


def _finished(folder: Path) -> dict[str, Any]:
    result = runs.read_result(folder)
    adapter = folder / ADAPTER
    size = adapter.stat().st_size if adapter.is_file() else None
    numbers = {f.name: _number(result, f.name) for f in fields(Figures) if f.name != "adapter_bytes"}
    stopped_by, reason = result.get("stopped_by"), ""
    if stopped_by is not None:
        reason = shown(str(stopped_by))
    elif result.get("stopped_early") is True:
        reason = f"patience at step {numbers['steps']}"
    state = State.stopped if reason else State.finished
    return {"state": state, "reason": reason, "figures": Figures(**numbers, adapter_bytes=size)}


def _number(result: dict[str, Any], name: str) -> Any:
    value = result.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(f"{runs.RESULT}: {name} must be a number, got {str(value)[:60]!r}")
    return finite(value)


def _unfinished(folder: Path, curve: Curve, in_use: set[int] | None) -> dict[str, Any]:
    reason = ""
    if curve.last_step is not None:
        reason = f"step {curve.last_step}{_of_steps(folder)}"
        reason += f", eval loss {curve.eval_losses[-1][1]:.4f}" if curve.eval_losses else ""
    begun = curve.last_step is not None or (folder / "config.yaml").is_file()
    if in_use is None and begun:
        return {"state": State.interrupted, "reason": ", ".join(filter(None, ["or running", reason]))}
    if in_use and folder.stat().st_ino in in_use:
        return {"state": State.running, "reason": reason or "loading"}
    return {"state": State.interrupted if begun else State.waiting, "reason": reason}


def _of_steps(folder: Path) -> str:
    path = folder / runs.CHECK
    if not path.is_file():
        return ""
    untrusted.check_place(path, folder)
    steps = untrusted.json_object(path, ConfigError).get("steps")
    count = steps.get("count") if isinstance(steps, dict) else None
    return f" of {count}" if type(count) is int else ""


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
    return {int(words[5].rpartition(":")[2]) for words in locks if len(words) > 5}
