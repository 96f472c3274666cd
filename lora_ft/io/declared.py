"""Whether the values of a file are of the types that a library's dataclass declares.

{"r": "16"}   r: int                               -> r must be int, got '16'
{"r": 16}     target_modules: list[str] | str ...  -> fits

PEFT takes the types of its settings for granted: it fails on others with any exception, or much later, or never.
"""

import dataclasses
import functools
import types
import typing
from pathlib import Path
from typing import Any

from lora_ft.errors import MismatchError


def check(path: Path, fields: dict[str, Any], kind: type) -> None:
    """MismatchError for a value of JSON that cannot be what the dataclass `kind` declares under its name."""
    hints = _hints(kind)
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            expected = hints[name].__name__ if isinstance(hints[name], type) else str(hints[name])
            raise MismatchError(f"{path}: {name} must be {expected.replace('typing.', '')}, got {value!r}"[:300])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Numbers count as one type, any text as a choice, and a mapping as the dataclass that may be left out."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(isinstance(value, dict) if dataclasses.is_dataclass(o) else _fits(value, o) for o in inner)
    if kind is typing.Literal:
        return isinstance(value, str)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return is_number(value)
    if hint in (bool, str, dict, types.NoneType):
        return isinstance(value, hint)
    return kind is tuple and isinstance(value, list)
