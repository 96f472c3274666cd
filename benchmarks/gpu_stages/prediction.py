"""The peak and the launches that the trace of the real step predicts, for comparison with what is measured."""

import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from gpu_stages.bases import batches_of
from gpu_stages.setting import Setting
from gpu_stages.training import compose
from lora_ft.memory.trace import trace_step


def predicted(setting: Setting, overrides: list[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Trace the first step of a run with the gradient checkpointing that was settled when it was measured."""
    chosen = measured.get("gradient_checkpointing", "every_1")
    cfg, started = compose(setting, [*overrides, f"train.gradient_checkpointing={chosen}"]), time.perf_counter()
    (documents,) = batches_of(Path(cfg.data.path), cfg.train.tokens_per_step, 1)
    found = trace_step(cfg, AutoConfig.from_pretrained(cfg.model.path), [len(document) for document in documents])
    return {
        "predicted_bytes": found.peak_bytes,
        "peak_phase": found.peak_phase,
        "predicted_resident_bytes": found.resident_bytes,
        "dispatches": found.dispatches,
        "synchronisations": found.synchronisations,
        "plain_lora_layers": len(found.plain_lora_layers),
        "gradient_checkpointing": chosen,
        "seconds": round(time.perf_counter() - started, 1),
    }
