"""Explain errors of Hydra and OmegaConf: name the file, the setting and its rule. No torch here.

Value 'abc' of type 'str' could not be converted to Integer    ->    adapter.r must be an integer, got abc
"""

import re
import typing
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lora_ft import config, validation
from lora_ft.cli import help, overrides
from lora_ft.errors import ConfigError


def explained(command: str, error: Exception, stored: Path) -> ConfigError:
    """Return the error to show; `stored` is the config of the run that run= or resume= names."""
    if isinstance(error, yaml.YAMLError):
        return ConfigError(" ".join(str(error).split()))
    inner = error.__cause__ or error.__context__
    cause = inner if isinstance(error, HydraException) and isinstance(inner, OmegaConfBaseException) else error
    source = match[1] if (match := re.match(r"In '([^']+)'", str(error))) else ""
    where = f"{source}.yaml: " if source not in ("", command, "hydra/config") else ""
    where = where.replace("stored_run.yaml", str(stored))
    if isinstance(error, MissingConfigException):
        return ConfigError(where + _missing(error))
    key, group = str(getattr(cause, "full_key", None) or ""), source.rpartition("/")[0]
    is_experiment = group and group not in validation.groups(config.SCHEMAS[command])
    if is_experiment and (key == group or f"@{group}." in str(error)):
        return ConfigError(f"{where}its first line must be '# @package _global_'")
    if key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return ConfigError(where + str(overrides.unknown(command, key)))
    return ConfigError(where + _broken_rule(command, key, error, str(cause).splitlines()[0]))


def _broken_rule(command: str, key: str, error: Exception, reason: str) -> str:
    if unset := re.search(r"Environment variable '(.*)' not found", reason):
        return f"{key}: the environment variable {unset[1]} is not set"
    typed = re.match(r"Error merging override \+*([^=]*)=(.*)", str(error), re.DOTALL)
    setting = overrides.declared(command, key.partition("[")[0])
    if setting is None and typed:  # the key of an entry of a mapping, without that of the mapping
        key = typed[1]
        setting = overrides.declared(command, key)
    if setting is None:
        return f"{key}: {reason}" if key else reason
    rule = help.type_words(setting.type if key == setting.key else typing.get_args(setting.type)[-1])
    value = typed[2] if typed else (match := re.search(r"[Vv]alue '(.*?)'(?: of type|,)", reason)) and match[1]
    return f"{key} must be {rule}, " + (f"got {value}" if value is not None else f"but: {reason}")


def _missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if error.options:
        return f"{group}={choice}: choose one of {', '.join(sorted(error.options))}"
    return f"{error.missing_cfg_file}: no such file in the folders of configs"
