"""Train in this process, and print its resident memory before the weights are loaded and at its peak, in bytes.

python memory_worker.py FOLDER model=... data=...     ->  {"imports": 450000000, "peak": 1200000000, "lengths": [...]}
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import lora_ft


class Lengths(lora_ft.Callback):
    """Keeps the lengths of the documents of the step with the most tokens."""

    most: list[int] = []  # noqa: RUF012 - one run

    def on_step(self, state: Any, metrics: dict[str, Any]) -> None:
        lengths = [len(state.examples[i].ids) for i in state.steps[metrics["step"] - 1]]
        self.most = max(self.most, lengths, key=sum)


def resident(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


def main(folder: str, overrides: list[str]) -> None:
    train: Any = importlib.import_module("lora_ft.train")
    found: dict[str, Any] = {}
    load = train.load

    def measured_load(*given: Any) -> Any:
        found["imports"] = resident("VmRSS")
        return load(*given)

    train.load, lengths = measured_load, Lengths()
    lora_ft.train(lora_ft.compose("train", overrides), folder=folder, callbacks=[lengths])
    sys.stdout.write(json.dumps(found | {"peak": resident("VmHWM"), "lengths": lengths.most}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
