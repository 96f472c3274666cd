"""Checks of files from other people, made before a library reads them. No torch here.

check_folder(folder)                                    no link leads out of it, nothing in it is a pipe or a device
json_object(path, ConfigError)                          {"model_type": "llama", ...}
tensor_header(path, 10**7, MismatchError)               the safetensors header, which must match the file exactly
check_yaml(data, "my.yaml", ConfigError)                no tags that build objects, limited size and depth
check_types(path, fields, LoraConfig, MismatchError)    values of the types that a dataclass declares
is_hub_id("owner/name")                                 the form of hub ids

A malformed file raises the given error type; content that only an attack would have raises SecurityError.
"""

import dataclasses
import json
import os
import re
import struct
import types
import typing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import LoraFtError, SecurityError

MOST_JSON_BYTES = 16 * 2**20
MOST_YAML_BYTES = 2**20
_DEEPEST_YAML = 20

# Suffixes of the files from which tokenizers and models are loaded.
_READ = {".json", ".jinja", ".model", ".safetensors", ".txt", ".yaml", ".yml", ".tiktoken"}
_TEMPLATES = "additional_chat_templates"

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_hub_id(name: object) -> bool:
    """Return True for NAME or OWNER/NAME in the form of hub ids; a local folder may have such a name too."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and ".." not in name


def is_public_id(name: object) -> bool:
    """Return True for a hub id that is not also a path on this machine."""
    return is_hub_id(name) and not Path(str(name)).exists()


def check_folder(folder: Path) -> None:
    """Check the path of every file in a folder from which a model, tokenizer or adapter may be loaded."""
    inner = folder / _TEMPLATES
    for path in sorted([*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else [])]):
        if path.suffix.lower() in _READ or path == inner:
            check_place(path, folder)


def check_place(path: Path, folder: Path) -> None:
    """Raise SecurityError if a path of this folder leads out of it, or is a pipe, a device or a socket.

    The hub's cache is an exception: snapshots/COMMIT/config.json -> ../../blobs/HASH.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [root]
    if root.parent.name == "snapshots":
        homes += [root.parent.parent / "blobs", root.parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(home) for home in homes):
        raise SecurityError(f"{path} is a link to {target}, outside of its folder: replace the link by the file")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise SecurityError(f"{path} is neither a regular file nor a folder")


def json_object(path: Path, kind: type[LoraFtError]) -> dict[str, Any]:
    """Read a JSON object of at most MOST_JSON_BYTES; raise `kind` if the file contains anything else."""
    with path.open("rb") as file:
        data = file.read(min(path.stat().st_size, MOST_JSON_BYTES) + 1)  # memory is allocated for as many bytes
    if len(data) > MOST_JSON_BYTES:
        raise SecurityError(f"{path} is larger than {MOST_JSON_BYTES // 2**20} MiB, too large for a file of this name")
    return parsed_object(data, path, kind)


def parsed_object(data: bytes, path: object, kind: type[LoraFtError]) -> dict[str, Any]:
    """Return the JSON object that `data` is; raise `kind`, which names `path`, if it is anything else."""
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise SecurityError(f"{path} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more digits than Python converts
        raise kind(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise kind(f"{path} must contain a JSON object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: its bytes, the byte ranges of the tensors in order, and their shapes."""

    raw: bytes
    byte_ranges: list[tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]


def tensor_header(path: Path, most_bytes: int, kind: type[LoraFtError]) -> Header:
    """Read the header of a safetensors file; its tensors must cover the rest of the file without gaps or overlaps.

    The header length is checked against `most_bytes` and the file size before the header is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise kind(f"{path} is not a safetensors file, or truncated: its header would be longer than the file")
        if length > most_bytes:
            raise SecurityError(f"{path}: its header of {length:,} bytes is longer than the {most_bytes:,} allowed")
        raw = start + file.read(length)
    try:
        tensors = json.loads(raw[8:], object_pairs_hook=_unique)
        tensors.pop("__metadata__", None)
        ranges = _byte_ranges(tensors, size - len(raw))
        return Header(raw, ranges, {name: tuple(entry["shape"]) for name, entry in tensors.items()})
    except RecursionError:
        raise SecurityError(f"{path}: its header is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise kind(f"{path} is not a safetensors file, or truncated: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in the header")
    return values


def _byte_ranges(tensors: dict[str, Any], num_bytes: int) -> list[tuple[int, int]]:
    ranges, at = [], 0
    for name, entry in sorted(tensors.items(), key=lambda tensor: tensor[1]["data_offsets"]):
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
            raise ValueError(f"{name[:80]} has a size or offset that is not a non-negative integer")
        if begin != at or end < begin:
            raise ValueError(f"{name[:80]} begins at byte {begin}, but the tensor before it ends at {at}")
        if prod(shape) * _BITS[dtype] != (end - begin) * 8:
            raise ValueError(f"{name[:80]} of {dtype} {shape} does not fill its {end - begin} bytes")
        ranges.append((begin, end))
        at = end
    if at != num_bytes:
        raise ValueError(f"its tensors take {at:,} bytes, but the file has {num_bytes:,}")
    return ranges


def check_yaml(data: bytes | str, label: str, kind: type[LoraFtError]) -> None:
    """Check size, tags and depth of a YAML document without building it; syntax errors are left to its reader.

    Raises SecurityError for a document larger than MOST_YAML_BYTES or a tag that builds objects, and `kind` for deep
    nesting, at which libyaml overflows the C stack.
    """
    depth = 0
    if len(data) > MOST_YAML_BYTES:
        raise SecurityError(f"{label} is larger than {MOST_YAML_BYTES // 2**20} MiB")
    try:
        for event in yaml.parse(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1 if event.start_mark else 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST_YAML:
                raise kind(f"{label}:{line}: nested more than {_DEEPEST_YAML} deep")
            tag = getattr(event, "tag", None)
            if tag not in _TAGS | {None, "!"}:
                raise SecurityError(f"{label}:{line}: the tag {tag} is not plain data")
    except (yaml.YAMLError, UnicodeDecodeError):
        return


def check_types(path: Path, fields: dict[str, Any], schema: type, kind: type[LoraFtError]) -> None:
    """Check JSON values against the field types of a library's dataclass; raise `kind` for the first mismatch.

    PEFT does not check the types of its settings: wrong ones fail much later, or never.
    """
    hints = typing.get_type_hints(schema)
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            expected = hints[name].__name__ if isinstance(hints[name], type) else str(hints[name])
            raise kind(f"{path}: {name} must be {expected.replace('typing.', '')}, got {value!r}"[:300])


def _fits(value: Any, hint: Any) -> bool:
    """Return True if a JSON value fits a type hint; int and float are one type, a Literal is any string."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(isinstance(value, dict) if dataclasses.is_dataclass(o) else _fits(value, o) for o in inner)
    if origin is typing.Literal:
        return isinstance(value, str)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (bool, str, dict, types.NoneType):
        return isinstance(value, hint)
    return origin is tuple and isinstance(value, list)


def without_filled_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop null keys of the objects inside a row of Arrow; columns and list items are kept."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
