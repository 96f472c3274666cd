"""Choose the layers and experts of an adapter, and the shortest names by which PEFT alone finds exactly these.

    adapter.target_modules=[all-linear]                     every linear layer of the text path, but the head; experts
    adapter.target_modules=[q_proj,v_proj]                  layers by their name or the last parts of it
    adapter.target_modules=[q_proj,experts.down_proj]       parameters of experts as well
    adapter.target_modules=['model\\.layers\\.1\\d\\..*']   a regular expression, matched with the whole name
    adapter.exclude=[down_proj]                             not these, nor layers inside of a module of this name
    adapter.experts=true, or false                          all experts, whatever target_modules names; or none

A name that has other characters than letters, digits, `_`, `-` and `.` is a regular expression. What an adapter cannot
train (adapters/text_path.py, adapters/experts.py) is left out and counted.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.adapters.experts import expert_parameters, hindrance
from lora_ft.adapters.text_path import TextPath, adaptable_layers, text_path
from lora_ft.errors import ConfigError
from lora_ft.models import heads, quantize
from lora_ft.models.stored import Stored

ALL_LINEAR = "all-linear"
EXCLUDED = "excluded by adapter.exclude"
SWITCHED_OFF = "adapter.experts=false"
QUANTIZED = "PEFT adapts this name in this model type only as a parameter, which is quantized here"

_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Selection:
    """Layers and parameters of experts that an adapter trains, by name, in the model's order.

    modules, parameters: the names that select exactly these as PEFT's target_modules and target_parameters. by_weight:
    the layers among the parameters. left_out: the reason of each layer and parameter that target_modules selects and
    that is not adapted.
    """

    layers: tuple[str, ...]
    experts: tuple[str, ...]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    by_weight: frozenset[str]
    left_out: dict[str, str]

    def counts(self) -> dict[str, int]:
        """Return the number of layers and parameters by the last part of their name, in the model's order."""
        return dict(Counter(short(name) for name in (*self.layers, *self.experts)))


def select(model: PreTrainedModel, adapter: config.Adapter, quantized: Collection[str] = ()) -> Selection:
    """Choose the layers and experts that `adapter` trains on a base.

    `quantized` are layers that will be quantized, for a model that is not yet. Raises ConfigError for a target or an
    exclusion that matches nothing, for a target of which nothing can be trained, for adapter.experts=true if experts
    cannot be, and if nothing is left.
    """
    layers, experts = adaptable_layers(model), expert_parameters(model)
    path = text_path(model)
    reasons = path.reasons | _hindered(adapter, layers, experts, path, quantized)
    _check_experts(model, adapter, experts, reasons)
    wanted: set[str] = set(experts) if adapter.experts else set()
    for target in adapter.target_modules:
        wanted |= _matches(model, layers, experts, target, reasons)
    excluded = _excluded(model, [*layers, *experts], adapter.exclude)
    wanted -= _inside(wanted, matched_layers(dict(model.named_modules()), set(adapter.modules_to_save)))
    left_out = {
        name: EXCLUDED if name in excluded else reasons[name]
        for name in [*layers, *experts]
        if name in wanted and (name in excluded or reasons[name])
    }
    chosen = [name for name in [*layers, *experts] if name in wanted and name not in left_out]
    if not chosen:
        raise ConfigError(
            f"adapter.target_modules={_listed(adapter.target_modules)} leaves no layer to adapt: adapter.exclude or "
            "adapter.modules_to_save names them all"
        )
    return _selection(model, adapter, chosen, path, left_out)


def to_be_quantized(model: PreTrainedModel, quant: config.Quant, files: Stored | None) -> list[str]:
    """Return the layers that a base without weights will have quantized: by `quant`, or as its files hold them."""
    planned = [] if quant.kind is config.QuantKind.none else quantize.planned_layers(model, files)
    # Layers of FP8 files are plain ones in a model without weights.
    return [*planned, *(text_path(model).by_weight if files and files.is_fp8 else ())]


def with_own_storage(model: PreTrainedModel, adapter: config.Adapter) -> set[str]:
    """Return the modules whose weights must keep their dtype: trained in full, or adapted by PEFT as parameters."""
    return {*adapter.modules_to_save, *text_path(model).by_weight}


def _selection(
    model: PreTrainedModel, adapter: config.Adapter, chosen: list[str], path: TextPath, left_out: dict[str, str]
) -> Selection:
    modules = [name for name, _ in model.named_modules() if name]
    saved = matched_layers(modules, set(adapter.modules_to_save))
    by_weight = path.by_weight.intersection(chosen)
    experts = tuple(name for name in chosen if name in expert_parameters(model))
    layers = tuple(name for name in chosen if name not in experts)
    found = [name for name in modules if name not in saved]  # PEFT ignores those
    parameters = [f"{name}.weight" if name in by_weight else name for name in chosen if name in (*by_weight, *experts)]
    return Selection(
        layers=layers,
        experts=experts,
        modules=_names(found, [name for name in layers if name not in by_weight], 1),
        parameters=_names([name for name, _ in model.named_parameters()], parameters, 2),
        by_weight=by_weight,
        left_out=left_out,
    )


def _hindered(
    adapter: config.Adapter,
    layers: dict[str, nn.Module],
    experts: dict[str, nn.Parameter],
    path: TextPath,
    quantized: Collection[str],
) -> dict[str, str]:
    """Return the settings that keep PEFT from adapting parameters, by parameter; layers among them may be quantized."""
    setting = hindrance(adapter)
    found = {name: QUANTIZED for name in path.by_weight if name in quantized or _is_quantized(layers[name])}
    if setting:
        found |= dict.fromkeys([*path.by_weight, *(name for name in experts if not path.reasons[name])], setting)
    if adapter.experts is False:
        found |= dict.fromkeys(experts, SWITCHED_OFF)
    return found


def _is_quantized(layer: Any) -> bool:
    weight = layer._parameters.get("weight")  # layers of FP8 files have codes instead
    return weight is None or not weight.is_floating_point()


def _check_experts(
    model: PreTrainedModel, adapter: config.Adapter, experts: dict[str, nn.Parameter], reasons: dict[str, str]
) -> None:
    """Raise ConfigError for adapter.experts=true where experts cannot be trained."""
    if not adapter.experts:
        return
    if not experts:
        raise ConfigError(
            f"adapter.experts=true: {model.config.model_type} has no parameters of experts: remove the setting "
            "(experts that are linear layers are adapted as such)"
        )
    if reason := next((reasons[name] for name in experts if reasons[name]), ""):
        raise ConfigError(
            f"adapter.experts=true: the experts of {model.config.model_type} cannot be adapted ({reason}): change the "
            "one or the other"
        )


def _matches(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    experts: dict[str, nn.Parameter],
    target: str,
    reasons: dict[str, str],
) -> set[str]:
    if target == ALL_LINEAR:
        head = heads.head(model)
        found = {n for n, module in layers.items() if not isinstance(module, nn.Embedding) and module is not head}
        found |= experts.keys()
    else:
        found = _selected([*layers, *experts], target)
    if not found:
        known = ", ".join(sorted({short(name) for name in [*layers, *experts]}))
        raise ConfigError(f"adapter.target_modules: {target} matches no layer of this model, which has {known}")
    if all(reasons[name] for name in found):
        name = next(name for name in [*layers, *experts] if name in found)
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


def _excluded(model: nn.Module, adaptable: list[str], exclude: list[str]) -> set[str]:
    excluded: set[str] = set()
    named = list(dict.fromkeys([*(name for name, _ in model.named_modules() if name), *adaptable]))
    for pattern in exclude:
        inside = _inside(adaptable, _selected(named, pattern))
        if not inside:
            raise ConfigError(f"adapter.exclude: {pattern} matches no linear layer of this model, nor a module of them")
        excluded |= inside
    return excluded


def _inside(layers: Iterable[str], modules: set[str]) -> set[str]:
    """Return the layers that are one of the modules, or inside of one."""
    return {name for name in layers if name in modules or any(name.startswith(f"{m}.") for m in modules)}


def _names(every: Iterable[str], chosen: Collection[str], parts: int) -> tuple[str, ...]:
    """Return the last parts of the chosen names where PEFT finds nothing else by them; else the full names.

    q_proj is easier to read than 30 full names, and other loaders of the adapter expect it.
    """

    def last(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    taken, mine = Counter(map(last, every)), Counter(map(last, chosen))
    return tuple(dict.fromkeys(last(name) if taken[last(name)] == mine[last(name)] else name for name in chosen))


def short(name: str) -> str:
    """Return the last part of a layer's name; for an element of a list, the name of the list."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"
