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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_ft import config, runs, validation
from lora_ft.cli import guard, overrides
from lora_ft.cli.explain import explained
from lora_ft.cli.tasks import Task
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.io import durable

SWEEP_FAILED_IN_PART = 3

# Runs a job, given its config, the absolute run folder, and the overrides as typed.
Main = Callable[[Any, Path, list[str]], float | None]


@dataclass(frozen=True)
class Command:
    """A command line: the command's name, the overrides as typed, and the flags that Hydra knows."""

    verb: str
    words: list[str]
    multirun: bool = False
    config_dir: Path | None = None


def run(command: Command, main: Main, end: Callable[[Path], int]) -> int:
    """Run a command's job, or all jobs of a sweep and then `end`. Return the exit code; raise a single job's error."""
    command = _continued(command)
    with _hydra(command) as (hydra, words):
        composed = _composed(hydra, command, words)
        _check_auto(command, composed)
        guard.check_composed(composed)
        multirun = composed.hydra.mode is RunMode.MULTIRUN
        task = Task(command.verb, main, functools.partial(_checked, command), _implied(command), multirun)
        if command.verb == "sweep":
            return _sweep(hydra, command, composed, words, task, end)
        if command.verb != "train" and not multirun:
            _without_folder(composed, task)
        else:
            if not multirun:
                _checked(command, composed)  # before Hydra makes the run folder
            with durable.writing():  # for the folders that Hydra makes; a job keeps its own errors
                (hydra.multirun if multirun else hydra.run)(command.verb, task, words)
    if not task.failures:
        return 0
    first = task.failures[0]
    if not multirun:
        raise first
    if task.succeeded:
        return SWEEP_FAILED_IN_PART
    return first.exit_code if isinstance(first, LoraFtError) else 1


def compose(verb: str, words: list[str], config_dir: Path | None = None) -> Any:
    """Compose the config of a command as its dataclass; the rules of single settings are checked."""
    if verb not in config.SCHEMAS:
        raise ConfigError(f"{verb} is not a command; there are {', '.join(config.SCHEMAS)}")
    command = Command(verb, words, config_dir=config_dir)
    with _hydra(command) as (hydra, translated):
        composed = _composed(hydra, command, translated)
        guard.check_composed(composed)
        return _checked(command, composed, validation.validate_values)


def _without_folder(composed: DictConfig, task: Task) -> None:
    """Run the job as `Hydra.run` does, without making the folder, to which most commands write nothing."""
    with open_dict(composed.hydra.runtime):
        composed.hydra.runtime.output_dir = str(Path(str(composed.hydra.run.dir)).absolute())
    HydraConfig.instance().set_config(composed)
    with env_override(composed.hydra.job.env_set):
        task(composed)


def _sweep(
    hydra: Hydra, command: Command, composed: DictConfig, words: list[str], task: Task, end: Callable[[Path], int]
) -> int:
    """Run a sweep in its folder, which is locked meanwhile; remove the folder if no job has started."""
    _check_objective(composed)
    with durable.writing():
        folder = Path(str(composed.hydra.sweep.dir)).absolute()
    with runs.locked(folder):
        runs.create_sweep(folder, command.words, command.config_dir, resumed=_folder(command, "resume") == "auto")
        # Fixed here, because Hydra composes each job anew and `${now:...}` would give each another folder.
        place = overrides.translate("sweep", [f"hydra.sweep.dir={validation.escape(str(folder))}"], sweep=False)
        try:
            with durable.writing():
                hydra.multirun("sweep", task, [*words, *place])
        except BaseException:
            if not any(folder.rglob(runs.OVERRIDES)):  # a job writes it first of all
                durable.remove_folder(folder)
            raise
        return end(folder)


def _check_objective(composed: DictConfig) -> None:
    """Check that a sweeper that chooses values itself minimizes, and that each job has a held-out loss to give it."""
    direction = OmegaConf.select(composed, "hydra.sweeper.direction")
    if direction is None:
        return
    if getattr(direction, "name", direction) != "minimize":
        raise ConfigError(f"hydra.sweeper.direction must be minimize, got {direction}: the value is a loss")
    data = composed.data
    if not (data.eval_fraction or data.eval_path or data.eval_split):
        raise ConfigError("data.eval_fraction must be above 0 where a sweeper chooses by the held-out loss, got 0")


def show(command: Command, *, part: str | None, package: str | None, resolve: bool, info: str | None) -> None:
    """Print the composed config, or how it was composed, as Hydra does for --cfg and --info.

    For a sweep, settings that vary between jobs are shown with their default value.
    """
    with _hydra(_continued(command)) as (hydra, words):
        composed = _composed(hydra, command, words)
        parser = OverridesParser.create()
        words = [word for word in words if not parser.parse_override(word).is_sweep_override()]
        if package and package != "_global_" and OmegaConf.select(composed, package) is None:
            raise ConfigError(f"--package {package}: the config has no such part")
        if info:
            hydra.show_info(info, command.verb, words)
        else:
            hydra.show_cfg(command.verb, words, cfg_type=part or "job", package=package, resolve=resolve)


@contextlib.contextmanager
def _hydra(command: Command) -> Iterator[tuple[Hydra, list[str]]]:
    """Set up Hydra with our schemas, our `conf/` and the user's folder; yield it with the overrides to parse."""
    version.setbase("1.3")
    store = ConfigStore.instance()
    store.store(f"{command.verb}_schema", config.SCHEMAS[command.verb])
    search_path = create_config_search_path(guard.source(config.CONF))
    if command.config_dir:
        if not command.config_dir.is_dir():
            raise ConfigError(f"--config-dir {command.config_dir} is not a folder")
        search_path.prepend(provider="--config-dir", path=guard.source(command.config_dir.resolve()), anchor="schema")
    GlobalHydra.instance().clear()
    try:
        store.store("stored_run", _stored_run(command))
        hydra = Hydra(task_name=command.verb, config_loader=guard.Loader(search_path))
        GlobalHydra.instance().initialize(hydra)
        mode = ["hydra.mode=MULTIRUN"] if command.multirun else []
        translated = overrides.translate(command.verb, command.words, sweep=command.multirun)
        yield hydra, [*_implied(command), *translated, *mode]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _explained(command, error) from error
    finally:
        GlobalHydra.instance().clear()


def _explained(command: Command, error: Exception) -> LoraFtError:
    if isinstance(error.__cause__, LoraFtError):
        return error.__cause__  # raised by our launcher, which Hydra makes
    stored = Path(_resumed(command) or _folder(command, "run") or "") / "config.yaml"
    return explained(command.verb, error, stored, command.config_dir)


def _continued(command: Command) -> Command:
    """Return the command that began a sweep for resume=FOLDER, so that its jobs continue or start in their folders."""
    folder = _folder(command, "resume")
    if command.verb != "sweep" or folder in (None, "auto"):
        return command
    place = Path(folder).absolute()
    stored, config_dir = runs.read_sweep(place)
    given = [word for word in command.words if not word.startswith("resume=")]
    if several := [w for w in given if not w.startswith("hydra.launcher.")]:
        raise ConfigError(
            f"resume={folder} runs what is missing of that sweep, with its own words: leave out {several[0]}"
        )
    kept = [w for w in stored if not w.startswith(("resume=", "hydra.sweep.dir="))]
    words = [*kept, *given, "resume=auto", f"hydra.sweep.dir={validation.escape(str(place))}"]
    return Command("sweep", words, multirun=True, config_dir=config_dir)


def _check_auto(command: Command, composed: DictConfig) -> None:
    """Check that resume=auto has a folder that is the same next time; the default folder's name holds the time."""
    if _folder(command, "resume") != "auto":
        return
    group = "sweep" if composed.hydra.mode is RunMode.MULTIRUN else "run"
    folder = typing.cast(dict[str, Any], OmegaConf.to_container(composed.hydra[group], resolve=False))["dir"]
    if "${now:" in folder:
        raise ConfigError(f"resume=auto needs a folder that stays the same: hydra.{group}.dir=DIR, got {folder}")


def _implied(command: Command) -> list[str]:
    """Return the overrides that follow from those typed.

    resume=FOLDER implies the run folder. A typed model.path is another base, so it clears the id and revision that
    come from a default, an experiment or a run.
    """
    if folder := _resumed(command):
        return overrides.translate(command.verb, [f"hydra.run.dir={validation.escape(folder)}"], sweep=False)
    typed = {key for key in ("model", "model.path", "model.id", "model.revision")
             if overrides.chosen(command.words, key) is not None}  # fmt: skip
    if "model.path" not in typed or "model" in typed:
        return []
    return [f"{key}=null" for key in ("model.id", "model.revision") if key not in typed]


def _stored_run(command: Command) -> dict[str, Any]:
    """Return the settings taken from run=FOLDER or resume=FOLDER, without the groups that the user chose anew."""
    schema = config.SCHEMAS[command.verb]
    if folder := _resumed(command):
        shared = {f.name for f in dataclasses.fields(schema)} - {"resume"}
    else:
        folder, shared = _folder(command, "run"), set(validation.groups(schema))
    stored = runs.read_config(Path(folder)) if folder else {}
    return {name: validation.escape(stored[name]) for name in shared
            if name in stored and overrides.chosen(command.words, name) is None}  # fmt: skip


def _resumed(command: Command) -> str | None:
    """Return the absolute folder of resume=FOLDER; None for resume=auto."""
    folder = _folder(command, "resume")
    if folder in (None, "auto"):
        return None
    if command.multirun:
        raise ConfigError(f"resume={folder} continues one run: leave out -m")
    if overrides.chosen(command.words, "hydra.run.dir") is not None:
        raise ConfigError(f"resume={folder} goes on in that folder: leave out hydra.run.dir, or write resume=auto")
    if typed := [w for w in command.words if w.startswith(("experiment=", "+")) and not w.startswith("+hydra")]:
        raise ConfigError(f"resume={folder} keeps the settings of that run: leave out {typed[0]}")
    return str(Path(folder).absolute())


def _folder(command: Command, key: str) -> str | None:
    value = overrides.chosen(command.words, key)
    if value in (None, "", "null") or overrides.declared(command.verb, key) is None:
        return None
    return validation.expand_home(value)


def _composed(hydra: Hydra, command: Command, words: list[str]) -> DictConfig:
    mode = RunMode.MULTIRUN if command.multirun else RunMode.RUN
    composed: DictConfig = hydra.compose_config(command.verb, words, run_mode=mode)
    container = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    for key in _keys({name: node for name, node in container.items() if name != "hydra"}):
        if guard.TARGET in key.split("."):
            raise overrides.unknown(command.verb, key)
    return composed


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield f"{prefix}{name}"
            yield from _keys(child, f"{prefix}{name}.")


def _checked(command: Command, composed: DictConfig, check: Callable[[Any], None] = validation.validate) -> Any:
    """Convert a composed config to the command's dataclass and check its rules; raises ConfigError."""
    schema = config.SCHEMAS[command.verb]
    names = [str(name) for name in composed if name != "hydra"]
    for name in names:
        if name not in {f.name for f in dataclasses.fields(schema)}:
            raise overrides.unknown(command.verb, name)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.masked_copy(composed, names)))
    except OmegaConfBaseException as error:
        raise _explained(command, error) from error
    validation.locate_paths(cfg)
    check(cfg)
    guard.check_secrets(validation.to_plain(cfg))
    return cfg
