"""Predicted against measured memory and time, for families, quantizations, ranks and recomputation.

Bases that load in seconds: whole ones up to 1B, and four layers of the 8B shapes. qlora_8b has the whole 8B base.
"""

from collections.abc import Iterator

from gpu_stages.bases import base, equal_lengths, write_rows
from gpu_stages.prediction import predicted
from gpu_stages.setting import Part, Setting, attempt
from gpu_stages.training import WARM_UP, measure, settings

# Shape, number of layers (None for all), tokens of a step, overrides.
CASES: tuple[tuple[str, int | None, int, list[str]], ...] = (
    ("qwen3_0_6b", None, 4096, ["quant=none", "train.gradient_checkpointing=off"]),
    ("qwen3_0_6b", None, 8192, ["quant=nf4", "train.gradient_checkpointing=every_1", "adapter.r=64"]),
    ("gemma3_1b", None, 4096, ["quant=nf4", "train.gradient_checkpointing=every_1"]),
    ("llama3_1_8b", 4, 8192, ["quant=int8", "train.gradient_checkpointing=off"]),
    ("qwen3_8b", 4, 8192, ["quant=nf4", "train.gradient_checkpointing=every_2", "optim=adamw_8bit", "adapter.r=256"]),
    ("gpt2", None, 4096, ["quant=none", "train.gradient_checkpointing=every_1"]),
)
LENGTH, TINY_LENGTH, TINY_TOKENS = 512, 16, 64


def run(setting: Setting) -> Iterator[Part]:
    steps = WARM_UP + setting.sized(4, 1)
    for shape, layers, tokens, overrides in setting.sized(CASES, CASES[:2]):
        folder = base(setting, *setting.sized((shape, layers), ("tiny", None)))
        tokens, length = setting.sized((tokens, LENGTH), (TINY_TOKENS, TINY_LENGTH))
        rows = write_rows(setting, equal_lengths(tokens, steps, length), f"equal_{tokens}")
        given = settings(folder, rows, tokens, steps, *overrides)
        name = " ".join([shape, *([] if layers is None else [f"{layers} layers"]), f"{tokens} tokens", *overrides])
        found = attempt(measure, setting, given)
        yield name, found
        yield f"{name}, traced", attempt(predicted, setting, given, found)
