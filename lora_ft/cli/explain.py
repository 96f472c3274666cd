"""Explain errors of Hydra and OmegaConf: the file if it is not the command line, the setting, the rule. No torch.

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
from lora_ft.errors import ConfigError, LoraFtError


def explained(command: str, error: Exception, stored: Path, config_dir: Path | None) -> LoraFtError:
    """Return the error to show; `stored` is the config of the run on the line, `config_dir` the user's folder."""
    inner = error.__cause__ or error.__context__
    cause = inner if isinstance(error, HydraException) and isinstance(inner, OmegaConfBaseException) else error
    if isinstance(error, UnicodeDecodeError):
        # Hydra does not say which file it read: it is the user's file with this text.
        files = sorted(config_dir.rglob("*.yaml")) if config_dir else []
        found = next((file for file in files if error.object in file.read_bytes()), stored)
        return ConfigError(f"{found} is not UTF-8")
    if isinstance(error, yaml.YAMLError):
        return ConfigError(" ".join(str(error).split()).replace('"<unicode string>"', str(stored)))
    place = re.match(r"In '([^']+)'", str(error))
    where = f"{place[1]}.yaml: " if place and place[1] not in (command, "hydra/config") else ""
    where = where.replace("stored_run.yaml", str(stored))
    if isinstance(error, MissingConfigException):
        return ConfigError(where + _missing(error))
    key = str(getattr(cause, "full_key", None) or "")
    group = place[1].rpartition("/")[0] if place else ""
    if (
        group
        and group not in validation.groups(config.SCHEMAS[command])
        and (key == group or f"@{group}." in str(error))
    ):
        return ConfigError(f"{where}its first line must be '# @package _global_'")
    if key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        unknown = overrides.unknown(command, key)
        return type(unknown)(where + str(unknown))
    return ConfigError(where + _broken_rule(command, key, error, str(cause).splitlines()[0]))


def _broken_rule(command: str, key: str, error: Exception, reason: str) -> str:
    if unset := re.search(r"Environment variable '(.*)' not found", reason):
        return f"{key}: the environment variable {unset[1]} is not set"
    setting = overrides.declared(command, key.partition("[")[0])
    if setting is None:
        return f"{key}: {reason}" if key else reason
    rule = help.type_words(setting.type if key == setting.key else typing.get_args(setting.type)[-1])
    typed = re.match(r"Error merging override [^=]*=(.*)", str(error), re.DOTALL)
    value = typed or re.search(r"[Vv]alue '(.*?)'(?: of type|,)", reason)
    return f"{key} must be {rule}, " + (f"got {value[1]}" if value else f"but: {reason}")


def _missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if error.options:
        return f"{group}={choice}: choose one of {', '.join(sorted(error.options))}"
    return f"{error.missing_cfg_file}: no such file in the folders of configs"
