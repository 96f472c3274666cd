"""Help pages, rendered from `config.py` and `conf/` without Hydra, in a tenth of a second. No torch here.

settings of adapter.*
  adapter.r=16                rank (integer)
  ...
"""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lora_ft import config, validation
from lora_ft.cli import choices

WIDTH = 100
_COLUMN = 34

_FLAGS = {
    "-m, --multirun": "the same as lora-ft sweep: one job for each combination of values",
    "--config-dir DIR": "a folder of your own choices, laid out like conf/ (DIR/experiment/mine.yaml)",
    "--cfg job": "show the composed config and stop; with --resolve and --package adapter as well",
    "--info defaults": "show how it was composed and stop; also: config, searchpath, plugins",
    "-h, --help": "show this page and stop",
}


def overview() -> str:
    """Return the page of `lora-ft --help`: the commands and first steps."""
    commands = [_row(command, _summary(schema)) for command, schema in config.SCHEMAS.items()]
    return "\n".join([
        "usage: lora-ft COMMAND key=value ...", "", "Train small adapters over frozen GPT models.", "",
        "commands", *commands, "",
        _row("lora-ft COMMAND --help", "choices and settings of a command"),
        _row("lora-ft --version", "version of this package"),
        _row('eval "$(lora-ft -sc install=bash)"', "complete commands, settings and choices with the Tab key"),
        "", "first steps", "  lora-ft train experiment=demo", "  lora-ft sweep experiment=demo adapter.r=2,4,8",
        "  lora-ft train model=qwen3_0_6b quant=nf4 data=chat data.path=my.jsonl",
    ]) + "\n"  # fmt: skip


def page(command: str, more: Sequence[Path] = ()) -> str:
    """Return the page of `lora-ft COMMAND --help`; `more` are the folders of --config-dir."""
    schema = config.SCHEMAS[command]
    lines = [f"usage: lora-ft {command} [choice=NAME ...] [setting=VALUE ...]", "", _summary(schema), ""]
    lines += [_row(flag, text) for flag, text in _FLAGS.items()]
    for group, default in choices.groups(command).items():
        lines += ["", f"choices of {group}" + (f" (default: {default})" if default else "")]
        lines += [_row(f"{group}={name}", text) for name, text in choices.of(group, more).items()]
    lines += _settings(validation.settings(schema))
    if command == "sweep":
        lines += _settings(validation.settings(config.Launcher, "hydra.launcher."))
    return "\n".join(lines) + "\n"


def type_words(annotation: Any) -> str:
    """Return the type of a setting in words that follow "must be": "an integer", "one of fp4, nf4"."""
    if isinstance(annotation, types.UnionType) and {int, str} <= set(typing.get_args(annotation)):
        return "an integer or auto"  # the only text that such a setting allows
    if annotation is Any:
        return "a list like [a,b], a mapping like {a:b} or auto"  # data.labels
    kind = required(annotation)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text",
             list: "a list like [a,b]", dict: "a mapping like {a:b}"}  # fmt: skip
    return words[typing.get_origin(kind) or kind]


def required(annotation: Any) -> Any:
    """Return the type without its `| None`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def show(value: Any) -> str:
    """Return a value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    return str(value)


def _settings(settings: Iterable[validation.Setting]) -> Iterator[str]:
    section = None
    for setting in settings:
        group = setting.key.rpartition(".")[0]
        if group != section:
            section = group
            yield ""
            yield f"settings of {group}.*" if group else "settings"
        kind = type_words(setting.type).removeprefix("an ").removeprefix("a ")
        unit = f", {setting.unit}" if setting.unit else ""
        yield _row(f"{setting.key}={show(setting.default)}", f"{setting.meaning} ({kind}{unit})")


def _summary(schema: type) -> str:
    assert dataclasses.is_dataclass(schema) and schema.__doc__
    return schema.__doc__.splitlines()[0]


def _row(left: str, right: str) -> str:
    indent = " " * (_COLUMN + 2)
    head = f"  {left:<{_COLUMN - 1}} " if len(left) < _COLUMN else f"  {left}\n{indent}"
    body = textwrap.wrap(right, WIDTH - len(indent), break_on_hyphens=False) or [""]
    return (head + f"\n{indent}".join(body)).rstrip()
