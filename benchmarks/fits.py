"""Which bases train on which cards: the table of the README, as `lora-ft plan` predicts it.

    python benchmarks/fits.py                                   # all bases and cards; a quarter of an hour of one core
    python benchmarks/fits.py --models qwen3_4b,llama3_1_8b     # some bases

A cell names the weights (16 bits if rows of 2,048 tokens fit with them, else NF4), the longest row that fits if every
layer is recomputed, and the speed on rows of 1,024 tokens in micro-batches of 2,048, with as few layers recomputed as
fit. LoRA of rank 16 on all linear layers, AdamW. Half a GiB of the card is left free, for a desktop and for surprises.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import lora_ft
from lora_ft.errors import ConfigError
from lora_ft.io import process
from lora_ft.memory import planning
from lora_ft.memory.planning import Known, Plan

MODELS = (
    "qwen3_0_6b", "gemma3_1b", "llama3_2_1b", "qwen3_1_7b", "llama3_2_3b", "smollm3_3b", "phi4_mini", "qwen3_4b",
    "llama3_1_8b", "qwen3_8b", "mistral_nemo_12b", "qwen3_14b",
)  # fmt: skip
# The same generation, so that a traced step serves all of them.
CARDS = {"8 GB": "rtx_4060", "12 GB": "rtx_4070", "16 GB": "rtx_4060_ti_16gb", "24 GB": "rtx_4090"}
FREE_BYTES = 2**29
# Weights and overrides, the preferred ones first.
WEIGHTS = (
    ("16 bits", ["quant=none"], 2048),
    ("NF4", ["quant=nf4"], 512),
    ("NF4, embedding on the CPU", ["quant=nf4", "model.embedding_device=cpu"], 512),
)
LONGEST = 32_768
STEP = 256  # tokens; lengths are rounded down to it


def cell(model: str, card: str, known: Known) -> str:
    """Return what fits: weights, longest row, tokens per second."""
    for name, overrides, least in WEIGHTS:
        given = [f"model={model}", f"hardware={card}", *overrides]
        try:
            row, is_all = longest_row(given, known)
        except ConfigError:  # a tied embedding cannot be on the CPU
            continue
        if row >= least or is_all:
            return f"{name}, {row:,}{'+' if row == LONGEST else ''}, {speed(given, known)}"
    return "-"


def longest_row(given: list[str], known: Known) -> tuple[int, bool]:
    """Return the longest row that fits, 0 if none of 512 tokens does, and True for LONGEST or the base's context.

    Memory grows in a straight line between two lengths, but for the phase in which the peak is, so a guess between two
    lengths is checked.
    """

    def plan(row: int) -> Plan:
        size = [f"data.max_length={row}", f"train.tokens_per_step={row}", "train.gradient_checkpointing=every_1"]
        return made([*given, *size], known)

    low, high = 0, 512
    while fits(found := plan(high)):
        most = min(LONGEST, getattr(found.base.config, "max_position_embeddings", LONGEST))
        if high >= most:
            return most, True
        low, high = high, min(2 * high, most)
    if not low:
        return 0, False
    for _ in range(3):
        at_low, at_high = need(plan(low)), need(plan(high))
        share = (budget(plan(low)) - at_low) / (at_high - at_low)
        guess = int((low + share * (high - low)) // STEP * STEP)
        if guess <= low:
            break
        if fits(plan(guess)):
            low = guess
        else:
            high = guess
        if high - low <= STEP:
            break
    return low, False


def speed(given: list[str], known: Known) -> str:
    """Return tokens per second on rows of 1,024 tokens, in micro-batches as large as fit, at most 2,048 tokens."""
    for size in (2048, 1024, 512):
        row = min(size, 1024)
        more = [f"data.max_length={row}", "train.tokens_per_step=8192", f"train.tokens_per_microbatch={size}"]
        found = made([*given, *more], known)
        if fits(found) and found.tokens_per_second:
            return f"{round(found.tokens_per_second, -2 if found.tokens_per_second > 1000 else -1):,.0f}"
    return "?"


def made(overrides: list[str], known: Known) -> Plan:
    cfg: Any = lora_ft.compose("plan", overrides)
    cfg.hardware = dataclasses.replace(cfg.hardware)
    return planning.make(cfg, cfg.hardware, False, known)


def need(plan: Plan) -> int:
    """Return the peak of the run: of its steps, or of loading the base."""
    return plan.prediction.needed_bytes


def budget(plan: Plan) -> int:
    return (plan.prediction.machine.budget_bytes or 0) - FREE_BYTES


def fits(plan: Plan) -> bool:
    return need(plan) <= budget(plan)


def rows(models: list[str]) -> Iterator[tuple[str, ...]]:
    yield ("base", *CARDS)
    yield ("---",) * (1 + len(CARDS))
    for model in models:
        known = Known(is_quick=True)
        yield (f"`{model}`", *(cell(model, card, known) for card in CARDS.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="default: all")
    process.prepare()
    for row in rows(parser.parse_args().models.split(",")):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
