"""Memory and time of a step as `lora-ft plan` predicts them, for comparison with what is measured.

    allocated    tensors and workspaces                torch.cuda.max_memory_allocated
    reserved     and gaps of the allocator             torch.cuda.max_memory_reserved
    driver       and the context of CUDA               total less free memory, if nothing else uses the GPU

The goal is 5 % for each; `off_by_more` names those that miss it.
"""

import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from gpu_stages.bases import batches_of
from gpu_stages.setting import Setting
from gpu_stages.training import compose
from lora_ft import config
from lora_ft.memory import machine
from lora_ft.memory.prediction import Prediction, predict
from lora_ft.memory.workload import Workload

GOAL = 0.05
MEMORY = ("allocated", "reserved", "driver")


def predicted(setting: Setting, overrides: list[str], measured: dict[str, Any]) -> dict[str, Any]:
    """Predict the first step of a run with the gradient checkpointing that was settled when it was measured."""
    chosen = measured.get("gradient_checkpointing", "every_1")
    cfg, started = compose(setting, [*overrides, f"train.gradient_checkpointing={chosen}"]), time.perf_counter()
    (documents,) = batches_of(Path(cfg.data.path), cfg.train.tokens_per_step, 1)
    lengths = [len(document) for document in documents]
    device = machine.resolve(config.Hardware(), setting.device)
    model_config = AutoConfig.from_pretrained(cfg.model.path)
    found = predict(cfg, model_config, Workload(lengths, [lengths], None, None, longest=max(lengths)), device)
    figures = {
        **_bytes(found),
        "terms": {term.name: term.bytes for term in found.terms},
        "peak_phase": found.phase,
        "dispatches": found.trace.dispatches,
        "synchronisations": found.trace.synchronisations,
        "plain_lora_layers": len(found.trace.plain_lora_layers),
        "gradient_checkpointing": chosen,
    }
    if found.time is not None:
        share = measured.get("tokens_per_step", sum(lengths)) / sum(lengths)  # of the steps that were measured
        figures["predicted_seconds_per_step"] = found.time.seconds * share
        figures["bound_by"] = found.time.bound_by
    return figures | _differences(figures, measured) | {"seconds": round(time.perf_counter() - started, 1)}


def _bytes(found: Prediction) -> dict[str, int]:
    beside = {term.name: term.bytes for term in found.terms if term.name in ("allocator", "context")}
    reserved = found.peak_bytes - beside.get("context", 0)
    return {
        "predicted_allocated_bytes": reserved - beside.get("allocator", 0),
        "predicted_reserved_bytes": reserved,
        "predicted_driver_bytes": found.peak_bytes,
    }


def _differences(figures: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return predicted less measured, as a part of what was measured, and the names that miss the goal."""
    names = [*(f"{name}_bytes" for name in MEMORY), "seconds_per_step"]
    found = {
        name: round(figures[f"predicted_{name}"] / measured[name] - 1, 4)
        for name in names
        if measured.get(name) and f"predicted_{name}" in figures
    }
    return {"differences": found, "off_by_more": [name for name, value in found.items() if abs(value) > GOAL]}
