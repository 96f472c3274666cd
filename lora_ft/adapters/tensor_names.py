"""Read the tensor names of an adapter's file under the names that PEFT gives them, and say what the others are.

base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.default.weight     saved from a compiled or wrapped model
base_model.model.model.layers.0.mlp.up_proj.lora_A.weight                       the name that PEFT writes

    names = tensor_names.read(folder, keys, saved)
    names.own       {key in the file: name} of the adapter's tensors
    names.frozen    {key in the file: name of the base's layer} of copies of the base's weights
    names.whole     {key in the file: name of the base's layer} of embedding and head, saved whole: a resized vocabulary
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from peft import LoraConfig

from lora_ft.errors import MismatchError

PREFIX = "base_model.model."
# PEFT saves these whole after the vocabulary was resized; its config does not name them.
ENDS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings")

# Parts of a name that wrappers add: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# An adapter's parts, and what may follow the adapter's name.
_LEAVES = {
    "lora_A": ("weight", "bias"), "lora_B": ("weight", "bias"), "lora_embedding_A": ("weight",),
    "lora_embedding_B": ("weight",), "lora_magnitude_vector": ("weight",), "trainable_tokens_delta": (),
}  # fmt: skip
_WITHOUT_LEAF = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")
_SAVED, _ORIGINAL, _BASE = "modules_to_save", "original_module", "base_layer"
_HOLDERS = (_BASE, _ORIGINAL, "token_adapter")  # parts of PEFT's names for the base's own layer
_LEAF = re.compile(r"weight|bias")


@dataclass(frozen=True)
class Names:
    """The tensors of a file by what they are; `renamed` are the own ones that PEFT would not find.

    PEFT may save a layer of modules_to_save under two keys with one name; the two must be equal.
    """

    own: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def renamed(self) -> list[str]:
        return [key for key, name in self.own.items() if key != name and name not in self.own]


def read(folder: Path, keys: Collection[str], saved: LoraConfig | None) -> Names:
    """Sort the keys of a file; raises MismatchError if it holds several adapters, or one tensor twice.

    `saved` is the adapter's config, of which modules_to_save names tensors that are its own; None if it has none.
    """
    parted = {key: _without_wrappers(key) for key in keys}
    adapters = {name for parts in parted.values() if (name := _adapter_name(parts))}
    if len(adapters) > 1:
        raise MismatchError(
            f"the file of {folder} holds {len(adapters)} adapters ({', '.join(sorted(adapters)[:5])}): save each into "
            "a folder of its own (PEFT: model.save_pretrained(FOLDER, selected_adapters=[NAME]))"
        )
    found = Names()
    in_full = saved.modules_to_save or [] if saved else []
    has_prefix = any(key.startswith(PREFIX) for key in map(".".join, parted.values()))
    for key, parts in parted.items():
        name = ".".join(_plain(parts, adapters))
        if not has_prefix and _adapter_part(parts) is not None:
            name = PREFIX + name
        layer, _, leaf = name.removeprefix(PREFIX).rpartition(".")
        if _is_frozen(parts):
            found.frozen[key] = ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in _HOLDERS)
        elif (
            _adapter_part(parts) is None
            and leaf == "weight"
            and layer.rpartition(".")[2] in ENDS
            and not is_in_full(layer, in_full)
        ):
            found.whole[key] = name.removeprefix(PREFIX)
        else:
            found.own[key] = name
    _check_once(folder, {key: name for key, name in found.own.items() if _adapter_part(parted[key]) is not None})
    return found


def is_in_full(layer: str, modules_to_save: Collection[str]) -> bool:
    """Return True if a layer is, or is inside of, one of modules_to_save; PEFT compares the ends of names."""
    within = accumulate(layer.split("."), "{}.{}".format)
    return any(path.endswith(name) for path in within for name in modules_to_save)


def _without_wrappers(key: str) -> list[str]:
    """Return the parts of a name without those of wrappers, and with one prefix of PEFT."""
    joined = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    joined = joined.removeprefix("module.")  # of DistributedDataParallel
    while joined.startswith(PREFIX * 2):
        joined = joined.removeprefix(PREFIX)
    return joined.split(".")


def _adapter_part(parts: list[str]) -> int | None:
    """Return the place of `lora_A` or a like part, None for a tensor of another kind."""
    return next((i for i in reversed(range(len(parts))) if parts[i] in _LEAVES), None)


def _adapter_name(parts: list[str]) -> str | None:
    """Return the adapter's name inside of a tensor's name, None if it has none."""
    at = _adapter_part(parts)
    if at is None:
        return None
    rest, leaves = parts[at + 1 :], _LEAVES[parts[at]]
    if len(rest) == 2 and rest[1] in leaves:
        return rest[0]
    return rest[0] if len(rest) == 1 and rest[0] not in leaves else None


def _plain(parts: list[str], adapters: Collection[str]) -> list[str]:
    """Return the parts of the name that PEFT writes."""
    at = _adapter_part(parts)
    if at is not None:
        name = _adapter_name(parts)
        rest = parts[at + 1 :][name is not None :]
        return [*parts[: at + 1], *([] if parts[at] in _WITHOUT_LEAF and rest == ["weight"] else rest)]
    if _SAVED in parts:
        at = parts.index(_SAVED)
        rest = parts[at + 1 :]
        named = len(rest) > 1 and (rest[0] in adapters or rest[0] == "default")
        return [*parts[:at], *rest[named:]]
    return parts


def _is_frozen(parts: list[str]) -> bool:
    """Return True for a copy of a weight of the base that a wrapper of PEFT holds."""
    if _adapter_part(parts) is not None:
        return False
    return _ORIGINAL in parts or (parts[-2:-1] == [_BASE] and bool(_LEAF.fullmatch(parts[-1])))


def _check_once(folder: Path, own: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for key, name in own.items():
        if name in first:
            raise MismatchError(f"the file of {folder} holds one tensor under two names, {first[name]} and {key}")
        first[name] = key
