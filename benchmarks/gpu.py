"""LoRA and QLoRA on a GPU: lora_ft beside plain PEFT, TRL and Unsloth, on random weights of real shapes.

    python benchmarks/gpu.py                                   # three shapes, four trainers, 4,096 tokens a step
    python benchmarks/gpu.py --shapes llama3_1_8b --methods qlora --rows mixed
    python benchmarks/gpu.py --tiny                            # what runs where no GPU is: a tiny shape on the CPU

Nothing is downloaded: weights and token ids are drawn, and a speed does not depend on their values. Each
trainer runs in a process of its own. One that is not installed, or runs out of memory, is skipped with the
reason; one that fails makes the exit code 1.

Before ours is timed, its loss and the gradient of each parameter are compared with those of its plain paths, which
are transformers' and PEFT's own forward, and with float32's. Counted are real tokens, padding is not. Each trainer
runs twice, as checkpointing is speed for memory: all layers recomputed (every_1), and none (off) or, ours, as few
as the memory asks for (auto). `share` is of what one large matrix product reaches here, no recomputation counted.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_ft.io import durable

RESULTS = Path(__file__).parent / "results"
CHILD = Path(__file__).with_name("gpu_trainers.py")
PACKAGES = {"peft": "peft", "trl": "trl", "unsloth": "unsloth"}
METHODS = ("qlora", "lora")
NAMES = ("shape", "method", "trainer", "checkpoint")  # of a result
# How much is recomputed. Ours settles that by the free memory unless told; the others are told both ways.
CHECKPOINTS = {"lora_ft": ("auto", "every_1"), **dict.fromkeys(PACKAGES, ("every_1", "off"))}

# Sizes as published in the models' config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True),
    "smollm2_135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama3_2_1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "llama3_1_8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a trainer on a shape.

    rows: equal (512 tokens each) or mixed (lognormal, mean about 180). checkpoint: every_1 recomputes all layers,
    off none, auto (ours) what the memory asks for; Unsloth's every_1 is its own form, which also offloads.
    """

    shape: str
    method: str
    trainer: str
    checkpoint: str
    rows: str
    tokens: int
    steps: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def lengths_of(case: Case) -> list[int]:
    """Lengths of the documents of a step; they add up to `case.tokens`."""
    drawn, lengths = random.Random(0), []
    while (left := case.tokens - sum(lengths)) > 0:
        length = 512 if case.rows == "equal" else max(20, int(drawn.lognormvariate(math.log(160), 0.48)))
        lengths.append(min(length, left))
    return lengths


def in_own_process(case: Case) -> dict[str, Any]:
    """Measure a case in a fresh interpreter; a crash of it is a reason like any other."""
    if case.trainer in PACKAGES and importlib.util.find_spec(PACKAGES[case.trainer]) is None:
        return {"skipped": f"{PACKAGES[case.trainer]} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(CHILD), case.trainer, json.dumps(dataclasses.asdict(case)), str(result)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode or not result.exists():
            return {"failed": (done.stdout.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
        return json.loads(result.read_text("utf-8"))


def environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "bitsandbytes", "flash-attn", "liger-kernel", *PACKAGES.values())
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "cuda": torch.version.cuda, "versions": versions}


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(
        box=None,
        padding=(0, 1, 0, 0),
        title="median of steps; share: of the matmul ceiling; error: of our gradient, of the bound",
    )
    for column in NAMES:
        shown.add_column(column)
    for column in ("tokens/s", "peak GiB", "reserved", "share", "error"):
        shown.add_column(column, justify="right")
    for result in results:
        names = [result["case"][name] for name in NAMES]
        if "tokens_per_second" not in result:
            shown.add_row(*names, "-")
            continue
        reserved, check = result["reserved_bytes"], result.get("check")
        shown.add_row(
            *names,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
            "-" if reserved is None else f"{reserved / 2**30:.2f}",
            f"{result['share']:.0%}",
            f"{check['largest_error']:.2f}" if check else "-",
        )
    return shown


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    tiny = not torch.cuda.is_available()
    parser.add_argument("--tiny", action="store_true", default=tiny, help="a tiny shape; the default without a GPU")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default: all but tiny, or tiny")
    parser.add_argument("--methods", default=",".join(METHODS), help="qlora (NF4, double quantization), lora")
    parser.add_argument("--trainers", default=",".join(CHECKPOINTS))
    parser.add_argument("--rows", choices=("equal", "mixed"), default="equal", help="equal: 512 tokens, no padding")
    parser.add_argument("--tokens", type=int, help="tokens of a step; default 4096, tiny 256")
    parser.add_argument("--steps", type=int, help="timed steps, after two that are not; default 8, tiny 2")
    parser.add_argument("--out", type=Path, help="file of results; default benchmarks/results/gpu-DATE.json")
    given = parser.parse_args(words)
    given.shapes = (given.shapes or ("tiny" if given.tiny else ",".join(n for n in SHAPES if n != "tiny"))).split(",")
    given.methods, given.trainers = given.methods.split(","), given.trainers.split(",")
    given.tokens = given.tokens or (256 if given.tiny else 4096)
    given.steps = given.steps or (2 if given.tiny else 8)
    for name, known in (("shapes", SHAPES), ("methods", METHODS), ("trainers", CHECKPOINTS)):
        if unknown := set(getattr(given, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return given


def main(words: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a trainer failed, else 0."""
    given = arguments(words)
    console, results = Console(), []
    for shape, method, trainer in itertools.product(given.shapes, given.methods, given.trainers):
        for checkpoint in CHECKPOINTS[trainer]:
            case = Case(shape, method, trainer, checkpoint, given.rows, given.tokens, given.steps)
            console.print(f"{shape} {method} {trainer} {checkpoint} ...", highlight=False)
            results.append({"case": dataclasses.asdict(case)} | in_own_process(case))
    now = datetime.datetime.now(datetime.UTC)
    report = {"date": now.isoformat(timespec="seconds"), "environment": environment(case.device), "results": results}
    out = given.out or RESULTS / f"gpu-{now:%Y-%m-%d-%H%M%S}.json"
    durable.make_folder(out.parent)
    durable.write_json(out, report)
    console.print(table(results))
    for result in results:
        for outcome in ("skipped", "failed"):
            if outcome in result:
                names = " ".join(result["case"][name] for name in NAMES)
                console.print(f"{names} {outcome}: {result[outcome]}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {out}", highlight=False, soft_wrap=True)
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
