"""Choose the layers of an adapter, and the shortest names by which PEFT alone finds exactly these.

    adapter.target_modules=[all-linear]                     every linear layer of the text path, but the head
    adapter.target_modules=[q_proj,v_proj]                  layers by their name or the last parts of it
    adapter.target_modules=['model\\.layers\\.1\\d\\..*']   a regular expression, matched with the whole name
    adapter.exclude=[down_proj]                             not these, nor layers inside of a module of this name

A name that has other characters than letters, digits, `_`, `-` and `.` is a regular expression. Layers that an adapter
cannot train (adapters/text_path.py) are left out and counted.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.adapters.text_path import adaptable_layers, text_path
from lora_ft.errors import ConfigError

ALL_LINEAR = "all-linear"
EXCLUDED = "excluded by adapter.exclude"

_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Selection:
    """Layers of an adapter: `layers` in the model's order, and the `names` that select exactly these in PEFT.

    left_out: the reason of each layer that target_modules selects and that is not adapted.
    """

    layers: tuple[str, ...]
    names: tuple[str, ...]
    left_out: dict[str, str]

    def counts(self) -> dict[str, int]:
        """Return the number of layers by the last part of their name, in the model's order."""
        return dict(Counter(short(name) for name in self.layers))


def select(model: PreTrainedModel, adapter: config.Adapter) -> Selection:
    """Choose the layers that `adapter` trains on a base.

    Raises ConfigError for a target or an exclusion that matches no layer, for a target of which no layer can be
    trained, and if no layer is left.
    """
    layers = adaptable_layers(model)
    reasons = text_path(model).reasons
    wanted: set[str] = set()
    for target in adapter.target_modules:
        wanted |= _matches(model, layers, target, reasons)
    excluded = _excluded(model, layers, adapter.exclude)
    saved = _inside(layers, matched_layers(dict(model.named_modules()), set(adapter.modules_to_save)))
    left_out = {
        name: EXCLUDED if name in excluded else reasons[name]
        for name in layers
        if name in wanted - saved and (name in excluded or reasons[name])
    }
    chosen = tuple(name for name in layers if name in wanted - saved and name not in left_out)
    if not chosen:
        raise ConfigError(
            f"adapter.target_modules={_listed(adapter.target_modules)} leaves no layer to adapt: adapter.exclude or "
            "adapter.modules_to_save names them all"
        )
    return Selection(chosen, _names(model, chosen, saved), left_out)


def _matches(model: PreTrainedModel, layers: dict[str, nn.Module], target: str, reasons: dict[str, str]) -> set[str]:
    if target == ALL_LINEAR:
        head = model.get_output_embeddings()
        found = {n for n, module in layers.items() if not isinstance(module, nn.Embedding) and module is not head}
    else:
        found = _selected(layers, target)
    if not found:
        known = ", ".join(sorted({short(name) for name in layers}))
        raise ConfigError(f"adapter.target_modules: {target} matches no layer of this model, which has {known}")
    if all(reasons[name] for name in found):
        name = next(name for name in layers if name in found)
        usable = ",".join(dict.fromkeys(short(n) for n, reason in reasons.items() if not reason))
        raise ConfigError(
            f"adapter.target_modules: {target} matches only layers that an adapter cannot train in "
            f"{model.config.model_type} ({name}: {reasons[name]}): choose from {usable}"
        )
    return found


def matched_layers(layers: Iterable[str], targets: Collection[str]) -> set[str]:
    """Return the names that PEFT's rule selects: a target is a layer's full name or its last part(s)."""
    return {name for name in layers if any(suffix in targets for suffix in _suffixes(name))}


def _selected(layers: Iterable[str], target: str) -> set[str]:
    """Return the names that a target of the settings selects: by PEFT's rule, or by a regular expression."""
    if _PLAIN_NAME.fullmatch(target):
        return matched_layers(layers, {target})
    pattern = _compiled(target)
    return {name for name in layers if pattern.fullmatch(name)}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern} is not a regular expression, nor the name of a layer: {error}") from None


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _excluded(model: nn.Module, layers: dict[str, nn.Module], exclude: list[str]) -> set[str]:
    excluded: set[str] = set()
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in exclude:
        inside = _inside(layers, _selected(modules, pattern))
        if not inside:
            raise ConfigError(f"adapter.exclude: {pattern} matches no linear layer of this model, nor a module of them")
        excluded |= inside
    return excluded


def _inside(layers: Iterable[str], modules: set[str]) -> set[str]:
    """Return the layers that are one of the modules, or inside of one."""
    return {name for name in layers if name in modules or any(name.startswith(f"{m}.") for m in modules)}


def _names(model: nn.Module, chosen: tuple[str, ...], saved: set[str]) -> tuple[str, ...]:
    """Return the last part of the chosen names where PEFT finds no other module by it; else the full names.

    q_proj is easier to read than 30 full names, and other loaders of the adapter expect it. PEFT ignores `saved`.
    """
    taken = Counter(_leaf(name) for name, _ in model.named_modules() if name and name not in saved)
    mine = Counter(map(_leaf, chosen))
    return tuple(dict.fromkeys(_leaf(name) if taken[_leaf(name)] == mine[_leaf(name)] else name for name in chosen))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def short(name: str) -> str:
    """Return the last part of a layer's name; for an element of a list, the name of the list."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"
