r"""Translate the overrides that a user typed for Hydra: check keys, quote free text and paths. No torch here.

    typed                                  handed to Hydra
    prompt=What's 2+2, and why?            prompt='What\'s 2+2, and why?'
    data.columns.source=English text       ++data.columns.source='English text'
    adapter.rr=4                           ConfigError: adapter.rr is not a setting; nearest: adapter.r

The value of a text setting is taken literally, with quotes and `${...}`. There are two exceptions: `null` is no value
if the setting is optional, and in a sweep `choice(a,b)` is several values (Hydra's notation).
"""

import difflib
import re
import typing
from collections.abc import Iterable, Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from lora_ft import config, validation
from lora_ft.cli import choices, guard, help
from lora_ft.errors import ConfigError, SecurityError

# Folders of Hydra's that hold free text as well; `${now:...}` keeps its meaning in them.
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
_PARAMS = "hydra.sweeper.params"
_WORD = re.compile(r"(?P<prefix>\+\+?|~)?(?P<key>[^=]*)(?P<equals>=)?(?P<value>.*)", re.DOTALL)
_NAME = re.compile(r"[\w/-]*")
_CHOICE = re.compile(r"choice\(.*\)", re.DOTALL)


def translate(command: str, words: list[str], *, sweep: bool) -> list[str]:
    """The overrides that Hydra parses; ConfigError for one that is not a setting, a choice or a value."""
    parser = OverridesParser.create()
    return [_parsable(command, word, _translated(command, word, sweep), parser, sweep) for word in words]


def as_typed(command: str, overrides: Iterable[str]) -> Iterator[str]:
    """Undo `translate` for overrides that Hydra reports, so that they can be typed again."""
    for parsed in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = parsed.key_or_group, parsed.value()
        setting = declared(command, key)
        if isinstance(value, str) and (setting is None or _is_text(setting, key)):
            typed = OmegaConf.create({"text": value})["text"]  # undoes the escapes
        else:
            typed = parsed.get_value_string()
        yield f"{'+' if parsed.is_add() else ''}{key}={typed}"


def chosen(words: list[str], key: str) -> str | None:
    """The value typed for a key; the last one counts."""
    found = [m["value"] for m in map(_split, words) if m["key"] == key and m["equals"]]
    return found[-1] if found else None


def unknown(command: str, key: str) -> ConfigError | SecurityError:
    """The error for a key that no setting has, with the nearest that one has."""
    if guard.TARGET in key.split("."):
        return SecurityError(f"{key}: configs name settings and choices, never code to run")
    if now := config.RENAMED.get(key):
        return ConfigError(f"{key} was renamed: it is now {now}")
    names = [s.key for s in validation.settings(config.SCHEMAS[command])] + list(choices.groups(command))
    near = _nearest(key, names)
    return ConfigError(f"{key} is not a setting" + (f"; nearest: {near}" if near else f" of lora-ft {command}"))


def _translated(command: str, word: str, sweep: bool) -> str:
    parts = _split(word)
    prefix, key, value = parts["prefix"] or "", parts["key"], parts["value"]
    if key.startswith(("hydra.", "hydra/")):
        return _hydras(word, prefix, key, value) if parts["equals"] else word
    if prefix == "~":
        raise ConfigError(f"{word}: a setting cannot be deleted; give it a value")
    if not parts["equals"] or not key:
        raise ConfigError(f"{word!r} is not of the form key=value")
    setting = declared(command, key)
    if setting is None:
        if key in choices.groups(command):
            return f"{key}={_quoted(value) if _NAME.fullmatch(value) else value}"
        if prefix and _NAME.fullmatch(key) and key != guard.TARGET:
            return word  # a group of the user's own folder, or nothing that Hydra knows either
        raise unknown(command, key)
    if _is_text(setting, key):
        # the settings of the one run that run= names are read before Hydra knows of several
        value = _text(word, value, setting, sweep and key != "run")
    if not _is_mapping(setting):
        return f"{key}={value}"
    # Hydra closes mappings to new keys but for '++', and takes the dots of a layer's name for nesting but in braces
    name = key[len(setting.key) + 1 :]
    return f"++{setting.key}={{{name}:{value}}}" if "." in name else f"++{key}={value}"


def _hydras(word: str, prefix: str, key: str, value: str) -> str:
    if key in _HYDRA_FOLDERS:
        return f"{prefix}{key}={_quoted(value)}"
    # Hydra can neither make nor reach into a mapping that is null, but merges one around it; values are text to it
    if key == _PARAMS:
        return f"++hydra.sweeper={{params:{value}}}"
    if key.startswith(f"{_PARAMS}."):
        return f"++hydra.sweeper={{params:{{{key[len(_PARAMS) + 1 :]}:{_quoted(value)}}}}}"
    return word


def _parsable(command: str, word: str, override: str, parser: OverridesParser, sweep: bool) -> str:
    try:
        [parsed] = parser.parse_overrides([override])
    except OverrideParseException as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{word} cannot be read: {reason} (inside brackets, put text into quotes)") from error
    guard.check_override(word, parsed.key_or_group, parsed.value())
    if parsed.is_sweep_override() and not sweep:
        setting = declared(command, parsed.key_or_group)
        advice = "add -m to run each of them"
        if setting and typing.get_origin(setting.type) is list:
            advice = f"write {setting.key}=[{parsed.get_value_string()}]"
        raise ConfigError(f"{word} names several values: {advice}")
    return override


def _text(word: str, value: str, setting: validation.Setting, sweep: bool) -> str:
    if value == "null" and help.required(setting.type) is not setting.type:
        return value
    if value == "???":
        raise ConfigError(f"{word}: '???' alone stands for a missing value and cannot be given as text")
    if sweep and _CHOICE.fullmatch(value):
        return value
    if sweep and re.search(r",\S", value):
        key = _split(word)["key"]
        raise ConfigError(f"{word}: one text or several? {key}=choice({value}) runs each, "
                          f"{key}=choice({_quoted(value)}) is one")  # fmt: skip
    return _quoted(validation.escape(value))


def _split(word: str) -> re.Match[str]:
    match = _WORD.fullmatch(word)
    assert match  # the pattern takes any string
    return match


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def declared(command: str, key: str) -> validation.Setting | None:
    """The setting of this key, or the mapping that the key is an entry of."""
    for setting in validation.settings(config.SCHEMAS[command]):
        if setting.key == key or (_is_mapping(setting) and key.startswith(f"{setting.key}.")):
            return setting
    return None


def _is_mapping(setting: validation.Setting) -> bool:
    return typing.get_origin(setting.type) is dict


def _is_text(setting: validation.Setting, key: str) -> bool:
    return setting.text or (setting.key != key and typing.get_args(setting.type)[-1] is str)


def _nearest(key: str, names: list[str]) -> str | None:
    last = {name: name.rpartition(".")[2] for name in names}
    tail = key.rpartition(".")[2]
    same_tail = [name for name in names if last[name] == tail]
    close = difflib.get_close_matches(key, same_tail or names, n=1, cutoff=0.0 if same_tail else 0.6)
    by_tail = difflib.get_close_matches(tail, last.values(), n=1, cutoff=0.7)
    return next(iter(close or [name for name in names if last[name] in by_tail]), None)
