"""Estimates of a training's memory, side by side: ours, and what people use, on the same cases.

    python benchmarks/estimators.py                     # cases with a published figure; 8B shapes take a minute
    python benchmarks/estimators.py --tensors           # also the tensors of steps of small models, measured here
    python benchmarks/estimators.py --measure           # also trains SmolLM2-135M on this CPU and measures the process

A published figure is that of another trainer with the same base, quantization, adapter and tokens, whose code keeps
other tensors. So its column tells whether an estimate is of use to somebody who has this card, not how exact it is;
tests/ compares ours with lora_ft itself. What each estimator computes, and where it was published:

    x 1.2            parameters x bytes of the weights' dtype x 1.2, the rule most often quoted
                     https://www.substratus.ai/blog/calculating-gpu-memory-for-llm/ (for serving)
    LLaMA-Factory    its table "Hardware Requirement": 7B takes 6, 10 or 16 GB in 4, 8 or 16 bits, xB x/2, x or 2x
                     https://github.com/hiyouga/LLaMA-Factory, README, August 2026
    accelerate       `accelerate estimate-memory`, the installed version: size of the weights in a dtype, and for
                     16 and 32 bits "training using Adam" of all parameters
    DeepSpeed        estimate_zero2_model_states_mem_needs for one GPU: 20 bytes per parameter, all trained
                     https://github.com/deepspeedai/DeepSpeed, deepspeed/runtime/zero/stage_1_and_2.py
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lora_ft
from lora_ft.io import process

HERE = Path(__file__).resolve().parent
GIB = 2**30
_LISTED = (7, 14, 30, 70)  # sizes of LLaMA-Factory's table, in billions of parameters, and its GB by bits
_LLAMA_FACTORY = {16: (16, 32, 64, 160), 8: (10, 20, 40, 80), 4: (6, 12, 24, 48)}
_BITS = {"none": 16, "int8": 8, "nf4": 4}

_FMS = "IBM fms-acceleration, a100_80gb_liger.csv, with Liger's kernels"
_TORCHTUNE = "torchtune README, RTX 4090, compiled"
_EACH = ["train.gradient_checkpointing=every_1", "train.samples=0"]
_ATTENTION = "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"
_TORCHTUNE_LAYERS = "adapter.target_modules=[q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@dataclass(frozen=True)
class Case:
    """A training: overrides of `lora-ft plan`, the bytes that it needed, of what, and who measured them."""

    name: str
    overrides: list[str]
    bytes: int | None
    source: str
    of_process: bool = False


@dataclass(frozen=True)
class Model:
    """Facts of a base that the estimators read."""

    parameters: int
    float32_bytes: int
    bits: int


@dataclass(frozen=True)
class Row:
    """A training, the bytes that it needed, what lora_ft predicts, and what the others read."""

    name: str
    bytes: int | None
    ours: int
    model: Model


def published() -> Iterator[Case]:
    """Yield the trainings of others whose settings are known well enough to plan them."""
    for tokens, size in ((16384, 14_411_297_792), (32768, 22_936_744_960), (65536, 39_987_639_296)):
        overrides = ["model=llama3_1_8b", "quant=nf4", "adapter.r=16", "adapter.lora_dropout=0.1", _ATTENTION]
        yield _at(f"8B QLoRA r16, {tokens:,} tokens", overrides, 4096, tokens, size, _FMS)
    for tokens, size in ((16384, 13_035_024_896), (32768, 21_761_798_656)):
        overrides = ["model=mistral_7b", "quant=nf4", "adapter.r=16", "adapter.lora_dropout=0.1", _ATTENTION]
        yield _at(f"7B QLoRA r16, {tokens:,} tokens", overrides, 4096, tokens, size, _FMS)
    for tokens, size in ((16384, 24_905_936_896), (32768, 33_567_698_944)):
        overrides = ["model=llama3_1_8b", "adapter.r=16", "adapter.lora_dropout=0.1", _ATTENTION]
        yield _at(f"8B LoRA r16, {tokens:,} tokens", overrides, 4096, tokens, size, _FMS)
    for quant, size in (("nf4", 7.4), ("none", 16.2)):
        overrides = ["model=llama3_1_8b", f"quant={quant}", "adapter.r=8", _TORCHTUNE_LAYERS]
        name = "8B QLoRA r8, 4,096 tokens" if quant == "nf4" else "8B LoRA r8, 4,096 tokens"
        yield _at(name, overrides, 2048, 4096, int(size * GIB), _TORCHTUNE)


def _at(name: str, overrides: list[str], row: int, tokens: int, size: int, source: str) -> Case:
    more = [f"data.max_length={row}", f"train.tokens_per_step={tokens}", "hardware=a100_80gb", *_EACH]
    return Case(name, [*overrides, *more], size, source)


def on_this_cpu() -> Iterator[Case]:
    """Yield trainings of SmolLM2-135M to measure here, in float32 or quantized."""
    for quant, tokens, rank, recompute in (
        ("none", 512, 16, "off"), ("none", 1536, 16, "off"), ("none", 1536, 128, "every_1"),
        ("nf4", 512, 16, "off"), ("nf4", 1536, 16, "off"), ("int8", 1536, 16, "every_2"),
    ):  # fmt: skip
        overrides = [
            "model=smollm2_135m", f"quant={quant}", f"adapter.r={rank}", f"train.gradient_checkpointing={recompute}",
            "data.max_length=512", f"train.tokens_per_step={tokens}", "train.samples=0", "device=cpu",
        ]  # fmt: skip
        name = f"135M {quant} r{rank}, {tokens:,} tokens, recompute {recompute}"
        yield Case(name, overrides, None, "measured here: resident memory of lora-ft train", of_process=True)


def measured(case: Case) -> Case:
    """Train a case for two steps in a process of its own, and return it with the most memory that it had."""
    from measure import run

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"text": "word " * 20_000}) + "\n" for _ in range(2)))
        command = [
            sys.executable, "-m", "lora_ft", "train", *case.overrides, "data=text", f"data.path={rows}",
            "data.too_long=split", "data.eval_fraction=0", "train.max_steps=2", "train.save_every_steps=null",
            f"hydra.run.dir={folder}/run",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        found = run(command, environment, Path(folder, "log"))
        if found.returncode:
            raise SystemExit(f"{case.name}: {Path(folder, 'log').read_text('utf-8')[-2000:]}")
        return replace(case, bytes=found.peak_process_bytes)


def ours(case: Case) -> int:
    """Return the peak that lora_ft predicts: of tensors, as torch counts them, or of the whole process."""
    from lora_ft.memory import machine, workload
    from lora_ft.memory.prediction import predict
    from lora_ft.models.described import described

    cfg = lora_ft.compose("plan", case.overrides)
    device = machine.resolve(cfg.hardware, cfg.device)
    found = predict(cfg, described(cfg.model).config, workload.of_settings(cfg), device)
    return found.peak_bytes if case.of_process else found.trace.peak_bytes


def rows_of_tests() -> Iterator[Row]:
    """Yield some cases of tests/memory_cases.py: the most bytes of tensors in the second step of a real run."""
    sys.path[:0] = [str(HERE.parent / "tests")]
    from memory_cases import measured as measured_tensors
    from memory_cases import predicted
    from test_trace_accuracy import CASES

    for case in [each for each in CASES if each.fast]:
        with tempfile.TemporaryDirectory() as folder:
            needed = measured_tensors(case, Path(folder))
        bits = {"none": 32}.get(case.quant, _BITS.get(case.quant, 32))
        total, parameters = _accelerate_total(case.config)
        name = f"{case.shape} {case.quant} r{case.rank} {case.recompute}, {sum(case.lengths)} tokens"
        yield Row(name, needed, predicted(case).peak_bytes, Model(parameters, total, bits))


def row_of(case: Case) -> Row:
    return Row(case.name, case.bytes, ours(case), model_of(case))


def model_of(case: Case) -> Model:
    from lora_ft.models.described import described

    cfg = lora_ft.compose("plan", case.overrides)
    total, parameters = _accelerate_total(described(cfg.model).config)
    bits = 32 if cfg.quant.kind.value == "none" and case.of_process else _BITS[cfg.quant.kind.value]
    return Model(parameters, total, bits)


def _accelerate_total(config: Any) -> tuple[int, int]:
    """Return what accelerate's command takes for the size of a model in float32, and its parameters."""
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        body = AutoModel.from_config(config, dtype=torch.float32)
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return calculate_maximum_sizes(body)[0], sum(parameter.numel() for parameter in whole.parameters())


def rule_of_thumb(model: Model) -> float:
    return model.parameters * model.bits / 8 * 1.2


def llama_factory(model: Model) -> float:
    """Return the entry of the nearest size that its table lists, or for small models that of its last column."""
    billions, bits = model.parameters / 1e9, min(model.bits, 16)
    if billions < _LISTED[0] / 2:
        return billions * bits / 8 * 1e9
    column = min(range(len(_LISTED)), key=lambda i: abs(_LISTED[i] - billions))
    return _LLAMA_FACTORY[bits][column] * 1e9


def accelerate_weights(model: Model) -> float:
    return model.float32_bytes * model.bits / 32


def accelerate_adam(model: Model) -> float | None:
    """Return "training using Adam"; None for 4 and 8 bits, for which the command has no figure."""
    from accelerate.commands.estimate import estimate_training_usage

    if model.bits < 16:
        return None
    return max(estimate_training_usage(model.float32_bytes, "float32" if model.bits == 32 else "float16").values())


def deepspeed(model: Model) -> float:
    return 20 * model.parameters


OTHERS: dict[str, Callable[[Model], float | None]] = {
    "x 1.2": rule_of_thumb,
    "LLaMA-Factory": llama_factory,
    "accelerate, weights": accelerate_weights,
    "accelerate, Adam": accelerate_adam,
    "DeepSpeed": deepspeed,
}


def table(cases: list[Row]) -> str:
    """Return a Markdown table: GB, and in parentheses the difference from what was measured or published."""
    rows = [("case", "needed, GB", "ours", *OTHERS), ("---",) * (3 + len(OTHERS))]
    errors: dict[str, list[float]] = {name: [] for name in ("ours", *OTHERS)}
    for case in cases:
        found = {"ours": float(case.ours), **{name: estimate(case.model) for name, estimate in OTHERS.items()}}
        for name, value in found.items():
            if value is not None and case.bytes:
                errors[name].append(value / case.bytes - 1)
        cells = (_cell(value, case.bytes) for value in found.values())
        rows.append((case.name, "" if case.bytes is None else _gigabytes(case.bytes), *cells))
    median = (_median(errors[name]) for name in ("ours", *OTHERS))
    rows.append(("**median of the differences, without sign**", "", *median))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: float | None, needed: int | None) -> str:
    if value is None:
        return "none"
    return _gigabytes(value) + (f" ({value / needed - 1:+.0%})" if needed else "")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}" if count > 1e8 else f"{count / 1e9:.4f}"


def _median(errors: list[float]) -> str:
    return f"{sorted(map(abs, errors))[len(errors) // 2]:.0%}" if errors else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="train and measure the cases of this CPU as well")
    process.prepare()
    parser.add_argument("--tensors", action="store_true", help="measure the tensors of small models as well")
    given = parser.parse_args()
    cases = list(published())
    if given.measure:
        cases = [measured(case) for case in on_this_cpu()] + cases
    print(table([*(rows_of_tests() if given.tensors else ()), *map(row_of, cases)]))
    for source in dict.fromkeys(case.source for case in cases):
        print(f"\n{source}: {', '.join(case.name for case in cases if case.source == source)}")


if __name__ == "__main__":
    main()
