"""QLoRA of the 8B shape: NF4 with quantized scales, rank 16 on all linear layers, every layer recomputed.

Rows of 512 tokens, which need no padding, so that other trainers can do the same work (peers.py). The trace's
prediction of the same steps comes last, since it takes seconds of the CPU.
"""

from collections.abc import Iterator
from typing import Any

from gpu_stages.bases import base, equal_lengths, write_rows
from gpu_stages.prediction import predicted
from gpu_stages.profiling import profiled
from gpu_stages.setting import Part, Setting, attempt
from gpu_stages.training import WARM_UP, compose, measure, settings
from lora_ft.training.shared import prepare

SHAPE, LENGTH, TOKENS = "llama3_1_8b", 512, (4096, 2048)
TINY_SHAPE, TINY_LENGTH, TINY_TOKENS = "tiny", 16, (64, 32)


def overrides(setting: Setting, tokens: int, steps: int) -> list[str]:
    shape, length = setting.sized(SHAPE, TINY_SHAPE), setting.sized(LENGTH, TINY_LENGTH)
    rows = write_rows(setting, equal_lengths(tokens, steps, length), f"equal_{tokens}")
    return settings(base(setting, shape), rows, tokens, steps, "quant=nf4", "train.gradient_checkpointing=every_1")


def run(setting: Setting) -> Iterator[Part]:
    steps = WARM_UP + setting.sized(6, 1)
    runs = {tokens: overrides(setting, tokens, steps) for tokens in setting.sized(TOKENS, TINY_TOKENS)}
    shared = prepare(compose(setting, next(iter(runs.values()))))
    found: dict[int, dict[str, Any]] = {}
    for tokens, given in runs.items():
        found[tokens] = attempt(measure, setting, given, shared)
        yield f"{tokens} tokens", found[tokens]
    tokens, given = next(iter(runs.items()))
    yield f"{tokens} tokens, profiled", attempt(profiled, setting, given, shared)
    for tokens, given in runs.items():
        yield f"{tokens} tokens, traced", attempt(predicted, setting, given, found[tokens])
