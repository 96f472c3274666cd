"""Compose and check the config of a command through Hydra, and run its job or jobs. No torch here.

    overrides -> overrides.translate -> Hydra composes conf/ over the schema -> dataclass -> validate -> the command

This module calls `Hydra` instead of `hydra.main`, which prints its own reports (exit 1, "Error executing job with
overrides", advice to add a '+') and exits. An error that a user can act on becomes a LoraFtError; any other is a bug
of ours and keeps its traceback.
"""

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import env_override
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_ft import config, metric_table, mixing, runs, validation
from lora_ft.cli import guard, overrides
from lora_ft.cli.explain import explained
from lora_ft.cli.tasks import Task
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.io import durable

SWEEP_FAILED_IN_PART = 3

# Runs a job, given its config, the absolute run folder, and the overrides as typed.
Main = Callable[[Any, Path, list[str]], float | None]


@dataclass(frozen=True)
class CommandLine:
    """A command line: the command's name, the overrides as typed, and the flags that Hydra knows."""

    command: str
    overrides: list[str]
    multirun: bool = False
    config_dir: Path | None = None


class Composed(typing.NamedTuple):
    """Hydra, set up for a command line; the config that it composed, and the overrides that it got."""

    hydra: Hydra
    config: DictConfig
    translated: list[str]


def run(line: CommandLine, main: Main, end: Callable[[Path], int]) -> int:
    """Run a command's job, or all jobs of a sweep and then `end`. Return the exit code; raise a single job's error."""
    line = _resumed_sweep(line)
    with composing(line) as (hydra, composed, translated):
        _check_auto(line, composed)
        guard.check_composed(composed)
        multirun = composed.hydra.mode is RunMode.MULTIRUN
        task = Task(line.command, main, functools.partial(checked, line), implied(line), multirun)
        if line.command == "sweep":
            return _sweep(hydra, line, composed, translated, task, end)
        if multirun:
            with durable.writing():  # for the folders that Hydra makes; a job keeps its own errors
                hydra.multirun(line.command, task, translated)
        else:
            _run_job(composed, task)
    if not task.failures:
        return 0
    first = task.failures[0]
    if not multirun:
        raise first
    if task.succeeded:
        return SWEEP_FAILED_IN_PART
    return first.exit_code if isinstance(first, LoraFtError) else 1


def compose(command: str, typed: list[str], config_dir: Path | None = None) -> Any:
    """Compose the config of a command as its dataclass; the rules of single settings are checked."""
    if command not in config.SCHEMAS:
        raise ConfigError(f"{command} is not a command; there are {', '.join(config.SCHEMAS)}")
    line = CommandLine(command, typed, config_dir=config_dir)
    with composing(line) as (_, composed, _):
        guard.check_composed(composed)
        return checked(line, composed, validation.validate_values)


def _run_job(composed: DictConfig, task: Task) -> None:
    """Run the job as `Hydra.run` does, but without making its folder, which most commands do not use."""
    with open_dict(composed.hydra.runtime):
        composed.hydra.runtime.output_dir = str(Path(str(composed.hydra.run.dir)).absolute())
    HydraConfig.instance().set_config(composed)
    with env_override(composed.hydra.job.env_set):
        task(composed)


def _sweep(
    hydra: Hydra, line: CommandLine, composed: DictConfig, translated: list[str], task: Task, end: Callable[[Path], int]
) -> int:
    """Run a sweep in its folder, which is locked meanwhile; remove the folder if no job has started."""
    _check_sweep(composed)
    with durable.writing():
        folder = Path(str(composed.hydra.sweep.dir)).absolute()
    with runs.locked(folder):
        runs.create_sweep(folder, line.overrides, line.config_dir, resumed=_folder(line, "resume") == "auto")
        # Fixed here, because Hydra composes each job anew and `${now:...}` would give each another folder.
        fixed = overrides.translate("sweep", [f"hydra.sweep.dir={validation.escape(str(folder))}"], sweep=False)
        try:
            with durable.writing():
                hydra.multirun("sweep", task, [*translated, *fixed])
        except BaseException:
            if not any(folder.rglob(runs.OVERRIDES)):  # the first file of a job
                durable.remove_folder(folder)
            raise
        return end(folder)


def _check_sweep(composed: DictConfig) -> None:
    """Check that halving has a launcher that does it, and that a sweeper has the direction of its metric."""
    launcher = composed.hydra.runtime.choices["hydra/launcher"]
    if composed.sweep.halving and launcher != "lora_ft":
        raise ConfigError(
            f"sweep.halving=true needs hydra/launcher=lora_ft, got {launcher}: "
            "other launchers train each job in a process of its own, to its end"
        )
    direction = OmegaConf.select(composed, "hydra.sweeper.direction")
    if direction is None:
        return
    metric = composed.train.best_metric
    expected = "maximize" if metric_table.cost(metric, 1.0) < 0 else "minimize"
    if (given := getattr(direction, "name", direction)) != expected:
        raise ConfigError(f"hydra.sweeper.direction must be {expected}, got {given}: the value is train.best_metric="
                          f"{metric}")  # fmt: skip
    if not mixing.has_eval_rows(composed.data):
        raise ConfigError("data.eval_fraction must be above 0 if a sweeper chooses values by the eval loss, got 0")


def show(line: CommandLine, *, part: str | None, package: str | None, resolve: bool, info: str | None) -> None:
    """Print the composed config, or how it was composed, as Hydra does for --cfg and --info.

    For a sweep, settings that vary between jobs are shown with their default value.
    """
    with composing(_resumed_sweep(line)) as (hydra, composed, translated):
        parser = OverridesParser.create()
        single = [o for o in translated if not parser.parse_override(o).is_sweep_override()]
        if package and package != "_global_" and OmegaConf.select(composed, package) is None:
            raise ConfigError(f"--package {package}: the config has no such part")
        if info:
            hydra.show_info(info, line.command, single)
        else:
            hydra.show_cfg(line.command, single, cfg_type=part or "job", package=package, resolve=resolve)


@contextlib.contextmanager
def composing(line: CommandLine) -> Iterator[Composed]:
    """Set up Hydra with our schemas, our `conf/` and the user's folder, and compose the config of a command line.

    Hydra's own global state is restored at the end: a program that calls lora_ft may be a Hydra app itself.
    """
    before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg, version.VersionBase.instance().version_base
    version.setbase("1.3")
    store = ConfigStore.instance()
    store.store(f"{line.command}_schema", config.SCHEMAS[line.command])
    search_path = create_config_search_path(guard.source(config.CONF))
    if line.config_dir:
        if not line.config_dir.is_dir():
            raise ConfigError(f"--config-dir {line.config_dir} is not a folder")
        search_path.prepend(provider="--config-dir", path=guard.source(line.config_dir.resolve()), anchor="schema")
    GlobalHydra.instance().clear()
    try:
        store.store("stored_run", _stored_run(line))
        hydra = Hydra(task_name=line.command, config_loader=guard.Loader(search_path))
        GlobalHydra.instance().initialize(hydra)
        translated = [*implied(line), *overrides.translate(line.command, line.overrides, sweep=line.multirun)]
        translated += ["hydra.mode=MULTIRUN"] if line.multirun else []
        mode = RunMode.MULTIRUN if line.multirun else RunMode.RUN
        yield _composed(hydra, line.command, translated, mode)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explained(line, error) from error
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg, version.VersionBase.instance().version_base = before


def _composed(hydra: Hydra, command: str, translated: list[str], mode: RunMode) -> Composed:
    """Compose the config; data@data.sources.NAME=CHOICE replaces the choice of an experiment, or is added."""
    try:
        return Composed(hydra, hydra.compose_config(command, translated, run_mode=mode), translated)
    except ConfigCompositionException as error:
        if (added := overrides.added(translated, error)) is None:
            raise
        return _composed(hydra, command, added, mode)


def _explained(line: CommandLine, error: Exception) -> LoraFtError:
    if isinstance(error.__cause__, LoraFtError):
        return error.__cause__  # raised by our launcher, which Hydra makes
    return explained(line.command, error, Path(_resumed(line) or _folder(line, "run") or "") / "config.yaml")


def _resumed_sweep(line: CommandLine) -> CommandLine:
    """Return for `sweep resume=FOLDER` the command that began that sweep, with resume=auto in its folder."""
    folder = _folder(line, "resume")
    if line.command != "sweep" or folder in (None, "auto"):
        return line
    absolute = Path(folder).absolute()
    stored, config_dir = runs.read_sweep(absolute)
    added = [o for o in line.overrides if not o.startswith("resume=")]
    if refused := [o for o in added if not o.startswith("hydra.launcher.")]:
        raise ConfigError(
            f"resume={folder} runs the unfinished jobs of that sweep, with its own overrides: leave out {refused[0]}"
        )
    kept = [o for o in stored if not o.startswith(("resume=", "hydra.sweep.dir="))]
    if overrides.chosen(added, "hydra.launcher.executor") is not None:  # which refuses the settings of another
        kept = [o for o in kept if o.startswith("hydra.launcher.share_base=") or not o.startswith("hydra.launcher.")]
    typed = [*kept, *added, "resume=auto", f"hydra.sweep.dir={validation.escape(str(absolute))}"]
    return CommandLine("sweep", typed, multirun=True, config_dir=config_dir)


def _check_auto(line: CommandLine, composed: DictConfig) -> None:
    """Check that resume=auto has a folder that is the same next time; the default folder's name holds the time."""
    if _folder(line, "resume") != "auto":
        return
    group = "sweep" if composed.hydra.mode is RunMode.MULTIRUN else "run"
    folder = typing.cast(dict[str, Any], OmegaConf.to_container(composed.hydra[group], resolve=False))["dir"]
    if "${now:" in folder:
        raise ConfigError(f"resume=auto needs a folder that stays the same: hydra.{group}.dir=DIR, got {folder}")


def implied(line: CommandLine) -> list[str]:
    """Return the overrides that follow from those typed.

    resume=FOLDER implies the run folder. A typed model.path names a different base, so it clears the hub id and
    revision that come from a default, an experiment or a run.
    """
    if folder := _resumed(line):
        return overrides.translate(line.command, [f"hydra.run.dir={validation.escape(folder)}"], sweep=False)
    typed = {key for key in ("model", "model.path", "model.hub_id", "model.revision")
             if overrides.chosen(line.overrides, key) is not None}  # fmt: skip
    if "model.path" not in typed or "model" in typed:
        return []
    return [f"{key}=null" for key in ("model.hub_id", "model.revision") if key not in typed]


def _stored_run(line: CommandLine) -> dict[str, Any]:
    """Return the settings taken from run=FOLDER or resume=FOLDER, without the groups that the user chose anew."""
    schema = config.SCHEMAS[line.command]
    if folder := _resumed(line):
        shared = {f.name for f in dataclasses.fields(schema)} - {"resume"}
    else:
        folder, shared = _folder(line, "run"), set(validation.groups(schema))
    if not folder:
        return {}
    try:
        stored = runs.read_config(Path(folder))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}/config.yaml is not valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    return {name: validation.escape(stored[name]) for name in shared
            if name in stored and overrides.chosen(line.overrides, name) is None}  # fmt: skip


def _resumed(line: CommandLine) -> str | None:
    """Return the absolute folder of resume=FOLDER; None for resume=auto."""
    folder = _folder(line, "resume")
    if folder in (None, "auto"):
        return None
    if line.multirun:
        raise ConfigError(f"resume={folder} continues one run: leave out -m")
    if overrides.chosen(line.overrides, "hydra.run.dir") is not None:
        raise ConfigError(f"resume={folder} continues in that folder: leave out hydra.run.dir, or write resume=auto")
    if refused := [o for o in line.overrides if o.startswith(("experiment=", "+")) and not o.startswith("+hydra")]:
        raise ConfigError(f"resume={folder} keeps the settings of that run: leave out {refused[0]}")
    return str(Path(folder).absolute())


def _folder(line: CommandLine, key: str) -> str | None:
    """Return the typed folder of run= or resume=; None if it was not typed or the command has no such setting."""
    value = overrides.chosen(line.overrides, key)
    if value in (None, "", "null") or overrides.declared(line.command, key) is None:
        return None
    return validation.expand_home(value)


def checked(line: CommandLine, composed: DictConfig, check: Callable[[Any], None] = validation.validate) -> Any:
    """Convert a composed config to the command's dataclass and check its rules; raises ConfigError."""
    schema = config.SCHEMAS[line.command]
    names = [str(name) for name in composed if name != "hydra"]
    for name in names:
        if name not in {f.name for f in dataclasses.fields(schema)}:
            raise overrides.unknown(line.command, name)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.masked_copy(composed, names)))
    except OmegaConfBaseException as error:
        raise _explained(line, error) from error
    validation.locate_paths(cfg)
    check(cfg)
    guard.check_secrets(validation.to_plain(cfg))
    return cfg
