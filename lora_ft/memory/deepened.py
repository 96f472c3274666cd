"""Derive the trace of a model of many equal layers from traces of models of two and of three: it grows by the layer.

    deepened(trace of 2 layers, trace of 3, 32)  ->  StepTrace of 32 layers, or None if the growth is not of this kind

Every figure is that of three layers and as many times what the third has added: bytes by term, parameters,
operations. Only with no layer recomputed, or every one, and if `are_alike` finds no difference between the layers.
The timeline is that of three layers.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_ft.memory.costs import Cost
from lora_ft.memory.trace import StepTrace

FEW, MORE = 2, 3


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Return True if layers have the same modules, parameters and settings, but for their own number."""
    return len({_description(layer) for layer in layers}) == 1


def _description(layer: nn.Module) -> str:
    found = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | type(None))}
        plain.pop("layer_idx", None)
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in module.named_parameters(recurse=False)}
        found.append((name, type(module), sorted(plain.items()), sorted(shapes.items())))
    return repr(found)


def deepened(few: StepTrace, more: StepTrace, layers: int) -> StepTrace | None:
    """Return the trace of a model of so many layers; None if the peak moves, or operations do not grow evenly."""
    costs = _costs(few.costs, more.costs, layers)
    if few.peak_phase != more.peak_phase or costs is None:
        return None

    grown: dict[str, Any] = {"costs": costs}
    for field in dataclasses.fields(StepTrace):
        before, now = getattr(few, field.name), getattr(more, field.name)
        if isinstance(now, int):
            grown[field.name] = _at(before, now, layers)
        elif isinstance(now, dict):
            grown[field.name] = {key: _at(before.get(key, 0), now.get(key, 0), layers) for key in before | now}
    return dataclasses.replace(more, **grown)


def _at(few: int, more: int, layers: int) -> int:
    return more + round((layers - MORE) * (more - few) / (MORE - FEW))


def _costs(few: Sequence[Cost], more: Sequence[Cost], layers: int) -> tuple[Cost, ...] | None:
    """Return the operations of so many layers.

    Those of a layer have the same shapes in both traces and grow in number; those on all parameters grow in size.
    """
    before, now = (Counter({dataclasses.replace(cost, count=0): cost.count for cost in costs}) for costs in (few, more))
    found = [dataclasses.replace(cost, count=_at(before[cost], count, layers)) for cost, count in now.items()
             if cost in before]  # fmt: skip
    changed: dict[Any, tuple[list[Cost], list[Cost]]] = defaultdict(lambda: ([], []))
    for number, others in enumerate((before.keys() - now.keys(), now.keys() - before.keys())):
        for cost in sorted(others, key=lambda cost: (cost.bytes, cost.flops)):
            count = (before, now)[number][cost]
            changed[cost.phase, cost.op, cost.dtype, cost.launches, count][number].append(cost)
    for (*_, count), (small, large) in changed.items():
        if not small:  # between two layers
            found += [dataclasses.replace(cost, count=_at(0, count, layers)) for cost in large]
        elif len(small) != len(large):
            return None
        else:
            for one, other in zip(small, large, strict=True):
                flops, size = _at(one.flops, other.flops, layers), _at(one.bytes, other.bytes, layers)
                found.append(dataclasses.replace(other, count=count, flops=flops, bytes=size))
    return tuple(found)
