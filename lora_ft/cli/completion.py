r"""Completion for bash: commands, groups and their choices, settings and their values, files. No torch here.

lora-ft tr<TAB>                  train
lora-ft train quant=<TAB>        fp4  int8  nf4  none
lora-ft train adapter.<TAB>      adapter.r=  adapter.lora_alpha=  ...
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

from lora_ft import config, mixing, validation
from lora_ft.cli import choices, help

# COMP_WORDBREAKS lists the characters after which readline begins the word that it replaces: '=' and ':' unless a user
# removed them. Scripts of other tools remove '=' for the whole shell; this one passes the list on unchanged.
SCRIPT = r"""
_lora_ft() {
    local IFS=$'\n'
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" lora-ft -sc query=bash))
}
complete -o nospace -F _lora_ft lora-ft
""".lstrip()

_FLAGS = ("--multirun", "--config-dir", "--cfg", "--info", "--help")
_HYDRA = ("hydra.run.dir=", "hydra.sweep.dir=")
_SOURCE = re.compile(rf"data\.sources\.{mixing.NAME}\.")
_CHOICE_OF_SOURCE = re.compile(rf"data@data\.sources\.{mixing.NAME}")


def reply(line: str, word_breaks: str) -> list[str]:
    """Return the completions of a command line, cut to the part that readline replaces."""
    *before, typed = line.split(" ")
    cut = max((typed.rfind(mark) for mark in "=:" if mark in word_breaks), default=-1) + 1
    return [_escaped(c)[cut:] for c in candidates([argument for argument in before[1:] if argument], typed)]


def candidates(before: list[str], typed: str) -> list[str]:
    """Return the completions of `typed` after the arguments in `before`; a complete argument ends with a blank."""
    command = next((argument for argument in before if argument in config.SCHEMAS), None)
    if before and before[-1] in ("--config-dir", "-cd"):
        found: Iterable[str] = _files("", typed)
    elif command is None:
        found = [f"{name} " for name in (*config.SCHEMAS, "--help", "--version")]
    elif "=" in typed:
        key, _, value = typed.partition("=")
        own = [Path(folder) for flag, folder in itertools.pairwise(before) if flag in ("--config-dir", "-cd")]
        found = _values(command, key, value, own)
    else:
        found = _keys(command, typed)
    return [c for c in found if c.startswith(typed)]


def _keys(command: str, typed: str) -> Iterator[str]:
    schema = config.SCHEMAS[command]
    if typed.startswith("-"):
        yield from (f"{flag} " for flag in _FLAGS)
    elif typed.startswith("hydra."):
        yield from _HYDRA
    elif of_source := _SOURCE.match(typed):
        yield from (f"{of_source[0]}{name}=" for name in mixing.settings_of_a_source())
    elif "." in typed:
        yield from (f"{s.key}=" for s in validation.settings(schema))
    else:
        yield from (f"{group}=" for group in choices.groups(command))
        yield from (f"{group}." for group in validation.groups(schema))
        yield from (f"{s.key}=" for s in validation.settings(schema) if "." not in s.key)


def _values(command: str, key: str, typed: str, more: list[Path]) -> Iterator[str]:
    group = "data" if _CHOICE_OF_SOURCE.fullmatch(key) else key
    if group in choices.groups(command):
        yield from (f"{key}={name} " for name in choices.of(group, more))
        return
    declared = _SOURCE.sub("data.", key)
    setting = next((s for s in validation.settings(config.SCHEMAS[command]) if s.key == declared), None)
    kind = help.required(setting.type) if setting else None
    if f"{key}=" in _HYDRA or (setting and setting.text):
        yield from _files(f"{key}=", typed)
    elif kind is bool:
        yield from (f"{key}=true ", f"{key}=false ")
    elif isinstance(kind, type) and issubclass(kind, Enum):
        yield from (f"{key}={name} " for name in kind.__members__)
    elif setting:
        yield f"{key}={help.show(setting.default)} "


def _files(prefix: str, typed: str) -> Iterator[str]:
    parent = typed[: typed.rfind("/") + 1]
    try:
        for entry in sorted(Path(parent or ".").expanduser().iterdir()):
            if not entry.name.startswith(".") or typed[len(parent) :].startswith("."):
                yield f"{prefix}{parent}{entry.name}" + ("/" if entry.is_dir() else " ")
    except OSError:  # no such folder, or not readable: no candidates
        return


def _escaped(candidate: str) -> str:
    """Escape a candidate for bash, except the blank at its end."""
    text = candidate.removesuffix(" ")
    return re.sub(r"([^\w./=:,@%+~-])", r"\\\1", text) + candidate[len(text) :]
