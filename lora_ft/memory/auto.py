"""Settle `train.gradient_checkpointing=auto`: recompute as few layers as fit into the memory that is free now.

    12 layers:  off  every_12  every_6  every_4  every_3  every_2  every_1      recomputed  0  1  2  3  4  6  12
                 |______ more memory, less time ... less memory, more time ___|

The step of the largest micro-batch is traced with the loaded model's own paths (memory/trace.py), so dtype, adapter,
quantization, dropout and every fast path count.
"""

import functools
import logging
import math
from bisect import bisect_left
from collections.abc import Callable

from transformers import PreTrainedModel

from lora_ft.data.packing import micro_batches
from lora_ft.memory.trace import trace_loaded
from lora_ft.models.load import first_line
from lora_ft.ops.gradient_checkpointing import available_bytes, recomputable_layers
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

# Share of the free memory that a run may plan to use. The rest is for what a trace does not show: gaps of the
# allocator, buffers inside kernels and, on a CPU, other processes.
USABLE = 0.8


def settle(state: TrainingState) -> None:
    """Set `state.gradient_checkpointing` if it is auto, and log the reason. The adapter and its base do not change."""
    if state.gradient_checkpointing != "auto":
        return
    state.gradient_checkpointing, reason = choose(state)
    log.info("train.gradient_checkpointing=auto: %s, %s", state.gradient_checkpointing, reason)


def choose(state: TrainingState) -> tuple[str, str]:
    """Return off or every_k, and the reason."""
    layers = len(recomputable_layers(state.base))
    if not layers:
        return "off", f"{state.base.config.model_type} has no layers that can be recomputed"
    free = available_bytes(state.base.device)
    if free is None:
        return "off", "the free memory of this system is unknown"
    lengths = _largest_micro_batch(state)
    if sum(lengths) * _more_than_kept(state.base) <= USABLE * free:
        return "off", "the activations fit into the free memory"

    @functools.cache
    def needed(setting: str) -> int:
        found = trace_loaded(state, lengths, setting)
        return found.peak_bytes - found.loaded_bytes

    try:
        setting = fewest_recomputed(layers, needed, int(USABLE * free))
    except Exception as error:  # code of a model family that does not run without values: do not end the run for it
        log.warning(
            "the step cannot be traced, so every layer is recomputed: %s: %s", type(error).__name__, first_line(error)
        )
        return "every_1", "the memory of a step is unknown"
    figures = ", ".join(f"{each} {needed(each) / 1e9:.2f}" for each in ("off", "every_1") if each != setting)
    return setting, (
        f"a step of {sum(lengths):,} tokens needs {needed(setting) / 1e9:.2f} GB more ({figures}), "
        f"{free / 1e9:.2f} GB free"
    )


def fewest_recomputed(layers: int, needed: Callable[[str], int], budget: int) -> str:
    """Return the setting with the fewest recomputed layers that needs at most `budget` bytes; every_1 if none does.

    `needed` gives the bytes of a setting. It falls as more layers are recomputed, so few settings are asked for.
    """
    counts = sorted({math.ceil(layers / every) for every in range(1, layers + 1)})
    settings = ["off", *(f"every_{math.ceil(layers / count)}" for count in counts)]
    # bisect_left finds the first setting with a key of True.
    found = bisect_left(settings, True, key=lambda setting: needed(setting) <= budget)
    return settings[min(found, len(settings) - 1)]


def _largest_micro_batch(state: TrainingState) -> list[int]:
    """Return the lengths of the documents of the largest micro-batch, in the step with the most tokens."""
    cfg = state.cfg.train
    packs = cfg.packing and state.paths.share_a_pass

    def size(step: object) -> int:
        lengths = [len(state.examples[i].ids) for i in step]  # type: ignore[attr-defined]
        return sum(lengths) if packs else max(lengths)

    examples = [state.examples[i] for i in max(state.steps, key=size)]
    largest = max(micro_batches(examples, cfg.tokens_per_microbatch, packs), key=lambda batch: len(batch.ids))
    return [len(document.ids) for document in largest.documents()]


def _more_than_kept(model: PreTrainedModel) -> int:
    """Return bytes per token, two or three times what any path keeps: if that fits, nothing is traced."""
    hidden = int(model.get_input_embeddings().weight.shape[1])  # configs of models with several parts name it otherwise
    inner = getattr(model.config.get_text_config(), "intermediate_size", None)  # a list, one per layer, in some models
    return 4 * len(recomputable_layers(model)) * 16 * (hidden + (inner if isinstance(inner, int) else 4 * hidden))
