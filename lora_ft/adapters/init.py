"""Initialize the matrices of an adapter. An initialization is a function here and one line in `INITS`.

    default     A random (Kaiming uniform), B zero: PEFT's own
    gaussian    A normal with a standard deviation of 1 / r, B zero

With both, the model computes the same as its base before the first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError


@dataclass(frozen=True)
class Init:
    """An initialization. changes_base: it changes the base's weights. needs_rows: it reads training examples.

    `apply(model, name, examples)` overwrites the matrices of adapter `name`, which PEFT has initialized. The global
    generator is seeded with the run's seed.
    """

    name: str
    changes_base: bool
    needs_rows: bool
    apply: Callable[[PeftModel, str, Sequence[Example]], None]


def find(name: str) -> Init:
    """Return the initialization that `adapter.init` names; raises ConfigError for an unknown name."""
    if name not in INITS:
        raise ConfigError(f"adapter.init must be one of {', '.join(INITS)}, got {name}")
    return INITS[name]


def _keep(model: PeftModel, name: str, examples: Sequence[Example]) -> None:
    """Keep PEFT's initialization."""


def _gaussian(model: PeftModel, name: str, examples: Sequence[Example]) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            nn.init.normal_(layer.lora_A[name].weight, std=1 / layer.r[name])


INITS = {
    init.name: init
    for init in (
        Init("default", changes_base=False, needs_rows=False, apply=_keep),
        Init("gaussian", changes_base=False, needs_rows=False, apply=_gaussian),
    )
}
