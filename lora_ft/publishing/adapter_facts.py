"""Read an adapter folder without trusting it: an error in a file becomes a finding, never a crash.

facts = adapter_facts.read(folder, base_config)
facts.config      adapter_config.json, {} if it cannot be read
facts.layers      {"model.layers.0.self_attn.q_proj": ((8, 576), (576, 8)), ...}      shapes of A and B
facts.problems    (Finding(REFUSED, "adapter_model.safetensors is not a safetensors file, ..."), ...)
"""

import json
import re
import warnings
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load
from peft import LoraConfig

from lora_ft.adapters import peft_folder, tensor_names
from lora_ft.errors import LoraFtError, MismatchError
from lora_ft.io import untrusted

_HEADER_LIMIT = 10 * 2**20
_KEY = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?P<leaf>\.weight|\.bias)?"
)


class Level(IntEnum):
    OK = 0
    WARN = 1
    REFUSED = 2


@dataclass(frozen=True)
class Finding:
    """A fault of an adapter's files, and its remedy."""

    level: Level
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter as its files describe it.

    `layers` holds the shapes of A and B by layer name, None for a missing one. `whole` names the other tensors, which
    belong to layers trained in full. `num_tokens` is the size of its tokenizer, None if it has none. `names` are the
    files of the folder. `architecture` is the base's model_type.
    """

    config: dict[str, Any]
    saved: LoraConfig | None  # `config` as PEFT reads it, None if it cannot be read
    layers: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
    whole: tuple[str, ...]
    renamed: str | None  # a name in the file that PEFT does not find, None if there is none
    rows: int | None  # of the embedding and head, if the file holds them whole
    has_tokens: bool
    has_biases: bool
    num_tokens: int | None
    names: frozenset[str]
    architecture: str | None
    is_tied: bool  # the base's embedding and head share one matrix
    base_config: dict[str, Any]
    base_shapes: dict[str, tuple[int, ...]]  # of parameters by name; {} if the base is not known
    problems: tuple[Finding, ...]

    @property
    def rank(self) -> int:
        """Return the highest rank of a layer, or 0."""
        return max((a[0] for a, _ in self.layers.values() if a), default=0)

    def has_layer(self, name: str) -> bool:
        """Return True if the base has a layer with this name or name ending."""
        return any(is_named(parameter.rpartition(".")[0], name) for parameter in self.base_shapes)

    def adapts(self, *names: str) -> bool:
        """Return True if a layer with one of these names is adapted or trained in full."""
        touched = [*self.layers, *(key.rpartition(".")[0] for key in self.whole)]
        return any(layer.rpartition(".")[2] in names for layer in touched)


def is_named(layer: str, name: str) -> bool:
    """Return True if PEFT matches a name with a layer: the full name or its last parts."""
    return layer == name or layer.endswith(f".{name}")


def front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML front matter of a model card, {} if it cannot be read."""
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    # A wrong value of a YAML tag raises any of these; ValueError also for a card that is not UTF-8 or not a mapping.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        return {}


def read(folder: Path, base_config: dict[str, Any] | None) -> AdapterFacts:
    """Describe an adapter folder; `problems` lists the parts that cannot be read."""
    problems: list[Finding] = []
    config, saved = _config(folder, problems)
    shapes = _shapes(folder, problems)
    names = _names(folder, shapes, saved, problems)
    layers, whole, parts = _group(names, shapes)
    base = base_config or {}
    architecture = base.get("model_type")
    if architecture is None and any(layer.rpartition(".")[2] == "c_attn" for layer in layers):
        architecture = "gpt2"
    found = [path for path in (*folder.iterdir(), *folder.glob("mlx/*")) if path.is_file()]
    base_shapes, is_tied = _shapes_of_base(base)
    return AdapterFacts(
        config=config, saved=saved, layers=layers, whole=whole, renamed=next(iter(names.renamed), None),
        rows=max((shapes[key][0] for key in names.whole), default=None),
        has_tokens="token_adapter.trainable_tokens_delta" in parts, has_biases="bias" in parts,
        num_tokens=_num_tokens(folder),
        names=frozenset(path.relative_to(folder).as_posix() for path in found), architecture=architecture,
        is_tied=architecture == "gpt2" if is_tied is None else is_tied, base_config=base, base_shapes=base_shapes,
        problems=tuple(problems),
    )  # fmt: skip


def _shapes_of_base(base_config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], bool | None]:
    """Return a base's parameter shapes, and True if embedding and head are tied; ({}, None) for an unknown model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: _with_floats(value) for key, value in base_config.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(base_config.get("model_type"), **rest)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    # not a causal LM, or a config of another version
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError):
        return {}, None
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}, bool(known.tie_word_embeddings)


def _with_floats(value: Any) -> Any:
    """Replace {"__float__": "Infinity"}, which transformers writes for numbers that JSON does not have."""
    if isinstance(value, list):
        return [_with_floats(element) for element in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _with_floats(element) for key, element in value.items()}


def _config(folder: Path, problems: list[Finding]) -> tuple[dict[str, Any], LoraConfig | None]:
    try:
        fields = peft_folder.read_fields(folder)
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of settings that only training needs
            return fields, peft_folder.parse_config(folder, fields)
    except (LoraFtError, OSError) as error:
        problems.append(Finding(Level.REFUSED, _first_line(error, folder)))
        return {}, None


def _shapes(folder: Path, problems: list[Finding]) -> dict[str, tuple[int, ...]]:
    path = folder / peft_folder.WEIGHTS
    if not path.is_file():  # reported with the config
        return {}
    try:
        return untrusted.tensor_header(path, _HEADER_LIMIT, MismatchError).shapes
    except (LoraFtError, OSError) as error:
        problems.append(Finding(Level.REFUSED, _first_line(error, folder)))
        return {}


def _names(
    folder: Path, shapes: dict[str, tuple[int, ...]], saved: LoraConfig | None, problems: list[Finding]
) -> tensor_names.Names:
    try:
        return tensor_names.read(folder, shapes, saved)
    except MismatchError as error:
        problems.append(Finding(Level.REFUSED, _first_line(error, folder)))
        return tensor_names.Names()


def _first_line(error: Exception, folder: Path) -> str:
    """Return the first line of an error, its paths relative to the folder."""
    if not str(error):
        return type(error).__name__
    return str(error).splitlines()[0].replace(f"{folder}/", "").removeprefix(f"{folder}: ")


def _group(
    names: tensor_names.Names, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]], tuple[str, ...], set[str]]:
    """Return the shapes of A and B by layer, the names of other tensors, and the types of parts that occur."""
    pairs: dict[str, list[tuple[int, ...] | None]] = {}
    whole, parts = list(names.whole.values()), set()
    for key, name in sorted(names.own.items(), key=lambda item: item[1]):
        found = _KEY.fullmatch(name.removeprefix(tensor_names.PREFIX))
        if not found:
            whole.append(name.removeprefix(tensor_names.PREFIX))
            continue
        parts.add("bias" if found["leaf"] == ".bias" else found["part"])
        if found["part"].endswith(("_A", "_B")) and found["leaf"] != ".bias":
            pairs.setdefault(found["layer"], [None, None])[found["part"].endswith("_B")] = shapes[key]
    return {layer: (a, b) for layer, (a, b) in pairs.items()}, tuple(whole), parts


def _num_tokens(folder: Path) -> int | None:
    """Return the size of the adapter's tokenizer: its highest token id plus one; None if it has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text("utf-8"))
        vocabulary, added = described["model"]["vocab"], described.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*ids, *(token["id"] for token in added)])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
