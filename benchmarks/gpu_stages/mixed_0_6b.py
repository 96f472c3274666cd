"""The 0.6B shape in bfloat16 without quantization, rows of mixed lengths: small, middle and large steps.

Small steps are bound by launches, large ones by arithmetic and memory. `auto` decides what is recomputed.
"""

from collections.abc import Iterator
from typing import Any

from gpu_stages.bases import base, mixed_lengths, write_rows
from gpu_stages.prediction import predicted
from gpu_stages.setting import Part, Setting, attempt
from gpu_stages.training import WARM_UP, compose, measure, settings
from lora_ft.training.shared import prepare

TOKENS = {8192: 8, 1024: 20, 32_768: 4}  # of a step, with the number of measured steps


def overrides(setting: Setting, tokens: int, steps: int) -> list[str]:
    shape, longest = setting.sized(("qwen3_0_6b", 2048), ("tiny", 32))
    # Rows that exactly fill a step rarely meet: with some to spare there are enough for all steps.
    rows = write_rows(setting, mixed_lengths(tokens * (steps + 2), min(longest, tokens)), f"mixed_{tokens}")
    return settings(base(setting, shape), rows, tokens, steps)


def run(setting: Setting) -> Iterator[Part]:
    sizes = setting.sized(TOKENS, {64: 1, 32: 1})
    runs = {tokens: overrides(setting, tokens, WARM_UP + steps) for tokens, steps in sizes.items()}
    shared = prepare(compose(setting, next(iter(runs.values()))))
    found: dict[int, dict[str, Any]] = {}
    for tokens, given in runs.items():
        found[tokens] = attempt(measure, setting, given, shared)
        yield f"{tokens} tokens", found[tokens]
    for tokens, given in runs.items():
        yield f"{tokens} tokens, traced", attempt(predicted, setting, given, found[tokens])
