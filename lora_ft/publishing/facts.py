"""What an adapter folder says of itself, read without trusting it: a stranger's folder is described, never a crash.

    facts = facts.read(folder, base_config)
    facts.config      adapter_config.json, {} where it cannot be read
    facts.layers      {"model.layers.0.self_attn.q_proj": ((8, 576), (576, 8)), ...}      shapes of A and B
    facts.problems    (Finding(REFUSED, "adapter_model.safetensors is not a safetensors file, ..."), ...)

checks.py says what is wrong with what was read.
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

from lora_ft.adapters import files
from lora_ft.errors import LoraFtError, MismatchError
from lora_ft.io import untrusted

_HEADER_LIMIT = 10 * 2**20
_PREFIX = "base_model.model."
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
    """What is wrong or has to be known, and what helps."""

    level: Level
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """An adapter as its files describe it.

    `layers` holds the shapes of A and B by the layer's name, None for the one that is missing; `whole` are the names of
    other tensors: layers trained in full. `names` are the folder's files. `architecture` is the base's model_type.
    """

    config: dict[str, Any]
    layers: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]
    whole: tuple[str, ...]
    has_tokens: bool
    has_biases: bool
    num_tokens: int | None
    names: frozenset[str]
    architecture: str | None
    is_tied: bool  # embedding and head of the base are one matrix
    base_config: dict[str, Any]
    base_shapes: dict[str, tuple[int, ...]]  # of parameters by name; {} where the base is not known
    problems: tuple[Finding, ...]

    @property
    def rank(self) -> int:
        """The highest rank of a layer; 0 where there is none."""
        return max((a[0] for a, _ in self.layers.values() if a), default=0)

    def has_layer(self, name: str) -> bool:
        """Whether the base has a layer of this name, or whose name ends with it."""
        return any(is_named(parameter.rpartition(".")[0], name) for parameter in self.base_shapes)

    def adapts(self, *names: str) -> bool:
        """Whether a layer of one of these names is adapted, or trained in full."""
        touched = [*self.layers, *(key.rpartition(".")[0] for key in self.whole)]
        return any(layer.rpartition(".")[2] in names for layer in touched)


def is_named(layer: str, name: str) -> bool:
    """PEFT's rule: a name is a layer's own, or its last parts."""
    return layer == name or layer.endswith(f".{name}")


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a model card; {} where there is none that can be read."""
    if not path.is_file() or path.stat().st_size > untrusted.MOST_YAML_BYTES:
        return {}
    found = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text("utf-8", errors="replace"), re.DOTALL)
    if not found:
        return {}
    try:
        untrusted.check_yaml(found[1], str(path))
        loaded = yaml.safe_load(found[1])
    except (LoraFtError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read(folder: Path, base_config: dict[str, Any] | None) -> Facts:
    """Describe an adapter folder; what cannot be read of it is one of `problems`."""
    problems: list[Finding] = []
    config = _config(folder, problems)
    shapes = _shapes(folder, problems)
    layers, whole, parts = _sorted(shapes)
    base = base_config or {}
    kind = base.get("model_type")
    if kind is None and any(layer.rpartition(".")[2] == "c_attn" for layer in layers):
        kind = "gpt2"
    found = [path for path in (*folder.iterdir(), *folder.glob("mlx/*")) if path.is_file()]
    base_shapes, tied = _described(base)
    return Facts(
        config=config, layers=layers, whole=whole, has_tokens="token_adapter.trainable_tokens_delta" in parts,
        has_biases="bias" in parts, num_tokens=_num_tokens(folder),
        names=frozenset(path.relative_to(folder).as_posix() for path in found), architecture=kind,
        is_tied=kind == "gpt2" if tied is None else tied, base_config=base, base_shapes=base_shapes,
        problems=tuple(problems),
    )  # fmt: skip


def _described(base_config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], bool | None]:
    """Names and shapes of a base's parameters, and whether its ends are tied; {}, None for what transformers lacks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in base_config.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(base_config.get("model_type"), **rest)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError):  # another kind of model, or a config of another version
        return {}, None
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}, bool(known.tie_word_embeddings)


def _config(folder: Path, problems: list[Finding]) -> dict[str, Any]:
    if not (folder / files.CONFIG).is_file():
        problems.append(Finding(Level.REFUSED, f"{files.CONFIG} is missing", "give the folder that PEFT wrote"))
    elif (folder / files.WEIGHTS).is_file():  # else said as such, below
        try:
            with warnings.catch_warnings(action="ignore"):  # of PEFT, on what only training needs
                files.read_config(folder)
            return untrusted.json_object(folder / files.CONFIG, MismatchError)
        except (LoraFtError, OSError) as error:
            problems.append(Finding(Level.REFUSED, _plain(error, folder)))
    return {}


def _shapes(folder: Path, problems: list[Finding]) -> dict[str, tuple[int, ...]]:
    path = folder / files.WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        problems.append(
            Finding(Level.REFUSED, f"its weights are pickled ({pickled[0]}), which can run code when loaded",
                    "load it with PEFT where its maker is trusted, and save it again: PEFT writes safetensors")
            if pickled else
            Finding(Level.REFUSED, f"{files.WEIGHTS} is missing", "give the folder that PEFT wrote")
        )  # fmt: skip
        return {}
    try:
        return untrusted.tensor_header(path, _HEADER_LIMIT, MismatchError).shapes
    except (LoraFtError, OSError) as error:
        problems.append(Finding(Level.REFUSED, _plain(error, folder)))
        return {}


def _plain(error: Exception, folder: Path) -> str:
    """An error's first line, the folder left out of its paths."""
    return str(error).splitlines()[0].replace(f"{folder}/", "") if str(error) else type(error).__name__


def _sorted(
    shapes: dict[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]], tuple[str, ...], set[str]]:
    pairs: dict[str, list[tuple[int, ...] | None]] = {}
    whole, parts = [], set()
    for key, shape in sorted(shapes.items()):
        found = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if not found:
            whole.append(key.removeprefix(_PREFIX))
            continue
        parts.add("bias" if found["leaf"] == ".bias" else found["part"])
        if found["part"].endswith(("_A", "_B")) and found["leaf"] != ".bias":
            pairs.setdefault(found["layer"], [None, None])[found["part"].endswith("_B")] = shape
    return {layer: (a, b) for layer, (a, b) in pairs.items()}, tuple(whole), parts


def _num_tokens(folder: Path) -> int | None:
    """The size of the tokenizer beside the adapter: its highest token id, and one more."""
    path = folder / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > 64 * 2**20:
        return None
    try:
        described = json.loads(path.read_text("utf-8"))
        vocabulary, added = described["model"]["vocab"], described.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*ids, *(token["id"] for token in added)])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
