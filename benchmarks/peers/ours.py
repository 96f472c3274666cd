"""lora_ft, by its command line and nothing else; read off from outside, as its metrics.jsonl grows.

fp32, nf4, int8: the base.    checkpoint: fp32, every layer recomputed.    plain: fp32 without the fast paths.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import protocol

VARIANTS = {
    "fp32": [],
    "nf4": ["quant=nf4"],
    "int8": ["quant=int8"],
    "checkpoint": ["train.gradient_checkpointing=every_1"],
    "plain": ["fast=off"],
}
POLL_SECONDS = 0.01


def command(given: protocol.Arguments) -> list[str]:
    case = given.settings
    return [
        str(Path(sys.executable).with_name("lora-ft")), "train", "model=local", f"model.path={case.model}",
        "data=chat", f"data.path={given.case / 'train.jsonl'}", f"data.train_on={case.supervision}",
        "data.eval_fraction=0", f"adapter.r={case.r}", f"adapter.lora_alpha={case.alpha}", f"optim.lr={case.lr}",
        "optim.schedule=constant", f"optim.max_grad_norm={case.clip}", f"train.max_steps={case.steps}",
        f"train.tokens_per_step={case.tokens_per_step[given.seed % len(case.tokens_per_step)]}",
        "train.samples=0", f"seed={given.seed}", f"hydra.run.dir={given.out / 'run'}", *VARIANTS[given.variant],
    ]  # fmt: skip


def main() -> None:
    given = protocol.arguments()
    metrics = given.out / "run" / "metrics.jsonl"
    process = subprocess.Popen(command(given))
    ends: list[float] = []
    while process.poll() is None:
        whole = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        ends += [time.time()] * (whole - len(ends))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        sys.exit(process.returncode)
    steps = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    ends += [time.time()] * (len(steps) - len(ends))
    # A step as its metrics have it is shorter than the time between two lines, which holds the writing as well.
    begin = ends[0] - steps[0]["seconds"]
    watch = protocol.Stopwatch(first_forward=begin)
    for step, end in zip(steps, ends, strict=True):
        watch.tokens.append(step["tokens"])
        watch.seconds.append(end - begin)
        watch.learned(step["loss"], step["grad_norm"])
        begin = end
    protocol.report(watch.outcome(given.out / "run" / "adapter", "lora_ft", "transformers", "peft"))


main()
