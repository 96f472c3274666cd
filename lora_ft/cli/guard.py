"""Refuse configs that hold code to run, search paths or secrets. No torch here.

    callbacks: {mine: {_target_: os.system, ...}}     SecurityError: my.yaml: _target_ ...
    data.system="the key is hf_..."                    SecurityError: data.system holds a secret (...)

A folder given with --config-dir may come from somebody else. Hydra instantiates callbacks, launchers and loggers by the
names in a config, and imports the packages of a search path. So a folder of configs may hold settings only, and each of
its files is checked when it is read, before Hydra acts on it. On the command line, a user may choose among the
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

_CODE = {"_target_", "custom_search_space"}  # the second names a function that Optuna's sweeper calls
_HYDRA_CODE = {"searchpath", "callbacks", "job_logging", "hydra_logging"}  # of hydra.*: names of modules and classes
# A file may not hold these either: they change this process's environment, or pretend that a user typed something.
_TYPED_ONLY = {"env_set", "env_copy", "overrides"}
_LOGGING = {"version", "root", "disable_existing_loggers"}  # what Hydra's choice `none` sets
_COMMANDS = ("setup", "additional_parameters", "extra")  # of a cluster's launcher: shell commands and their options
# A reference that OmegaConf resolves late, in a folder's name for each job of a sweep; behind a backslash it is text.
_VARIABLE = re.compile(r"(?<!\\)\$\{\s*oc\.env\s*:\s*['\"]?([^\s,}'\"]+)")
_SEPARATORS = re.compile(r"[.@/: ]")


class Settings(FileConfigSource):
    """A folder of configs as a source of Hydra; each file is checked when it is read."""

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
    """Return the name of a folder of configs in Hydra's search path."""
    SourcesRegistry.instance().register(Settings)
    return f"{Settings.scheme()}://{folder}"


class Loader(ConfigLoaderImpl):
    """Hydra's composition; it checks the overrides of each job, which a sweeper may take from a file."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        for parsed in OverridesParser.create().parse_overrides(sweep_overrides):
            override, key = str(parsed.input_line), parsed.key_or_group
            check_override(override, key, parsed.value())
            if "hydra" in re.split(r"[./]", f"{key}.{parsed.package}"):
                raise SecurityError(f"{override}: a sweeper may set settings of lora-ft only, not of Hydra")
        return super().load_sweep_config(master_config, sweep_overrides)


def _check_file(path: Path) -> None:
    data = path.read_bytes()
    untrusted.check_yaml(data, str(path), ConfigError)
    try:
        text = data.decode("utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except yaml.YAMLError:
        return  # Hydra reports it as well, with file and line
    package = re.search(r"@package\s+(\S+)", text[:512])
    for name in [*([package[1]] if package else []), *_keys(root), *_defaults(root)]:
        if found := (_CODE | _HYDRA_CODE | _TYPED_ONLY) & set(_SEPARATORS.split(name)):
            raise SecurityError(f"{path}: {found.pop()}: a folder of configs holds settings and choices, {_NEVER}")


def _defaults(root: yaml.Node | None) -> Iterator[str]:
    """Yield the texts of a document's defaults list: /group/choice@package."""
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            yield from (str(node.value) for node in value.value if isinstance(node, yaml.ScalarNode))


_NEVER = "never code to run or places to import it from"


def _keys(root: yaml.Node | None) -> Iterator[str]:
    """Yield the keys of all mappings of a document; aliases are followed once."""
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


def check_override(override: str, key: str, value: Any) -> None:
    """Raise SecurityError for an override, parsed by Hydra, that names code or a search path."""
    refused = _CODE | (_HYDRA_CODE if key.startswith("hydra") else set())
    if found := refused & {part for name in [key, *_names(value)] for part in _SEPARATORS.split(name)}:
        raise SecurityError(f"{override}: {found.pop()}: overrides name settings and choices, {_NEVER}")


def _names(value: Any) -> Iterator[str]:
    """Yield the keys of all mappings in a parsed value, in lists and sweeps as well."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield str(name)
            yield from _names(child)
    elif isinstance(inner := getattr(value, "list", value), list):
        for child in inner:
            yield from _names(child)


def check_composed(composed: DictConfig) -> None:
    """Check that a composed config runs no shell command that nobody typed, and writes no secret to any file."""
    hydra = typing.cast(dict[str, Any], OmegaConf.to_container(composed.hydra, resolve=False))
    # Also checked in each file and override; a name that both accept must still not reach Hydra, which runs these.
    if hydra["callbacks"]:
        raise SecurityError(f"hydra.callbacks: lora-ft runs no callbacks of Hydra, got {', '.join(hydra['callbacks'])}")
    for key in ("job_logging", "hydra_logging"):
        if set(hydra[key] or ()) - _LOGGING or (hydra[key] or {}).get("root"):
            raise SecurityError(f"hydra.{key}: a logging config can name classes to run, {_NEVER}")
    _check_launcher(hydra["launcher"], hydra["overrides"]["hydra"])
    for name in (*hydra["job"]["env_set"], *hydra["job"]["env_copy"]):
        if redact.is_secret_name(name):
            raise SecurityError(
                f"hydra.job.env_set: the value of {name} would be written to multirun.yaml; "
                "export it before the command instead"
            )
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    for value in _texts(plain):
        for name in _VARIABLE.findall(value):
            if redact.is_secret_name(name):
                raise SecurityError(f"{value[:80]}: the value of {name} would be written to files of the run")
    # Our settings first: Hydra's part quotes the command line, and an error should name the setting.
    check_secrets({**plain, "hydra": {}})
    check_secrets(hydra, "hydra")
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        check_secrets(str(OmegaConf.select(composed, key)), key)


def _check_launcher(launcher: dict[str, Any], typed: list[str]) -> None:
    """Check what a cluster's launcher writes into a shell script: typed commands only, and values of one line."""
    for key in _COMMANDS:
        if launcher.get(key) and not any(o.lstrip("+").startswith(f"hydra.launcher.{key}") for o in typed):
            raise SecurityError(
                f"hydra.launcher.{key} holds shell commands: give it on the command line, not in a file"
            )
    for text in _texts(launcher):
        if "\n" in text:
            raise SecurityError(
                f"hydra.launcher: {text!r} has several lines, which would be commands in a shell script"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def check_secrets(value: Any, key: str = "") -> None:
    """Raise SecurityError if a plain config holds a secret: config.yaml would store it, and is shared."""
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
            "keep it in an environment variable that the library reads itself"
        )
