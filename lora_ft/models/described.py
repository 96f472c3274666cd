"""Find the config of a base without its weights and its tokenizer, and without a network if that is possible.

    described(cfg.model)  ->  Described(config=LlamaConfig(...), source="packaged copy", weight_bytes=None, ...)

    folder, GGUF file     config.json, or the file's header          "local folder", "GGUF file"
    hub id                in the hub's cache                         "hub cache"
                          in models/configs/OWNER--NAME.json         "packaged copy"; only without model.revision
                          config.json alone is downloaded            "downloaded config.json"

The packaged copies hold the architecture of the bases of conf/model/, and dtype and bytes of their stored weights.
Training reads the config that comes with the weights.
"""

import dataclasses
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import untrusted
from lora_ft.models import build, resolve

CONFIGS = Path(__file__).parent / "configs"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# An adapter's config gives a better error than the lack of config.json.
_CONFIG_ALONE = ["config.json", "adapter_config.json", _INDEX]


@dataclass(frozen=True)
class Described:
    """The config of a base, of transformers' class, and what is known of its files.

    source: where the config comes from, as in the table above. hub_id: of the base, None if it is not known.
    dtype: of the stored weights; None if the config does not name it, as of old bases in float32.
    weight_bytes: of the safetensors files that training reads, None if only the config tells their size.
    here: True if the weights are on this machine; those of a GGUF file are converted once.
    other_bytes: of the tokenizer's and other files that training reads, None if not known; of a GGUF file its own.
    """

    config: Any
    source: str
    hub_id: str | None
    dtype: torch.dtype | None
    weight_bytes: int | None = None
    here: bool = False
    other_bytes: int | None = None


def described(model: config.Model) -> Described:
    """Describe the base of these settings; downloads config.json at most.

    Raises the errors of `resolve.locate`, except those that only weights and tokenizer can show.
    """
    try:
        path = resolve.local_path(model)
    except ResourceError:  # a package that is not installed: its hub id may have a copy
        found = _packaged(model.hub_id) if model.path.startswith("package:") else None
        if found is None:
            raise
        # Training will convert the package's 4-bit weights to float32; the copy has the dtype of those on the hub.
        found.config.dtype = None
        return dataclasses.replace(found, dtype=torch.float32, weight_bytes=None)
    if path is None:
        return _of_hub_id(model)
    if path.suffix == ".gguf":
        return _of_gguf(model, path)
    return _of_folder(model, path, "local folder", model.hub_id, _sizes(path))


def packaged(hub_id: str) -> Any:
    """Return the packaged copy of the config of a hub id. Raises KeyError without one."""
    found = _packaged(hub_id)
    if found is None:
        raise KeyError(hub_id)
    return found.config


def _packaged(hub_id: str | None) -> Described | None:
    from transformers import AutoConfig

    path = CONFIGS / f"{(hub_id or '').replace('/', '--')}.json"
    if not untrusted.is_hub_id(hub_id) or not path.is_file():
        return None
    fields = json.loads(path.read_text("utf-8"))
    weight_bytes = fields.pop("weight_bytes")
    with build.quiet():
        found = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return Described(found, "packaged copy", hub_id, found.dtype, weight_bytes)


def _of_hub_id(model: config.Model) -> Described:
    folder = _cached(model)
    if folder is not None:
        return _of_folder(model, folder, "hub cache", model.path, _sizes_of_snapshot(model.path, folder))
    if not model.revision and (found := _packaged(model.path)):
        return found
    folder = resolve.download("model.path", model.path, model.revision, _CONFIG_ALONE, resolve.ALTERNATIVE)
    return _of_folder(model, folder, "downloaded config.json", model.path, _sizes_of_snapshot(model.path, folder))


def _cached(model: config.Model) -> Path | None:
    """Return the snapshot in the hub's cache that holds the config, or None."""
    from huggingface_hub import try_to_load_from_cache

    if not untrusted.is_hub_id(model.path):
        return None
    found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


def _of_gguf(model: config.Model, path: Path) -> Described:
    from lora_ft.models.gguf import convert  # it imports the gguf package, which other runs do not need

    found, num_bytes = convert.describe(path)
    return Described(found, "GGUF file", model.hub_id, torch.float32, num_bytes, True, path.stat().st_size)


def _of_folder(model: config.Model, folder: Path, source: str, hub_id: str | None, sizes: dict[str, int]) -> Described:
    """Describe a folder with a config, whose files have, or will have, these sizes by name."""
    resolve.check_config(folder, hub_id)
    others = sum(sizes[n] for n in sizes if "/" not in n and any(fnmatch(n, p) for p in resolve.DESCRIBING))
    has_tokenizer = any(name.startswith(("tokenizer", "vocab")) for name in sizes)
    found = build.read_config(folder, model.path)
    return Described(found, source, hub_id, found.dtype, *_weights(folder, sizes), others if has_tokenizer else None)


def _weights(folder: Path, sizes: dict[str, int]) -> tuple[int | None, bool]:
    """Return the bytes of the weights, None if they are not known, and True if all weight files are in the folder.

    A folder of the user's own, and a snapshot that is complete or listed, is checked as for training.
    """
    in_cache = folder.parent.name == "snapshots"
    index = (folder / _INDEX).is_file()
    if not any(Path(name).suffix in _WEIGHT_SUFFIXES for name in sizes) or (in_cache and _INDEX in sizes and not index):
        found = [name for name in sizes if any(fnmatch(name, pattern) for pattern in resolve.WEIGHTS)]
        return (_indexed_bytes(folder) if index else sum(sizes[name] for name in found) or None), False
    try:
        names = resolve.weight_files(folder, set(sizes))
    except ResourceError:
        if not in_cache:
            raise
        return _indexed_bytes(folder), False  # an interrupted download
    return sum(sizes[name] for name in names), all((folder / name).is_file() for name in names)


def _indexed_bytes(folder: Path) -> int | None:
    """Return the bytes of the weights as their index counts them; None without an index."""
    if not (folder / _INDEX).is_file():
        return None
    metadata = untrusted.json_object(folder / _INDEX, ConfigError).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, int | float) and total > 0 else None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def _sizes_of_snapshot(hub_id: str, folder: Path) -> dict[str, int]:
    """Return the sizes that the hub listed at the last download, else those of the snapshot's files."""
    return resolve.sizes_on_hub(hub_id, folder.name) or _sizes(folder)
