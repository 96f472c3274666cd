"""Each fast path at each of its other values, one at a time, beside the defaults: what does it bring on this GPU?

Four layers of the 8B shape in NF4 with 4,096 tokens a step: the sizes of the main case, in a base that loads fast. The
head counts for more here than it does above 32 layers.
"""

import enum
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from gpu_stages.bases import base, mixed_lengths, write_rows
from gpu_stages.setting import NotHere, Part, Setting, attempt
from gpu_stages.training import WARM_UP, measure, settings
from lora_ft import config
from lora_ft.errors import ConfigError

LAYERS = 4
# By value: a timeout leaves out the last. Settings that are not named here come after them.
ORDER = ("lora", "loss", "kernels", "attention", "norm", "mlp", "rope")


def variants() -> list[str]:
    """Return overrides, each of which sets one setting of `fast` to another value than its default."""
    defaults = config.Fast()
    names = sorted((field.name for field in fields(config.Fast)), key=lambda n: (*ORDER, n).index(n))
    found = []
    for name in names:
        value = getattr(defaults, name)
        if isinstance(value, bool):
            found.append(f"fast.{name}={str(not value).lower()}")
        elif isinstance(value, enum.Enum):
            found += [f"fast.{name}={other.value}" for other in type(value) if other is not value]
    return found


def run(setting: Setting) -> Iterator[Part]:
    shape, tokens, longest = setting.sized(("llama3_1_8b", 4096, 2048), ("tiny", 64, 32))
    steps = WARM_UP + setting.sized(6, 1)
    rows = write_rows(setting, mixed_lengths(tokens * (steps + 2), longest), "fast")
    folder = base(setting, shape, setting.sized(LAYERS, None))
    common = settings(folder, rows, tokens, steps, "quant=nf4", "train.gradient_checkpointing=every_1")
    for variant in ("defaults", "fast=off", *variants()):
        yield variant, attempt(measured, setting, [*common, *([] if variant == "defaults" else [variant])])


def measured(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """Measure a variant; raises NotHere for kernels that need another device or a package that is not installed."""
    try:
        return measure(setting, overrides)
    except ConfigError as error:
        if overrides[-1].startswith("fast.kernels="):
            raise NotHere(str(error)) from None
        raise
