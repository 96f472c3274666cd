"""Files that somebody else wrote, checked before a library reads them. No torch here.

check_folder(folder)                             no link leads out of it, nothing in it is a pipe or a device
json_object(path, ConfigError)                   {"model_type": "llama", ...}
tensor_header(path, 10**7, MismatchError)        the bytes of a safetensors header that describes exactly its file
check_yaml(data, "my.yaml", ConfigError)         no alias bomb, no tag that builds objects, not deep, not large
is_hub_id("owner/name")                          whether a name may be one of the hub's

What is malformed is an error of the kind given; what only an attack would hold is a SecurityError.
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from lora_ft.errors import LoraFtError, SecurityError

MOST_JSON_BYTES = 16 * 2**20
MOST_YAML_BYTES = 2**20
_MOST_NODES = 100_000  # of a YAML document whose aliases are written out
_DEEPEST = 20
_DEEPEST_JSON = 64  # a schema of tools in a template's settings has ten

# What tokenizers and models are read from; the rest of a folder is nobody's business.
_READ = {".json", ".jinja", ".model", ".safetensors", ".txt", ".yaml", ".yml", ".tiktoken"}
_TEMPLATES = "additional_chat_templates"

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_hub_id(name: object) -> bool:
    """NAME or OWNER/NAME, as the hub has them; a folder of this machine may be called so as well."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and ".." not in name


def is_public_id(name: object) -> bool:
    """Whether a name says the same to everybody: a hub id, and no place of this machine."""
    return is_hub_id(name) and not Path(str(name)).exists()


def check_folder(folder: Path) -> None:
    """Check every file of a given folder that a model, tokenizer or adapter may be read from."""
    inner = folder / _TEMPLATES
    for path in sorted([*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else [])]):
        if path.suffix.lower() in _READ or path == inner:
            check_place(path, folder)


def check_place(path: Path, folder: Path) -> None:
    """SecurityError where a path of this folder leads out of it, or is a pipe, a device or a socket.

    Only the hub's own cache keeps files elsewhere: snapshots/COMMIT/config.json -> ../../blobs/HASH.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [root]
    if root.parent.name == "snapshots":
        homes += [root.parent.parent / "blobs", root.parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(home) for home in homes):
        raise SecurityError(f"{path} is a link out of its folder, to {target}: put the file itself there")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise SecurityError(f"{path} is neither a file nor a folder")


def json_object(path: Path, kind: type[LoraFtError]) -> dict[str, Any]:
    """A JSON object of at most MOST_JSON_BYTES; an error of `kind` where the file holds anything else."""
    with path.open("rb") as file:
        data = file.read(MOST_JSON_BYTES + 1)
    if len(data) > MOST_JSON_BYTES:
        raise SecurityError(f"{path} is larger than {MOST_JSON_BYTES // 2**20} MiB, which no file of this name is")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise SecurityError(f"{path} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of more digits than Python converts
        raise kind(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise kind(f"{path} must hold a JSON object, got {type(value).__name__}")
    if _depth_exceeds(value, _DEEPEST_JSON):
        raise SecurityError(f"{path} is nested too deeply")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [c for node in level if isinstance(node, dict | list)
                 for c in (node.values() if isinstance(node, dict) else node)]  # fmt: skip
    return bool(level)


@dataclass(frozen=True)
class Header:
    """The first bytes of a safetensors file, up to the data; where in the data its tensors lie, in order; shapes."""

    raw: bytes
    places: list[tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]


def tensor_header(path: Path, most_bytes: int, kind: type[LoraFtError]) -> Header:
    """The header of a safetensors file whose tensors cover the rest of the file: none missing, shared or unused.

    The length is believed only up to `most_bytes` and the file's size, before anything of it is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise kind(f"{path} is not a safetensors file, or cut short: its header would be longer than the file")
        if length > most_bytes:
            raise SecurityError(f"{path}: its header of {length:,} bytes is longer than the {most_bytes:,} allowed")
        raw = start + file.read(length)
    try:
        tensors = json.loads(raw[8:], object_pairs_hook=_unique)
        tensors.pop("__metadata__", None)
        places = _places(tensors, size - len(raw))
        return Header(raw, places, {name: tuple(entry["shape"]) for name, entry in tensors.items()})
    except RecursionError:
        raise SecurityError(f"{path}: its header is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise kind(f"{path} is not a safetensors file, or cut short: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return values


def _places(tensors: dict[str, Any], num_bytes: int) -> list[tuple[int, int]]:
    places, at = [], 0
    for name, entry in sorted(tensors.items(), key=lambda tensor: tensor[1]["data_offsets"]):
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
            raise ValueError(f"{name[:80]} has a size or an offset that is no whole number, or negative")
        if begin != at or end < begin:
            raise ValueError(f"{name[:80]} begins at byte {begin}, and what lies before it ends at {at}")
        if prod(shape) * _BITS[dtype] != (end - begin) * 8:
            raise ValueError(f"{name[:80]} of {dtype} {shape} does not fill its {end - begin} bytes")
        places.append((begin, end))
        at = end
    if at != num_bytes:
        raise ValueError(f"its tensors take {at:,} bytes, and the file holds {num_bytes:,}")
    return places


def check_yaml(data: bytes | str, label: str, kind: type[LoraFtError]) -> None:
    """Walk a YAML document without building it. What does not parse is left to the one who will.

    Raises SecurityError for a document of over MOST_YAML_BYTES, whose aliases would expand without measure, or that
    has tags; an error of `kind` for one nested too deeply, which composers take as recursion.
    """
    if len(data) > MOST_YAML_BYTES:
        raise SecurityError(f"{label} is larger than {MOST_YAML_BYTES // 2**20} MiB")
    sizes: dict[str, int] = {}  # of anchors that are whole: an alias inside of its own anchor has no end
    counts = [0]
    names: list[str | None] = []
    try:
        for event in yaml.parse(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            place = f"{label}:{event.start_mark.line + 1 if event.start_mark else 1}"
            tag = getattr(event, "tag", None)
            if tag not in _TAGS | {None, "!"}:
                raise SecurityError(f"{place}: the tag {tag} asks for more than data")
            if isinstance(event, yaml.CollectionStartEvent):
                counts.append(1)
                names.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                size = counts.pop()
                _note(sizes, names.pop(), size)
                counts[-1] += size
            elif isinstance(event, yaml.ScalarEvent):
                _note(sizes, event.anchor, 1)
                counts[-1] += 1
            elif isinstance(event, yaml.AliasEvent):
                counts[-1] += sizes.get(event.anchor or "", _MOST_NODES + 1)
            if len(names) > _DEEPEST:
                raise kind(f"{place}: nested more than {_DEEPEST} deep")
            if counts[-1] > _MOST_NODES:
                raise SecurityError(f"{place}: aliases make it more than {_MOST_NODES:,} values")
    except (yaml.YAMLError, UnicodeDecodeError):
        return


def _note(sizes: dict[str, int], anchor: str | None, size: int) -> None:
    if anchor is not None:
        sizes[anchor] = size
