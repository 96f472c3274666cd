"""One call of a verb through Hydra: compose, check, run its job or jobs, and say what went wrong. No torch here.

    words -> overrides.translate -> Hydra composes conf/ over the schema -> dataclasses -> rules.validate -> verb

Hydra's own reports (exit 1, "Error executing job with overrides", advice to add a '+') never appear: what a user can
act on becomes a LoraFtError, and everything else is a bug of ours, which keeps its traceback. This is why `Hydra` is
called here in the place of `hydra.main`, which prints and exits by itself.
"""

import contextlib
import dataclasses
import re
import sys
import traceback
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
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lora_ft import config, durable, rules, runs
from lora_ft.cli import guard, help, overrides
from lora_ft.errors import ConfigError, LoraFtError, ResourceError

SWEEP_FAILED_IN_PART = 3
# what saves memory, by the setting that says so; a verb is advised of those that it has
_SAVINGS = {
    "train.tokens_per_microbatch": "lower train.tokens_per_microbatch",
    "train.checkpoint": "set train.checkpoint=every_1 or quant=nf4",
    "eval.tokens_per_microbatch": "lower eval.tokens_per_microbatch",
    "sampling.max_new_tokens": "lower sampling.max_new_tokens",
}

# what runs a job: its config, the absolute run folder, the overrides as typed
Main = Callable[[Any, Path, list[str]], float | None]


@dataclass(frozen=True)
class Command:
    """What a user called: the verb, the overrides as typed, and the flags that Hydra knows."""

    verb: str
    words: list[str]
    multirun: bool = False
    config_dir: Path | None = None


@dataclass
class Outcomes:
    """How the jobs of one call ended."""

    succeeded: int = 0
    failures: list[Exception] = dataclasses.field(default_factory=list)


def run(command: Command, main: Main) -> int:
    """Run the verb's job, or all jobs of a sweep; the exit code. A single job's own error is raised."""
    outcomes = Outcomes()
    with _hydra(command) as (hydra, words):
        composed = _composed(hydra, command, words)
        _check_auto(command, composed)
        guard.check_composed(composed)
        if composed.hydra.mode is RunMode.MULTIRUN:
            with durable.writing():  # the folders, which Hydra makes; what goes wrong in a job is kept by the job
                hydra.multirun(command.verb, _job(command, main, outcomes, report=True), words)
            return _sweep_code(outcomes)
        _checked(command, composed)  # before Hydra makes the run folder
        with durable.writing():
            hydra.run(command.verb, _job(command, main, outcomes, report=False), words)
    if outcomes.failures:
        raise outcomes.failures[0]
    return 0


def show(command: Command, *, part: str | None, package: str | None, resolve: bool, info: str | None) -> None:
    """Print the composed config, or how it came about, as Hydra does for --cfg and --info."""
    with _hydra(command) as (hydra, words):
        composed = _composed(hydra, command, words)
        if package and package != "_global_" and OmegaConf.select(composed, package) is None:
            raise ConfigError(f"--package {package}: the config has no such part")
        if info:
            hydra.show_info(info, command.verb, words)
        else:
            hydra.show_cfg(command.verb, words, cfg_type=part or "job", package=package, resolve=resolve)


@contextlib.contextmanager
def _hydra(command: Command) -> Iterator[tuple[Hydra, list[str]]]:
    """Hydra with our schemas, our `conf/` and the user's folder, and the overrides it is to parse."""
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
        hydra = Hydra.create_main_hydra2(task_name=command.verb, config_search_path=search_path)
        mode = ["hydra.mode=MULTIRUN"] if command.multirun else []
        translated = overrides.translate(command.verb, command.words, sweep=command.multirun)
        yield hydra, [*_implied(command), *translated, *mode]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _explained(command, error) from error
    finally:
        GlobalHydra.instance().clear()


def _check_auto(command: Command, composed: DictConfig) -> None:
    """resume=auto needs a folder that is the same when the command is given again; the default holds the time."""
    if _folder(command, "resume") != "auto":
        return
    group = "sweep" if composed.hydra.mode is RunMode.MULTIRUN else "run"
    folder = typing.cast(dict[str, Any], OmegaConf.to_container(composed.hydra[group], resolve=False))["dir"]
    if "${now:" in folder:
        raise ConfigError(f"resume=auto needs a folder that stays the same: hydra.{group}.dir=DIR, got {folder}")


def _implied(command: Command) -> list[str]:
    """What the words say without saying it: the folder of a run to resume, and that a typed model.path is another base.

    The id and revision of a default, an experiment or a run are not that base's own.
    """
    if folder := _resumed(command):
        return overrides.translate(command.verb, [f"hydra.run.dir={overrides.escape(folder)}"], sweep=False)
    typed = {key for key in ("model", "model.path", "model.id", "model.revision")
             if overrides.chosen(command.words, key) is not None}  # fmt: skip
    if "model.path" not in typed or "model" in typed:
        return []
    return [f"{key}=null" for key in ("model.id", "model.revision") if key not in typed]


def _stored_run(command: Command) -> dict[str, Any]:
    """What the verb shares with run=FOLDER or resume=FOLDER, without the groups that the user chose anew."""
    schema = config.SCHEMAS[command.verb]
    if folder := _resumed(command):
        shared = {f.name for f in dataclasses.fields(schema)} - {"resume"}
    else:
        folder, shared = _run(command), set(rules.groups(schema))
    stored = runs.read_config(Path(folder)) if folder else {}
    return {name: overrides.escape(stored[name]) for name in shared
            if name in stored and overrides.chosen(command.words, name) is None}  # fmt: skip


def _run(command: Command) -> str | None:
    """The folder of run=FOLDER, for the verbs that have it."""
    return _folder(command, "run")


def _resumed(command: Command) -> str | None:
    """The folder of resume=FOLDER, absolute; resume=auto names none."""
    folder = _folder(command, "resume")
    if folder in (None, "auto"):
        return None
    if command.multirun:
        raise ConfigError(f"resume={folder} continues one run: without -m, or resume=auto with hydra.sweep.dir=DIR")
    if overrides.chosen(command.words, "hydra.run.dir") is not None:
        raise ConfigError(f"resume={folder} goes on in that folder: leave out hydra.run.dir, or write resume=auto")
    if typed := [w for w in command.words if w.startswith(("experiment=", "+")) and not w.startswith("+hydra")]:
        raise ConfigError(f"resume={folder} keeps the settings of that run: leave out {typed[0]}")
    return str(Path(folder).absolute())


def _folder(command: Command, key: str) -> str | None:
    value = overrides.chosen(command.words, key)
    if value in (None, "", "null") or overrides.declared(command.verb, key) is None:
        return None
    return rules.expand_home(value)


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


def _checked(command: Command, composed: DictConfig) -> Any:
    """The composed config as the verb's dataclass, its rules checked; ConfigError."""
    schema = config.SCHEMAS[command.verb]
    names = [str(name) for name in composed if name != "hydra"]
    for name in names:
        if name not in {f.name for f in dataclasses.fields(schema)}:
            raise overrides.unknown(command.verb, name)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.masked_copy(composed, names)))
    except OmegaConfBaseException as error:
        raise _explained(command, error) from error
    rules.locate_paths(cfg)
    rules.validate(cfg)
    guard.check_secrets(rules.to_plain(cfg))
    return cfg


def _job(command: Command, main: Main, outcomes: Outcomes, *, report: bool) -> Callable[[DictConfig], float | None]:
    """The task that Hydra calls once for each job; it keeps failures, because Hydra reports them its own way."""

    def task(composed: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        listed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        own = [word for word in typing.cast(list[str], listed) if word not in _implied(command)]
        typed = list(overrides.as_typed(command.verb, own))
        try:
            result = main(_checked(command, composed), Path(hydra.runtime.output_dir), typed)
        except Exception as error:
            failure = _out_of_memory(command.verb, error) or error
            outcomes.failures.append(failure)
            if report:
                _report(f"job {hydra.job.num} ({' '.join(typed)})", failure)
            return None
        outcomes.succeeded += 1
        return result

    return task


def _out_of_memory(verb: str, error: Exception) -> ResourceError | None:
    """Memory that did not suffice, with what saves some; torch, which is not imported here, is known by its names."""
    on_gpu = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not (on_gpu or on_cpu or isinstance(error, MemoryError)):
        return None
    known = {setting.key for setting in rules.settings(config.SCHEMAS[verb])}
    advice = ", or ".join(words for key, words in _SAVINGS.items() if key in known) or "use a machine with more of it"
    reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
    # without the error as its cause, whose frames would keep the model in memory for the next jobs of a sweep
    return ResourceError(f"out of memory{f' ({reason})' if reason else ''}: {advice}")


def _report(job: str, failure: Exception) -> None:
    if isinstance(failure, LoraFtError):
        sys.stderr.write(f"{job}: {failure}\n")
    else:
        sys.stderr.write(f"{job}:\n{''.join(traceback.format_exception(failure))}")


def _sweep_code(outcomes: Outcomes) -> int:
    if not outcomes.failures:
        return 0
    first = outcomes.failures[0]
    alone = first.exit_code if isinstance(first, LoraFtError) else 1
    return SWEEP_FAILED_IN_PART if outcomes.succeeded else alone


def _explained(command: Command, error: Exception) -> LoraFtError:
    """The error of Hydra or OmegaConf in our words: the file if it is not the command line, the setting, the rule."""
    verb, inner = command.verb, error.__cause__ or error.__context__
    cause = inner if isinstance(error, HydraException) and isinstance(inner, OmegaConfBaseException) else error
    stored = f"{_resumed(command) or _run(command)}/config.yaml"
    if isinstance(error, UnicodeDecodeError):
        return ConfigError(f"{_holder(command, error.object)} is not UTF-8")
    if isinstance(error, yaml.YAMLError):
        return ConfigError(" ".join(str(error).split()).replace('"<unicode string>"', stored))
    place = re.match(r"In '([^']+)'", str(error))
    where = f"{place[1]}.yaml: " if place and place[1] not in (verb, "hydra/config") else ""
    where = where.replace("stored_run.yaml", stored)
    if isinstance(error, MissingConfigException):
        return ConfigError(where + _missing(error))
    key = str(getattr(cause, "full_key", None) or "")
    group = place[1].rpartition("/")[0] if place else ""
    if group and group not in rules.groups(config.SCHEMAS[verb]) and (key == group or f"@{group}." in str(error)):
        return ConfigError(f"{where}its first line must be '# @package _global_'")
    if key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        found = overrides.unknown(verb, key)
        return type(found)(where + str(found))
    reason = str(cause).splitlines()[0]
    if unset := re.search(r"Environment variable '(.*)' not found", reason):
        return ConfigError(f"{where}{key}: the environment variable {unset[1]} is not set")
    setting = overrides.declared(verb, key.partition("[")[0])
    if setting:
        rule = help.type_words(setting.type if key == setting.key else typing.get_args(setting.type)[-1])
        typed = re.match(r"Error merging override [^=]*=(.*)", str(error), re.DOTALL)
        value = typed or re.search(r"[Vv]alue '(.*?)'(?: of type|,)", reason)
        return ConfigError(f"{where}{key} must be {rule}, " + (f"got {value[1]}" if value else f"but: {reason}"))
    return ConfigError(where + (f"{key}: {reason}" if key else reason))


def _holder(command: Command, text: bytes) -> Path:
    """The file, of those that a user may have written, that holds this text; Hydra does not say which it read."""
    files = sorted(command.config_dir.rglob("*.yaml")) if command.config_dir else []
    stored = Path(_resumed(command) or _run(command) or "") / "config.yaml"
    return next((file for file in files if text in file.read_bytes()), stored)


def _missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if error.options:
        return f"{group}={choice}: choose one of {', '.join(sorted(error.options))}"
    return f"{error.missing_cfg_file}: no such file in the folders of configs"
