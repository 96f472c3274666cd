"""The product as its users run it: `lora-ft train`, killed and resumed, `eval`, `merge`, a sweep with a job too large.

A small base with random weights, saved as a folder with a tokenizer; chat rows. The runs are compared by their losses,
and by the bytes of their adapters: on a GPU these are the same twice only with train.deterministic.
"""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_stages.bases import WORDS, base
from gpu_stages.commands import Command, start
from gpu_stages.setting import Part, Setting, attempt
from lora_ft.io import durable

STEPS = 12
DETERMINISTIC = "train.deterministic=true"
LEFT_BYTES = 3 * 2**30  # of the GPU's memory, for the sweep whose second job must not fit
DRY_BYTES = 2 * 2**30  # of its processes' memory in a dry run
# Largest difference of a loss from that of the run it is compared with, relative.
SAME, OTHER_DTYPE, QUANTIZED = 1e-3, 0.02, 0.05


def run(setting: Setting) -> Iterator[Part]:
    if setting.dry:  # before the forks
        import lora_ft.eval
        import lora_ft.merge
        import lora_ft.train  # noqa: F401
    common = prepare(setting)
    runs = variants(setting)
    for names in grouped(list(runs), max(2, (os.cpu_count() or 2) // 2)):
        started = {name: start(setting, name, "train", *common, *runs[name], f"hydra.run.dir={name}") for name in names}
        for name, command in started.items():
            yield name, attempt(trained, setting, command, name)
    for name, tolerance in {"fast_off": SAME, "other_dtype": OTHER_DTYPE, "nf4": QUANTIZED, "int8": QUANTIZED}.items():
        bound = max(tolerance, setting.sized(OTHER_DTYPE, 0))  # on a GPU, kernels round in bfloat16
        yield f"losses of {name}", attempt(same_losses, setting, name, bound)
    yield "same bytes", attempt(same_bytes, setting, "none", "again", setting.dry)
    yield "same bytes, deterministic", attempt(same_bytes, setting, "deterministic", "deterministic_again", True)
    yield "killed and resumed", attempt(killed, setting, [*common, DETERMINISTIC])
    yield "eval", attempt(evaluated, setting)
    yield "merge", attempt(merged, setting)
    yield "sweep", attempt(sweep, setting, common)


def prepare(setting: Setting) -> list[str]:
    """Write base and rows, and return the overrides that all runs share."""
    shape, layers = setting.sized(("smollm2_135m", 4), ("tiny", 2))
    folder = base(setting, shape, layers)
    drawn, words = random.Random(0), [f"w{n}" for n in range(WORDS)]
    rows = [{"prompt": " ".join(drawn.choices(words, k=6)), "completion": " ".join(drawn.choices(words, k=4))}
            for _ in range(48)]  # fmt: skip
    durable.write_text(setting.work / "chat.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    os.chdir(setting.work)  # the commands' run folders are relative
    return [
        "model=local", f"model.path={folder}", "data.path=chat.jsonl", "data.eval_fraction=0.2",
        f"train.max_steps={STEPS}", "train.tokens_per_step=128", "train.samples=0", "adapter.r=8", device(setting),
    ]  # fmt: skip


def device(setting: Setting) -> str:
    return f"device={setting.device}"


def variants(setting: Setting) -> dict[str, list[str]]:
    """Return the runs by the names of their folders, with the overrides in which they differ."""
    return {
        "none": ["train.samples=2"],
        "again": [],
        "nf4": ["quant=nf4"],
        "int8": ["quant=int8"],
        "fast_off": ["fast=off"],
        "other_dtype": [f"model.dtype={setting.sized('float32', 'bfloat16')}"],
        "deterministic": [DETERMINISTIC],
        "deterministic_again": [DETERMINISTIC],
    }


def grouped(names: list[str], size: int) -> Iterator[list[str]]:
    yield from (names[start : start + size] for start in range(0, len(names), size))


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def trained(setting: Setting, command: Command, name: str) -> dict[str, Any]:
    """Return the figures of a run; it fails if its eval loss is not lower than that of its base."""
    seconds = command.finish()
    kept = ("eval_loss", "base_eval_loss", "peak_memory_bytes", "adapter_sha256")
    found = {"seconds": seconds, **{key: result(setting.work / name)[key] for key in kept}}
    return found if found["eval_loss"] < found["base_eval_loss"] else found | {"failed": "the eval loss did not fall"}


def same_losses(setting: Setting, name: str, bound: float) -> dict[str, Any]:
    """Compare the losses of all steps with those of the run `none`."""
    pairs = list(zip(losses(setting.work / "none"), losses(setting.work / name), strict=True))
    difference = max(abs(a - b) / a for a, b in pairs)
    failed = {} if difference <= bound else {"failed": f"losses differ by {difference:.1e}, more than {bound}"}
    return {"difference": difference, "first": pairs[0], "last": pairs[-1]} | failed


def same_bytes(setting: Setting, first: str, second: str, required: bool) -> dict[str, Any]:
    """Compare the adapters of two runs with the same settings."""
    one, two = (result(setting.work / name)["adapter_sha256"] for name in (first, second))
    failed = {"failed": f"adapter_sha256 {one[:12]} and {two[:12]}"} if required and one != two else {}
    return {"same": one == two, "summary": "same bytes" if one == two else "other bytes"} | failed


def killed(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """Kill a run after its first checkpoint and resume it; compare it with one that was not killed."""
    longer = [*overrides, "train.max_steps=40", "train.save_every_steps=4"]
    whole = start(setting, "whole", "train", *longer, "hydra.run.dir=whole")
    victim = start(setting, "killed", "train", *longer, "hydra.run.dir=killed")
    victim.kill_when(lambda: any((setting.work / "killed" / "checkpoints").glob("step-*")))
    steps = len(losses(setting.work / "killed"))
    whole.finish()
    start(setting, "resumed", "train", "resume=killed").finish()
    found = same_bytes(setting, "whole", "killed", True)
    return {"killed_after_steps": steps, **found}


def evaluated(setting: Setting) -> dict[str, Any]:
    return {"seconds": start(setting, "eval", "eval", "run=nf4", device(setting)).finish()}


def merged(setting: Setting) -> dict[str, Any]:
    seconds = start(setting, "merge", "merge", "run=none", "out=merged", device(setting)).finish()
    return {"seconds": seconds, "bytes": (setting.work / "merged" / "model.safetensors").stat().st_size}


def sweep(setting: Setting, common: list[str]) -> dict[str, Any]:
    """Sweep over a rank that fits and one that does not: one result, one failure for lack of memory (exit code 7)."""
    own = setting.sized(["adapter.r=8,8192"], ["adapter.r=8,1000000", "adapter.target_modules=[q_proj]"])
    words = [*(word for word in common if not word.startswith("adapter.r=")), *own, "hydra.sweep.dir=sweep"]
    context: Any = multiprocessing.get_context("spawn")
    filled, release = context.Event(), context.Event()
    ballast = context.Process(target=fill_memory, args=(filled, release))
    if not setting.dry:
        ballast.start()
        while not filled.wait(0.2):
            if not ballast.is_alive():
                raise RuntimeError("the process that fills the memory of the GPU has ended")
    try:
        memory = setting.sized(None, DRY_BYTES)
        seconds = start(setting, "sweep", "sweep", *words, memory=memory).finish(expected=3)
    finally:
        release.set()
        if not setting.dry:
            ballast.join()
    failure = json.loads((setting.work / "sweep" / "1" / "failure.json").read_text("utf-8"))
    found = {"seconds": seconds, "result": result(setting.work / "sweep" / "0")["eval_loss"], "failure": failure}
    is_memory = failure["message"].startswith(("out of memory", "the run does not fit into the memory"))
    return found if is_memory else found | {"failed": f"the second job failed otherwise: {failure['message']}"}


def fill_memory(filled: Any, release: Any) -> None:
    """Hold all memory of the GPU but LEFT_BYTES until `release` is set; this works with every version of torch."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - LEFT_BYTES), dtype=torch.uint8, device="cuda")
    filled.set()
    while not release.is_set():
        time.sleep(0.1)
    del held
