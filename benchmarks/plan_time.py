"""Predicted beside measured time of training steps on this CPU, and predicted beside published speeds of GPUs.

    python benchmarks/plan_time.py measured [--rounds 3] [--only smollm2_135m]     one table, a few minutes
    python benchmarks/plan_time.py published                                       no measurement, half a minute

measured: the rates of the machine are measured once a round; every case of a round takes one step to warm up and then
two timed ones, so that cases alternate. The prediction is that of the medians of the rates.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from lora_ft.io import process

process.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from shapes import config_of  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import lora_ft  # noqa: E402
from lora_ft import config  # noqa: E402
from lora_ft.data.dataset import Dataset  # noqa: E402
from lora_ft.data.rows import Example  # noqa: E402
from lora_ft.memory import cards, machine, measure  # noqa: E402
from lora_ft.memory.roofline import StepTime, step_time  # noqa: E402
from lora_ft.memory.trace import trace_step  # noqa: E402
from lora_ft.models.acceleration import accelerate  # noqa: E402
from lora_ft.models.load import Base, Identity, load_tokenizer  # noqa: E402
from lora_ft.ops.device import CPU  # noqa: E402
from lora_ft.ops.dropout import switch_off_dropout  # noqa: E402
from lora_ft.ops.gradient_checkpointing import recomputed_layers  # noqa: E402
from lora_ft.ops.ranks import ALONE  # noqa: E402
from lora_ft.training.shared import load  # noqa: E402
from lora_ft.training.state import TrainingState, attached  # noqa: E402
from lora_ft.training.step import read  # noqa: E402
from lora_ft.training.trainer import apply_gradient, compute_gradient  # noqa: E402

ROW = 512  # tokens of a document
STEPS = 2  # timed in a round
SMOLLM2 = "smollm2_135m"
TINY = {
    "tiny_gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024,
                  "bos_token_id": 0, "eos_token_id": 0},
    "tiny_qwen3": {"model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}  # fmt: skip
VOCABULARY = 4096  # of the tiny models

# Published by others for their own trainers: name, shape, quantization, rank, rows, recomputation, card, tokens/s.
PUBLISHED = (
    ("torchtune README, compiled", "llama3_1_8b", "nf4", 8, [2048] * 2, "every_1", "rtx_4090", "2,413"),
    ("torchtune README, compiled", "llama3_1_8b", "none", 8, [2048] * 2, "every_1", "rtx_4090", "3,083"),
    ("fms-acceleration, PEFT to fused", "mistral_7b", "nf4", 16, [4096], "every_1", "a100_80gb", "2,904 to 4,128"),
    ("fms-acceleration, PEFT to fused", "mistral_7b", "none", 16, [4096], "every_1", "a100_80gb", "3,324 to 3,781"),
    ("LoRAFusion, Megatron to fused", "llama3_1_8b", "none", 16, [1024] * 8, "off", "h100_80gb", "12,350 to 14,870"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to predict and to measure."""

    shape: str
    quant: str
    tokens: int
    recompute: str

    @property
    def lengths(self) -> list[int]:
        return [min(ROW, self.tokens - start) for start in range(0, self.tokens, ROW)]

    @property
    def cfg(self) -> config.TrainRun:
        return settings(self.quant, 16, self.recompute, self.tokens)

    @property
    def model_config(self) -> Any:
        if self.shape == SMOLLM2:
            return config_of(self.shape)
        given = dict(TINY[self.shape])
        return AutoConfig.for_model(given.pop("model_type"), vocab_size=VOCABULARY, **given)


CASES = (
    *(Case(SMOLLM2, "none", tokens, "off") for tokens in (128, 256, 512, 1024)),
    *(Case(SMOLLM2, "none", 512, recompute) for recompute in ("every_2", "every_1")),
    *(Case(SMOLLM2, "nf4", tokens, "off") for tokens in (128, 512)),
    Case(SMOLLM2, "nf4", 512, "every_1"),
    *(Case("tiny_gpt2", "none", tokens, "off") for tokens in (256, 1024)),
    *(Case("tiny_qwen3", "none", tokens, recompute) for tokens, recompute in ((256, "off"), (1024, "every_1"))),
)


def settings(quant: str, rank: int, recompute: str, tokens: int) -> config.TrainRun:
    """Return the settings of a run without rows."""
    return lora_ft.compose(
        "train",
        ["model=smollm2_135m", f"quant={quant}", f"adapter.r={rank}", f"train.gradient_checkpointing={recompute}",
         "train.max_steps=100", f"train.tokens_per_step={tokens}"],
    )  # fmt: skip


# --- measured ---------------------------------------------------------------------------------------------------------


def measured(cases: list[Case], rounds: int) -> None:
    """Print the table of the cases."""
    bases = {(case.shape, case.quant): base_of(case) for case in cases}
    seconds: dict[Case, list[float]] = defaultdict(list)
    rates, begun = [], busy_seconds()
    for number in range(rounds):
        measure.rates_of.cache_clear()
        rates.append(measure.rates_of(torch.device("cpu")))
        for case in cases:
            seconds[case] += steps_of(case, *bases[case.shape, case.quant])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    own, everybody = (now - before for now, before in zip(busy_seconds(), begun, strict=True))
    here = typical(rates)
    print(
        f"{here.matmul['float32'] / 1e9:.0f} GFLOP/s, {here.bandwidth / 1e9:.0f} GB/s, in caches "
        f"{(here.cached_bandwidth or 0) / 1e9:.0f} GB/s, {here.launch_seconds * 1e6:.0f} us an operation; "
        f"other processes took {max(0, everybody - own) / everybody:.0%} of the CPU time used\n"
    )
    print("| step | measured, s | predicted, s | predicted / measured | products, traffic, overhead, s |")
    print("|---|---|---|---|---|")
    for case in cases:
        found = predicted(case, here)
        middle, parts = median(seconds[case]), list(found.by_part.values())[:3]
        print(
            f"| {case.shape}, {case.quant}, {case.tokens:,} tokens, {case.recompute} | {middle:.3f} "
            f"({min(seconds[case]):.3f}-{max(seconds[case]):.3f}) | {found.seconds:.3f} | {found.seconds / middle:.2f} "
            f"| {', '.join(f'{part:.3f}' for part in parts)} |"
        )


def base_of(case: Case) -> tuple[Base, Any]:
    """Return a loaded or random base, accelerated, and its paths."""
    tokenizer = load_tokenizer(case.cfg.model)
    if case.shape == SMOLLM2:
        loaded = load(case.cfg, tokenizer)
        return loaded.base, loaded.accelerated.paths
    model = AutoModelForCausalLM.from_config(case.model_config, dtype=torch.float32).requires_grad_(False).eval()
    switch_off_dropout(model)
    identity = Identity(id="tiny", path="tiny", folder=None, revision=None, config_sha256="", weights_sha256=None)
    return Base(model, tokenizer, identity, ()), accelerate(model, case.cfg.fast).paths


def steps_of(case: Case, base: Base, paths: Any) -> list[float]:
    """Return the seconds of the timed steps."""
    generator = np.random.default_rng(0)
    examples = [
        Example(generator.integers(4, VOCABULARY, length).astype(np.int32), np.arange(length) > 0, "random ids")
        for length in case.lengths
    ]
    report: Any = type("Report", (), {"sha256": ""})
    dataset = Dataset(train=examples, eval=[], eval_prompts=[], answers=None, report=report)
    with tempfile.TemporaryDirectory() as folder, attached(case.cfg, Path(folder), base, dataset, paths, "") as state:
        state.model.train()
        with recomputed_layers(state.base, case.recompute):
            return list(timed(state))[1:]


def timed(state: TrainingState) -> Iterator[float]:
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        step = compute_gradient(state, audited=False)
        read([step], ALONE)
        apply_gradient(state, step)
        yield time.perf_counter() - begun


def busy_seconds() -> tuple[float, float]:
    """Return the CPU seconds of this process, and of all processes since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # without idle and waiting for disks
    return time.process_time(), busy / os.sysconf("SC_CLK_TCK")


def typical(rates: list[measure.Rates]) -> machine.Machine:
    """Return this machine with the medians of some measured rates."""

    def middle(name: str) -> float:
        return median(getattr(each, name) for each in rates)

    return machine.Machine(
        name="cpu",
        target=CPU,
        memory_bytes=None,
        bandwidth=middle("bandwidth"),
        cached_bandwidth=middle("cached_bandwidth"),
        launch_seconds=middle("launch_seconds"),
        matmul={dtype: median(each.matmul[dtype] for each in rates) for dtype in rates[0].matmul},
    )


def predicted(case: Case, here: machine.Machine) -> StepTime:
    """Return the predicted time of a case."""
    found = step_time(trace_step(case.cfg, case.model_config, case.lengths, here.target).costs, here)
    assert found is not None
    return found


# --- published --------------------------------------------------------------------------------------------------------


def published() -> None:
    """Print what is predicted for work whose speed others have published; nothing here is measured."""
    machines = {card.choice: machine.resolve(card.hardware, "auto") for card in cards.cards()}
    print("| published by | work | card | published, tokens/s | predicted, tokens/s |\n|---|---|---|---|---|")
    for source, shape, quant, rank, lengths, recompute, choice, speed in PUBLISHED:
        cfg = settings(quant, rank, recompute, sum(lengths))
        found = step_time(trace_step(cfg, config_of(shape), lengths, machines[choice].target).costs, machines[choice])
        assert found is not None
        work = f"{shape}, {quant}, r {rank}, {len(lengths)} x {lengths[0]:,}, {recompute}"
        print(f"| {source} | {work} | {choice} | {speed} | {sum(lengths) / found.seconds:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("measured", "published"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose shape begins so")
    given = parser.parse_args()
    if given.table == "published":
        published()
    else:
        measured([case for case in CASES if case.shape.startswith(given.only)], given.rounds)


if __name__ == "__main__":
    main()
