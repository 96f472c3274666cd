"""Convert the settings of a command to plain values and back. No torch here.

to_plain(cfg), from_plain(TrainRun, plain)  # {"model": {"path": ..., "dtype": "auto", ...}, ...} and back
"""

import dataclasses
import re
from enum import Enum
from typing import Any, TypeVar, cast

from lora_ft.errors import ConfigError

Config = TypeVar("Config")


def to_plain(cfg: Any) -> dict[str, Any]:
    """Convert a config to plain dicts, lists and scalars, with enums by name, as in config.yaml."""
    return {f.name: plain_value(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def plain_value(value: Any) -> Any:
    """Convert the value of a setting to plain values; keys of mappings become texts, as in JSON."""
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, dict):
        return {str(key).lower() if isinstance(key, bool) else str(key): plain_value(v) for key, v in value.items()}
    return value.value if isinstance(value, Enum) else value


def from_plain(schema: type[Config], plain: dict[str, Any], prefix: str = "") -> Config:
    """Rebuild a config from the result of `to_plain`; missing settings get their defaults.

    Raises ConfigError for an unknown setting and for a value of another type; `prefix` precedes its key.
    """
    from omegaconf import OmegaConf  # 0.1 s, which help and completion do not need
    from omegaconf.errors import OmegaConfBaseException

    try:
        made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), escape(plain)))
    except OmegaConfBaseException as error:
        key, reason = getattr(error, "full_key", None) or "", str(error).splitlines()[0]
        value: Any = plain
        for part in filter(None, key.split(".")):
            value = value.get(part) if isinstance(value, dict) else value
        if "is not a ListConfig" in reason:
            reason = "must be a list"
        raise ConfigError(f"{prefix}{key or schema.__name__}: {reason}, got {value!r}") from error
    return cast(Config, made)


def typed(cfg: Any, schema: type[Config]) -> Config:
    """Return a copy of a config with checked types; raises ConfigError. An enum may be given by its name."""
    if type(cfg) is not schema:
        raise ConfigError(f"cfg must be a {schema.__name__} of lora_ft.compose, got {type(cfg).__name__}")
    return from_plain(schema, to_plain(cfg))


def escape(value: Any) -> Any:
    r"""Make `${` literal text to OmegaConf (`\${`) in a string, or in all strings of lists and mappings."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [escape(item) for item in value]
    return {key: escape(item) for key, item in value.items()} if isinstance(value, dict) else value
