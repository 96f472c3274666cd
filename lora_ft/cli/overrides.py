r"""Translate the overrides that a user typed for Hydra: check keys, quote free text and paths. No torch here.

    typed                                  handed to Hydra
    prompt=What's 2+2, and why?            prompt='What\'s 2+2, and why?'
    data.columns.source=English text       ++data.columns.source='English text'
    data.sources.chat.max_rows=9           ++data.sources.chat.max_rows=9
    adapter.rr=4                           ConfigError: adapter.rr is not a setting; nearest: adapter.r

The value of a text setting is taken literally, with quotes and `${...}`. There are two exceptions: `null` is no value
if the setting is optional, and in a sweep `choice(a,b)` is several values (Hydra's notation).
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from lora_ft import config, mixing, validation
from lora_ft.cli import choices, guard, help, several
from lora_ft.errors import ConfigError

# Settings of Hydra that hold free text as well; `${now:...}` keeps its meaning in them.
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_PARAMS = "hydra.sweeper.params"
_OVERRIDE = re.compile(r"(?P<prefix>\+\+?|~)?(?P<key>[^=]*)(?P<equals>=)?(?P<value>.*)", re.DOTALL)
_NAME = re.compile(r"[\w/-]*")
_SOURCE = re.compile(rf"(data\.sources\.{mixing.NAME}\.)(.+)")
_CHOICE_OF_SOURCE = re.compile(rf"data@data\.sources\.{mixing.NAME}")


def translate(command: str, typed: list[str], *, sweep: bool) -> list[str]:
    """Return the overrides for Hydra; raises ConfigError for one that is not a setting, a choice or a value."""
    parser = OverridesParser.create()
    made = []
    for override in typed:
        found = _parsable(command, override, _translated(command, override, sweep), parser, sweep)
        made += [*_cleared(command, found, parser), found]
    return made


def _cleared(command: str, translated: str, parser: OverridesParser) -> list[str]:
    """Return the override that removes the earlier value of data.labels: Hydra would merge two mappings."""
    parsed = parser.parse_override(translated)
    key, prefix = parsed.key_or_group, "++" if parsed.is_force_add() else ""
    setting = declared(command, key)
    return [f"{prefix}{key}=null"] if setting and setting.key == key and _takes_all(setting) else []


def names_several(command: str, typed: list[str]) -> bool:
    """Return True if an override names several values, as in adapter.r=4,8; other errors are left to `translate`."""
    parser = OverridesParser.create()
    for override in typed:
        try:
            [parsed] = parser.parse_overrides([_translated(command, override, sweep=False)])
        except (ConfigError, OverrideParseException):
            continue
        if parsed.is_sweep_override() and not parsed.key_or_group.startswith("hydra"):
            return True
    return False


def as_typed(command: str, translated: Iterable[str]) -> Iterator[str]:
    """Undo `translate` for overrides that Hydra reports, so that they can be typed again."""
    reported = OverridesParser.create().parse_overrides(list(translated))
    for number, parsed in enumerate(reported):
        key, value = parsed.key_or_group, parsed.value()
        setting = declared(command, key)
        if value is None and setting and _takes_all(setting) and _is_set_next(reported, number):
            continue
        if isinstance(value, str) and (setting is None or _is_text(setting, key)):
            text = OmegaConf.create({"text": value})["text"]  # undoes the escapes
        else:
            text = parsed.get_value_string()
        package = f"@{parsed.package}" if parsed.package else ""
        yield f"{'+' if parsed.is_add() else ''}{key}{package}={text}"


def added(translated: list[str], error: Exception) -> list[str] | None:
    """Return the overrides with the choice of a source that no file has made as an addition; None for other errors."""
    match = re.match(r"Could not override '([^']+)'", str(error))
    if not (match and _CHOICE_OF_SOURCE.fullmatch(match[1])):
        return None
    return [f"+{override}" if override.startswith(f"{match[1]}=") else override for override in translated]


def _is_set_next(overrides: list[Override], number: int) -> bool:
    return number + 1 < len(overrides) and overrides[number + 1].key_or_group == overrides[number].key_or_group


def chosen(typed: list[str], key: str) -> str | None:
    """Return the value typed for a key, the last if there are several; None if there is no such override."""
    found = [m["value"] for m in map(_split, typed) if m["key"] == key and m["equals"]]
    return found[-1] if found else None


def unknown(command: str, key: str) -> ConfigError:
    """Return the error for a key that is not a setting, with the nearest that is one."""
    if now := config.RENAMED.get(key):
        return ConfigError(f"{key} was renamed: it is now {now}")
    names = [s.key for s in validation.settings(config.SCHEMAS[command])] + list(choices.groups(command))
    if of_source := _SOURCE.fullmatch(key):
        names = [of_source[1] + name for name in mixing.settings_of_a_source()]
    near = _nearest(key, names)
    return ConfigError(f"{key} is not a setting" + (f"; nearest: {near}" if near else f" of lora-ft {command}"))


def _translated(command: str, override: str, sweep: bool) -> str:
    parts = _split(override)
    prefix, key, value = parts["prefix"] or "", parts["key"], parts["value"]
    if key.startswith(("hydra.", "hydra/")):
        return _of_hydra(override, prefix, key, value) if parts["equals"] else override
    if prefix == "~":
        raise ConfigError(f"{override}: a setting cannot be deleted; give it a value")
    if not parts["equals"] or not key:
        raise ConfigError(f"{override!r} is not of the form key=value")
    setting = declared(command, key)
    if setting is None:
        if key in choices.groups(command):
            if value.startswith("["):
                several.check_single(override, key, value, command)
            return f"{key}={_quoted(value) if _NAME.fullmatch(value) else value}"
        if _CHOICE_OF_SOURCE.fullmatch(key) and "data" in choices.groups(command):
            return f"{prefix}{key}={value}"
        if prefix and _NAME.fullmatch(key):
            return override  # a group of the user's own folder; Hydra reports one that it does not know
        raise unknown(command, key)
    if _is_text(setting, key):
        # The settings of the run that run= names are read before Hydra splits a sweep, so it has one value.
        value = _text(override, value, setting, sweep and key != "run")
    elif _is_single(setting):
        several.check_single(override, key, value, command)
        if (values := several.values_of_choice(value)) and "null" in values:
            value = ",".join(values)
    if not (_is_mapping(setting) or _SOURCE.fullmatch(key)):
        return f"{key}={value}"
    # Hydra adds keys to a mapping only with '++', and reads the dots of a layer's name as nesting unless in braces.
    name = key[len(setting.key) + 1 :]
    return f"++{setting.key}={{{name}:{value}}}" if "." in name else f"++{key}={value}"


def _of_hydra(override: str, prefix: str, key: str, value: str) -> str:
    if key in _HYDRA_FOLDERS:
        return f"{prefix}{key}={_quoted(value)}"
    # Hydra cannot override inside of a mapping that is null, but merges a mapping around it. Its values are text.
    if key == _PARAMS:
        return f"++hydra.sweeper={{params:{value}}}"
    if key.startswith(f"{_PARAMS}."):
        return f"++hydra.sweeper={{params:{{{key[len(_PARAMS) + 1 :]}:{_quoted(value)}}}}}"
    return override


def _parsable(command: str, override: str, translated: str, parser: OverridesParser, sweep: bool) -> str:
    """Return a translated override; raises ConfigError if Hydra cannot parse it, or outside of a sweep has several."""
    try:
        [parsed] = parser.parse_overrides([translated])
    except OverrideParseException as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{override} cannot be parsed: {reason} (inside brackets, put text into quotes)") from error
    guard.check_override(override, parsed.key_or_group, parsed.value())
    setting = declared(command, parsed.key_or_group)
    if setting and not (_is_single(setting) or _is_mapping(setting) or _takes_all(setting)):
        _check_lists(override, setting.key, parsed, sweep)
    if parsed.is_sweep_override() and not sweep:
        advice = "lora-ft sweep trains with each of them"
        if setting and typing.get_origin(setting.type) is list:
            advice = f"write {setting.key}=[{parsed.get_value_string()}]"
        raise ConfigError(f"{override} names several values: {advice}")
    return translated


def _check_lists(override: str, key: str, parsed: Override, sweep: bool) -> None:
    """Raise ConfigError for a list of lists, and for a sweep over the elements of a list."""
    values, found = parsed.get_value_string(), parsed.value()
    if isinstance(found, list) and any(isinstance(element, list) for element in found):
        raise ConfigError(f"{override}: {key} takes one list; a sweep over several lists is {key}={values[1:-1]}")
    if sweep and isinstance(found, ChoiceSweep) and not all(isinstance(value, list | None) for value in found.list):
        raise ConfigError(
            f"{override}: {key} takes a list: {key}=[{values}] is one list, and "
            f"{','.join(f'[{value}]' for value in values.split(','))} after {key}= runs each"
        )


def _text(override: str, value: str, setting: validation.Setting, sweep: bool) -> str:
    if value == "null" and help.required(setting.type) is not setting.type:
        return value
    if value == "???":
        raise ConfigError(f"{override}: '???' means a missing value to Hydra and cannot be given as text")
    if sweep and (values := several.values_of_choice(value)) is not None:
        is_optional = help.required(setting.type) is not setting.type
        return several.translated_choice(values, is_optional, lambda text: _quoted(validation.escape(text)))
    if sweep and re.search(r",\S", value):
        key = _split(override)["key"]
        raise ConfigError(f"{override}: one text or several? {key}=choice({value}) runs each, "
                          f"{key}=choice({_quoted(value)}) is one")  # fmt: skip
    return _quoted(validation.escape(value))


def _split(override: str) -> re.Match[str]:
    match = _OVERRIDE.fullmatch(override)
    assert match  # the pattern takes any string
    return match


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def declared(command: str, key: str) -> validation.Setting | None:
    """Return the setting of this key, or the mapping that has the key as an entry; None if it is unknown.

    A setting of a source is that of `data` by another key.
    """
    settings = validation.settings(config.SCHEMAS[command])
    if of_source := _SOURCE.fullmatch(key):
        inner = of_source[2].partition(".")[0]
        settings = (dataclasses.replace(s, key=of_source[1] + inner) for s in settings
                    if s.key == f"data.{inner}" and inner not in mixing.OF_THE_MIX)  # fmt: skip
    for setting in settings:
        if setting.key == key or (_is_mapping(setting) and key.startswith(f"{setting.key}.")):
            return setting
    return None


def _is_single(setting: validation.Setting) -> bool:
    return not _takes_all(setting) and typing.get_origin(help.required(setting.type)) not in (list, dict)


def _takes_all(setting: validation.Setting) -> bool:
    """Return True for a setting that may be a text, a list or a mapping, as data.labels."""
    return setting.type is typing.Any


def _is_mapping(setting: validation.Setting) -> bool:
    return typing.get_origin(setting.type) is dict


def _is_text(setting: validation.Setting, key: str) -> bool:
    if _is_mapping(setting):  # its entries may be text; as a whole it is in Hydra's notation
        return setting.key != key and (setting.text or typing.get_args(setting.type)[-1] is str)
    return setting.text


def _nearest(key: str, names: list[str]) -> str | None:
    """Return the nearest name: with the same last part if there is one, else similar as a whole or in that part."""
    last = {name: name.rpartition(".")[2] for name in names}
    tail = key.rpartition(".")[2]
    same_tail = [name for name in names if last[name] == tail]
    close = difflib.get_close_matches(key, same_tail or names, n=1, cutoff=0.0 if same_tail else 0.6)
    by_tail = difflib.get_close_matches(tail, last.values(), n=1, cutoff=0.7)
    return next(iter(close or [name for name in names if last[name] in by_tail]), None)
