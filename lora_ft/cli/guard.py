"""Refuse configs that hold code to run, other places to look for configs, or secrets. No torch here.

    callbacks: {mine: {_target_: os.system, ...}}     SecurityError: my.yaml: _target_ ...
    data.system="the key is hf_..."                    SecurityError: data.system holds a Hugging Face token ...

A folder given with --config-dir may come from somebody else. Hydra instantiates its callbacks, launchers and loggers
by the names in a config, and imports the packages of a search path. So a folder of configs may hold settings only, and
each of its files is checked when it is read, before Hydra acts on it. On the command line, a user may choose among the
installed launchers and sweepers by name. The overrides that a sweeper makes for each job are checked as well.
"""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from lora_ft import config
from lora_ft.errors import ConfigError, SecurityError
from lora_ft.io import redact, untrusted

TARGET = "_target_"
_CODE = {TARGET, "custom_search_space"}  # the second names a function that Optuna's sweeper calls
# With these Hydra imports, instantiates, or changes the environment of this process; `overrides` would be settings
# that nobody typed.
_HYDRAS_OWN = {"searchpath", "callbacks", "job_logging", "hydra_logging", "env_set", "env_copy", "overrides"}
_COMMANDS = ("setup", "additional_parameters")  # of a cluster's launcher: what its shell runs, or how
# A reference that OmegaConf resolves late, in a folder's name for each job of a sweep; behind a backslash it is text.
_VARIABLE = re.compile(r"(?<!\\)\$\{\s*oc\.env\s*:\s*['\"]?([^\s,}'\"]+)")
_LOGGING = {"version", "root", "disable_existing_loggers"}  # the keys of Hydra's logging config named none


class Settings(FileConfigSource):
    """Hydra's folder of configs, each file checked when it is read."""

    @staticmethod
    def scheme() -> str:
        return "settings"

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if path.is_file():
            untrusted.check_place(path, Path(self.path))  # a choice may be named ../../elsewhere
            if Path(self.path) != config.CONF:
                _check_file(path)
        return super().load_config(config_path)


def source(folder: Path) -> str:
    """A folder of configs as Hydra's search path names it."""
    SourcesRegistry.instance().register(Settings)
    return f"{Settings.scheme()}://{folder}"


class Loader(ConfigLoaderImpl):
    """Hydra's composition; it checks the words of each job, which may come from a sweeper's settings in a file."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        for parsed in OverridesParser.create().parse_overrides(sweep_overrides):
            word, key = str(parsed.input_line), parsed.key_or_group
            check_override(word, key, parsed.value())
            if "hydra" in re.split(r"[./]", f"{key}.{parsed.package}"):
                raise SecurityError(f"{word}: a job has settings of lora-ft's only; those of Hydra's are the sweep's")
        return super().load_sweep_config(master_config, sweep_overrides)


def _check_file(path: Path) -> None:
    data = path.read_bytes()
    untrusted.check_yaml(data, str(path), ConfigError)
    try:
        root = yaml.compose(data, yaml.SafeLoader)
    except yaml.YAMLError:
        return  # Hydra finds it as well, and says where
    package = re.search(rb"@package\s+(\S+)", data[:512])
    names = [package[1].decode("utf-8", "replace")] if package else []
    for name in [*names, *_keys(root)]:
        if found := (_CODE | _HYDRAS_OWN) & set(re.split(r"[.@/: ]", name)):
            raise SecurityError(
                f"{path}: {found.pop()}: a folder of configs holds settings and choices, never code to run or places "
                "to take it from"
            )


def _keys(root: yaml.Node | None) -> Iterator[str]:
    """The keys of a document's mappings, each once however many aliases lead to it."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield from (str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def check_override(word: str, key: str, value: Any) -> None:
    """SecurityError for an override, as Hydra parsed it, that names code, or another place to look for configs."""
    if key == "hydra.searchpath":
        raise SecurityError(f"{word}: a search path can import packages; give one folder of configs with --config-dir")
    if _CODE & {part for name in [key, *_names(value)] for part in name.split(".")}:
        raise SecurityError(f"{word}: configs name settings and choices, never code to run")


def _names(value: Any) -> Iterator[str]:
    """The keys in a parsed value: of mappings, and of those in lists and sweeps."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield str(name)
            yield from _names(child)
    elif isinstance(inner := getattr(value, "list", value), list):
        for child in inner:
            yield from _names(child)


def check_composed(composed: DictConfig) -> None:
    """Check Hydra's own part of a composed config, and that no part of it, nor a folder to be made, holds a secret."""
    hydra = typing.cast(dict[str, Any], OmegaConf.to_container(composed.hydra, resolve=False))
    if hydra["callbacks"]:
        raise SecurityError(f"hydra.callbacks: {', '.join(hydra['callbacks'])}: lora-ft runs no callbacks of Hydra's")
    for key in ("job_logging", "hydra_logging"):
        if set(hydra[key] or ()) - _LOGGING or hydra[key].get("root"):
            raise SecurityError(f"hydra.{key}: a logging config can name classes to run; lora-ft keeps its own log.txt")
    _check_launcher(hydra["launcher"], hydra["overrides"]["hydra"])
    for name in (*hydra["job"]["env_set"], *hydra["job"]["env_copy"]):
        if redact.is_secret_name(name):
            raise SecurityError(
                f"hydra.job.env_set: {name} would be written in clear to multirun.yaml; "
                "export it before the command instead"
            )
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    for value in _texts(plain):
        for name in _VARIABLE.findall(value):
            if redact.is_secret_name(name):
                raise SecurityError(f"{value[:80]}: the value of {name} would be written to files of the run")
    check_secrets({**plain, "hydra": {}})  # first: hydra's part quotes the words of the line, and is no key of theirs
    check_secrets(hydra, "hydra")
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        check_secrets(str(OmegaConf.select(composed, key)), key)


def _check_launcher(launcher: dict[str, Any], typed: list[str]) -> None:
    """A cluster's launcher writes a shell script: its commands are those that were typed, its values one line each."""
    for key in _COMMANDS:
        if launcher.get(key) and not any(word.lstrip("+").startswith(f"hydra.launcher.{key}") for word in typed):
            raise SecurityError(f"hydra.launcher.{key} is for a shell to run: give it on the command line")
    for text in _texts(launcher):
        if "\n" in text:
            raise SecurityError(f"hydra.launcher: {text!r}: a line of its own would be a command of a shell's script")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def check_secrets(value: Any, key: str = "") -> None:
    """SecurityError where a plain config holds a secret: its files say what the run ran with, and are shared."""
    if isinstance(value, dict):
        for name, child in value.items():
            check_secrets(str(name), key or "the name of a setting")
            check_secrets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for child in value:
            check_secrets(child, key)
    elif isinstance(value, str) and (name := redact.held(value)):
        raise SecurityError(
            f"{key} holds a secret ({name}), which would be written to files of the run: "
            "leave it in the environment, where libraries look for it"
        )
