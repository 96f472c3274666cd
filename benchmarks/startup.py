"""Where the time goes between `lora-ft train` and the forward pass of step 1: one fresh process a case, caches warm.

    python benchmarks/startup.py                      # quant=none and quant=nf4, three runs each
    python benchmarks/startup.py --runs 5 quant=none data=chat data.path=my.jsonl

The child is the command itself, with a mark before and after each of the calls that `lora_ft/train.py` is made of; it
ends where step 1 would begin.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CHILD = """
import json, os, sys, time
spawned, out, *arguments = sys.argv[1:]
marks = [("python", time.time() - float(spawned))]

def mark(phase):
    marks.append((phase, time.time() - float(spawned)))

def timed(module, name, phase):
    inner = getattr(module, name)
    def outer(*args, **kwargs):
        mark("other")
        result = inner(*args, **kwargs)
        mark(phase)
        return result
    setattr(module, name, outer)

import importlib
from lora_ft.cli import entry
mark("read the command")
import_module = importlib.import_module

def imported(name, package=None):
    if name != "lora_ft.train":
        return import_module(name, package)
    mark("read the command")
    train = import_module(name, package)
    mark("import")
    from lora_ft.objectives import sft
    for name, phase in [("prepare", "tokenizer and rows"), ("dry_run", "checks"), ("load", "weights")]:
        timed(train, name, phase)
    def step(*args):
        mark("other")
        with open(out, "w") as file:
            json.dump(marks, file)
        os._exit(0)
    sft.token_loss_sum = step
    return train

importlib.import_module = imported
entry.run("train", arguments)
"""


def phases(overrides: list[str]) -> dict[str, float]:
    """Seconds of each phase of one run, in order of time."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "marks.json"
        settings = ["model=smollm2_135m", "data=chatterbot", "train.max_steps=1", *overrides]
        command = [sys.executable, "-c", _CHILD, str(time.time()), str(out), *settings, f"hydra.run.dir={scratch}/run"]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.is_file():
            raise SystemExit(f"the run ended before step 1, with code {child.returncode}:\n{child.stderr}")
        marks = json.loads(out.read_text())
    seconds: dict[str, float] = {}
    before = 0.0
    for phase, at in marks:
        seconds[phase] = seconds.get(phase, 0.0) + at - before
        before = at
    return seconds


def table(overrides: list[str], runs: int) -> str:
    measured = [phases(overrides) for _ in range(runs)]
    medians = {phase: statistics.median(run[phase] for run in measured) for phase in measured[0]}
    totals = [sum(run.values()) for run in measured]
    lines = [f"{' '.join(overrides)}: median of {runs} runs, seconds"]
    lines += [f"  {phase:<26} {seconds:6.2f}" for phase, seconds in medians.items()]
    lines.append(f"  {'start-up':<26} {statistics.median(totals):6.2f}   ({min(totals):.2f} to {max(totals):.2f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds from the command to step 1, by phase.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    for overrides in [arguments.overrides] if arguments.overrides else [["quant=none"], ["quant=nf4"]]:
        print(table(overrides, arguments.runs))


if __name__ == "__main__":
    main()
