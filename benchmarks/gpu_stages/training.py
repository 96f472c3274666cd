"""Train with lora_ft's own code, from the overrides of the command line, and measure speed and memory.

    base loaded once -> train_job(settings of one measurement) -> tokens/s, allocated, reserved, driver, log lines

This is what `lora-ft train` runs, without the command around it, so that several measurements share a loaded base.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lora_ft
from gpu_stages.machine import now, peaks
from gpu_stages.setting import Setting
from lora_ft import config, runs, validation
from lora_ft.train import train_job
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.shared import Shared, prepare

WARM_UP = 2  # steps in which kernels are chosen, compiled and loaded, and the optimizer's state is allocated


class Clock(Callback):
    """Measures the steps after the warm-up: waits for the device only before the first and after the last of them."""

    def on_start(self, state: Any) -> None:
        self.device, self.gradient_checkpointing = state.base.device, state.gradient_checkpointing
        self.losses: list[float] = []
        self.driver_bytes = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step(self, state: Any, metrics: Metrics) -> None:
        self.losses.append(metrics["loss"])
        if state.step == WARM_UP:
            self.began, self.tokens = now(self.device), state.tokens
        if state.is_done:
            self.ended, self.steps, self.tokens = now(self.device), state.step - WARM_UP, state.tokens - self.tokens
        self.driver_bytes = max(self.driver_bytes, peaks(self.device).get("driver_bytes", 0))

    def figures(self) -> dict[str, Any]:
        seconds = self.ended - self.began
        return {
            "tokens_per_second": self.tokens / seconds,
            "tokens_per_step": self.tokens / self.steps,
            "seconds_per_step": seconds / self.steps,
            "gradient_checkpointing": self.gradient_checkpointing,
            "losses": [round(loss, 5) for loss in self.losses],
            **peaks(self.device),
            **({"driver_bytes": self.driver_bytes} if self.driver_bytes else {}),
        }


class Lines(logging.Handler):
    """Collects the log lines of a run: they name the paths that were chosen, and why others were not."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:300])


def settings(model: Path, rows: Path, tokens: int, steps: int, *more: str) -> list[str]:
    """Return the overrides of a run without evaluations: LoRA of rank 16 on all linear layers, AdamW."""
    return [
        "model=local", f"model.path={model}", "data=text", f"data.path={rows}", "data.eval_fraction=0",
        "data.max_length=32768", f"train.tokens_per_step={tokens}", f"train.max_steps={steps}", "train.samples=0",
        "train.save_every_steps=null", "adapter.r=16", "adapter.lora_alpha=32", *more,
    ]  # fmt: skip


def compose(setting: Setting, overrides: list[str]) -> config.TrainRun:
    """Compose the settings of a run on this device; a dry run computes in bfloat16, as a GPU does."""
    dtype = setting.sized("auto", "bfloat16")
    cfg: config.TrainRun = lora_ft.compose("train", [*overrides, f"device={setting.device}", f"model.dtype={dtype}"])
    validation.locate_paths(cfg)
    validation.validate(cfg)
    return cfg


def measure(
    setting: Setting, overrides: list[str], shared: Shared | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Train a run of its own and return its figures; `shared` lends its loaded base, whose settings must be the same.

    The rows are those of the overrides in any case.
    """
    cfg, clock, lines = compose(setting, overrides), Clock(), Lines()
    folder = Path(tempfile.mkdtemp(prefix="run_", dir=setting.work))
    log = logging.getLogger("lora_ft")
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    started = time.perf_counter()
    try:
        own = prepare(cfg)
        if shared is not None:
            own.base = shared.base
        runs.begin(folder, cfg, overrides)
        try:
            train_job(cfg, folder, own, [clock, *callbacks])
        finally:
            if shared is not None:
                shared.base = own.base
    finally:
        log.removeHandler(lines)
        log.setLevel(level)
        shutil.rmtree(folder, ignore_errors=True)  # adapter and checkpoint of an 8B run take 0.7 GB
    return clock.figures() | {"seconds_in_all": round(time.perf_counter() - started, 1), "log": lines.lines}
