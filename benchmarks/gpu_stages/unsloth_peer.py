"""Unsloth at the works of peers.py, where it is installed: its patched model in the same loop.

It patches transformers, PEFT and TRL when it is imported. So it has a process of its own, and is imported before them.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

from gpu_stages.setting import Part, Setting, attempt


def run(setting: Setting) -> Iterator[Part]:
    if importlib.util.find_spec("unsloth") is None:
        yield "unsloth", {"skipped": "unsloth is not installed"}
        return
    import unsloth  # noqa: F401  before peers, which imports transformers

    from gpu_stages import peers

    for work, overrides in peers.works(setting).items():
        yield f"unsloth, {work}", attempt(peers.other, setting, loop, overrides)


def loop(cfg: Any, batches: Any, device: Any) -> list[float]:
    """Load, adapt and train as Unsloth's documentation shows it; return the time at the end of each step."""
    from unsloth import FastLanguageModel

    from gpu_stages import peers

    model, _ = FastLanguageModel.from_pretrained(
        cfg.model.path, max_seq_length=max(len(row) for batch in batches for row in batch), dtype=peers.DTYPE,
        load_in_4bit=peers.quantization(cfg) is not None,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=cfg.adapter.r, lora_alpha=cfg.adapter.lora_alpha, lora_dropout=0, target_modules=peers.LINEAR,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    return peers.padded_loop(model.train(), batches, device)
