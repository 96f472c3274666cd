"""Trainings that several ranks and one process do alike: each case trains a tiny model, and its adapter is compared.

    torchrun --nproc-per-node=2 tests/ranked.py OUT BASE [CASE ...]        every case, with a whole and a sharded base

OUT/ddp/CASE.json and OUT/shard/CASE.json have what `result` returns.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from classifiers import ONE, SEVERAL, tiny_classifier
from states import detach, some_rows, state_on, trained
from test_classifier_loss import documents
from tiny import tiny_model

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.models.fingerprint import frozen_tensors
from lora_ft.models.load import load_base
from lora_ft.models.shards import Shards, sharded
from lora_ft.ops.ranks import Ranks
from lora_ft.training.ranks import joined
from lora_ft.training.state import TrainingState

STEPS = 20
Make = Callable[[Path, Path, Ranks], TrainingState]


def _sft(family: str = "llama", dtype: torch.dtype = torch.float64, quant: str = "", tie: bool = False,
         dropout: float = 0.0, **train: Any) -> Make:  # fmt: skip
    def make(folder: Path, base: Path, ranks: Ranks) -> TrainingState:
        if quant:
            model = load_base(config.Model(path=str(base)), config.Quant(config.QuantKind[quant]), "cpu").model
        else:
            model = tiny_model(family, dtype=dtype, tie=tie)
        return state_on(
            model,
            folder,
            examples=some_rows(16),
            eval_examples=some_rows(7, seed=1),
            ranks=ranks,
            adapter=config.Adapter(r=4, lora_alpha=8, lora_dropout=dropout),
            train=config.Train(**{"max_steps": STEPS, "tokens_per_step": 90, "eval_every_steps": 8, **train}),
        )

    return make


def _classifier(classes: Classes) -> Make:
    def make(folder: Path, base: Path, ranks: Ranks) -> TrainingState:
        return state_on(
            tiny_classifier("llama", classes, dtype=torch.float64),
            folder,
            examples=documents(classes),
            eval_examples=documents(classes, 5, seed=1),
            classes=classes,
            ranks=ranks,
            objective=config.Objective("classification", multi_label=classes.is_multi),
            train=config.Train(max_steps=STEPS, tokens_per_step=50, tokens_per_microbatch=20),
        )

    return make


# By default a step of 90 tokens is one micro-batch for each rank; micro-batches of 32 tokens are three or more.
CASES: dict[str, Make] = {
    "whole step": _sft(),
    "accumulation": _sft(tokens_per_microbatch=32),
    "rank without work": _sft(tokens_per_microbatch=90),
    "one row at a time": _sft(packing=False),
    "dropout": _sft(tokens_per_microbatch=32, dropout=0.2),
    "recomputation": _sft(tokens_per_microbatch=32, gradient_checkpointing="every_1"),
    "read later": _sft(tokens_per_microbatch=32, log_every_steps=5),
    "early stopping": _sft(tokens_per_microbatch=32, eval_every_steps=1, patience=1, keep=config.Keep.best),
    "tied embedding": _sft(tie=True),
    "gpt2": _sft("gpt2"),
    "experts": _sft("qwen3_moe", tokens_per_microbatch=32),
    "classes": _classifier(ONE),
    "several labels": _classifier(SEVERAL),
    "float32": _sft(dtype=torch.float32, tokens_per_microbatch=32),
    "bfloat16": _sft(dtype=torch.bfloat16, tokens_per_microbatch=32),
    "nf4": _sft(quant="nf4", tokens_per_microbatch=32),
    "int8": _sft(quant="int8", tokens_per_microbatch=32),
}
FLOAT32 = ("float32", "bfloat16", "nf4", "int8")  # adapters of the others are float64


def result(case: str, folder: Path, base: Path, ranks: Ranks) -> dict[str, Any]:
    """Train a case; return its adapter, losses and evaluations, and the bytes of its base that a rank holds at most."""
    state = CASES[case](folder, base, ranks)
    with sharded(state.base, ranks) as shards:
        held = watched(state, shards) if shards else []
        adapter = trained(state)
    state.take_kept_state()
    found = {
        "adapter": adapter.double().tolist(),
        "losses": state.losses,
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in state.evaluations],
        "held": max(held, default=None),
        "at_most": shards.held_bytes if shards else None,
        "whole": shards.whole_bytes if shards else None,
    }
    detach(state)
    return found


def watched(state: TrainingState, shards: Shards) -> list[int]:
    """Return a list that gets, whenever a layer is needed, the bytes of all storages of the base and of the parts."""
    held, own = [], shards.need

    def need(index: int, ahead: int) -> None:
        own(index, ahead)
        storages = {each.data_ptr(): each for each in (t.untyped_storage() for t in frozen_tensors(state.base))}
        held.append(sum(each.nbytes() for each in storages.values()) + shards.part_bytes)

    shards.need = need
    return held


def main() -> None:
    out, base, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    with joined(config.Dist(config.DistMode.ddp, timeout=120), "cpu") as ranks:
        for case in cases or CASES:
            for mode in ("ddp", "shard"):
                chosen = dataclasses.replace(ranks, shards=mode == "shard")
                found = result(case, out / f"rank-{ranks.rank}" / mode / case, base, chosen)
                ranks.check_equal(case, found["adapter"])
                if ranks.is_main:
                    (out / mode).mkdir(exist_ok=True)
                    (out / mode / f"{case}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
