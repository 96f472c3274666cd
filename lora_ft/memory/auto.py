"""Settle auto in train.gradient_checkpointing and train.tokens_per_microbatch by the memory that is free now.

    12 layers:  off  every_12  every_6  every_4  every_3  every_2  every_1      recomputed  0  1  2  3  4  6  12
                 |______ more memory, less time ... less memory, more time ___|

    gradient_checkpointing=auto       the fewest recomputed layers that fit
    tokens_per_microbatch=auto        the largest micro-batch that fits, from the longest row to the whole step
    both                              the pair with the lowest predicted time of a step among those that fit

Steps are traced with the loaded model's own paths (memory/trace.py), so dtype, adapter, quantization, dropout and every
fast path count.
"""

import functools
import logging
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lora_ft.data.packing import largest_micro_batch
from lora_ft.data.steps import tokens_of
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.pairs import Sizes, fastest, largest_that_fits
from lora_ft.memory.roofline import step_time
from lora_ft.memory.trace import StepTrace, trace_loaded
from lora_ft.models.build import first_line
from lora_ft.ops.free_memory import available_bytes
from lora_ft.ops.gradient_checkpointing import recomputable_layers
from lora_ft.settings.plan import Hardware
from lora_ft.training import loss_scale
from lora_ft.training.state import TrainingState, share_of_step

log = logging.getLogger("lora_ft")

# Share of the free memory that a run may plan to use. The rest is for what a trace does not show: gaps of the
# allocator, buffers inside kernels and, on a CPU, other processes.
USABLE = 0.8


def settle(state: TrainingState) -> None:
    """Replace auto in the state, and log the reason. The adapter and its base do not change.

    Call it after a checkpoint is restored: a resumed run keeps its micro-batches, on which the masks of dropout depend.
    """
    if state.cfg.train.tokens_per_microbatch == "auto" and state.tokens_per_microbatch is None:
        both = state.gradient_checkpointing == "auto"
        tokens, state.gradient_checkpointing, reason = choose_micro_batch(state)
        state.tokens_per_microbatch = tokens
        if state.loss_scale:
            state.loss_scale = loss_scale.for_tokens(tokens)
        log.info("train.tokens_per_microbatch=auto: %s, %s", f"{tokens:,}", reason)
        if both:
            log.info("train.gradient_checkpointing=auto: %s", state.gradient_checkpointing)
    elif state.gradient_checkpointing == "auto":
        state.gradient_checkpointing, reason = choose(state)
        log.info("train.gradient_checkpointing=auto: %s, %s", state.gradient_checkpointing, reason)


def choose(state: TrainingState) -> tuple[str, str]:
    """Return off or every_k for the micro-batches of the state, and the reason."""
    layers = len(recomputable_layers(state.base))
    if not layers:
        return "off", f"{state.base.config.model_type} has no layers that can be recomputed"
    steps = _Steps(state)
    if (reason := steps.certain(steps.largest)) is not None:
        return "off", reason
    try:
        setting = fewest_recomputed(layers, lambda each: steps.needed(each, steps.largest), steps.budget)
    except Exception as error:  # code of a model family that does not run without values: do not end the run for it
        _warn(error, "every layer is recomputed")
        return "every_1", "the memory of a step is unknown"
    others = [each for each in ("off", "every_1") if each != setting]
    return setting, steps.figures(setting, steps.largest, others)


def choose_micro_batch(state: TrainingState) -> tuple[int, str, str]:
    """Return the tokens of a micro-batch, off or every_k, and the reason."""
    steps, layers = _Steps(state), len(recomputable_layers(state.base))
    setting = state.gradient_checkpointing
    fixed = setting if setting != "auto" else None if layers else "off"
    if (reason := steps.certain(steps.largest)) is not None:
        return max(state.longest, steps.largest), fixed or "off", reason
    sizes = Sizes(state.longest, max(state.longest, steps.largest), _typical_step(state))
    try:
        if fixed:
            tokens = largest_that_fits(sizes, lambda tokens: steps.needed(fixed, tokens), steps.budget)
            return tokens, fixed, steps.figures(fixed, tokens)
        setting, tokens = fastest(settings_of(layers), sizes, steps.needed, steps.seconds, steps.budget)
        return tokens, setting, steps.figures(setting, tokens)
    except Exception as error:
        _warn(error, "every row is a micro-batch of its own")
        return sizes.least, fixed or "every_1", "the memory of a step is unknown"


def fewest_recomputed(
    layers: int,
    needed: Callable[[str], float],
    budget: float,
    estimated: Callable[[str], float] | None = None,
) -> str:
    """Return the setting with the fewest recomputed layers that needs at most `budget` bytes; every_1 if none does.

    `needed` gives the bytes of a setting. It falls as more layers are recomputed, so few settings are asked for: two
    if `estimated` finds the right one.
    """
    settings = settings_of(layers)
    first, end = 0, len(settings)
    if estimated is not None:
        guess = settings.index(fewest_recomputed(layers, estimated, budget))
        for number in (guess, guess - 1):
            if first <= number < end and needed(settings[number]) <= budget:
                end = number
            elif first <= number < end:
                first = number + 1
    # bisect_left finds the first setting with a key of True.
    found = bisect_left(settings, True, first, end, key=lambda setting: needed(setting) <= budget)
    return settings[min(found, len(settings) - 1)]


def settings_of(layers: int) -> list[str]:
    """Return the settings that recompute different numbers of layers, from none to all."""
    counts = sorted({math.ceil(layers / every) for every in range(1, layers + 1)})
    return ["off", *(f"every_{math.ceil(layers / count)}" for count in counts)]


@dataclass
class _Steps:
    """Memory and time of the steps of a state, by recomputation and micro-batch; nothing is traced twice."""

    state: TrainingState

    def __post_init__(self) -> None:
        state = self.state
        self._lengths: Callable[[int | None], list[int]] = functools.cache(
            lambda tokens: largest_micro_batch(state.examples, state.steps, tokens, state.packs)
        )
        self._traced = functools.cache(self._trace)
        self.largest: int = sum(
            self._lengths(state.tokens_per_microbatch or share_of_step(state.cfg, state.examples, state.ranks))
        )
        self.free = _free_for_each(state)
        self.budget = int(USABLE * (self.free or 0))

    def certain(self, tokens: int) -> str | None:
        """Return the reason why a micro-batch needs no trace, None if it does."""
        if self.free is None:
            return "the free memory of this system is unknown"
        if tokens * more_than_kept(self.state.base) <= self.budget:
            return "the activations fit into the free memory"
        return None

    def needed(self, setting: str, tokens: int) -> int:
        """Return the bytes of a step beyond those that are loaded."""
        found = self._traced(setting, tokens)
        return found.peak_bytes - found.loaded_bytes

    def seconds(self, setting: str, tokens: int) -> float:
        """Return the predicted time of one micro-batch; of a device of unknown speed, a number that is proportional."""
        found = self._traced(setting, tokens)
        time = step_time(found.costs, self._machine)
        return time.seconds if time else float(found.flops)

    def figures(self, setting: str, tokens: int, others: list[str] | None = None) -> str:
        """Return the bytes of a step, and of the same with other settings."""
        more = ", ".join(f"{each} {self.needed(each, tokens) / 1e9:.2f}" for each in others or ())
        needed = f"{self.needed(setting, tokens) / 1e9:.2f} GB more{f' ({more})' if more else ''}"
        return f"a step of {tokens:,} tokens needs {needed}, {(self.free or 0) / 1e9:.2f} GB free"

    @functools.cached_property
    def _machine(self) -> Machine:
        return resolve(Hardware(), str(self.state.base.device))

    def _trace(self, setting: str, tokens: int) -> StepTrace:
        lengths = self._lengths(tokens if tokens < self.largest else self.state.tokens_per_microbatch)
        # As full as the setting allows: no micro-batch of the run is larger.
        rest = [tokens - sum(lengths)] if sum(lengths) < tokens else []
        return trace_loaded(self.state, [*lengths, *rest], setting)


def _free_for_each(state: TrainingState) -> int | None:
    """Return the free bytes of the rank that has the fewest, for the ranks must agree; they share a CPU's memory."""
    free = available_bytes(state.base.device)
    if free is not None and state.base.device.type == "cpu":
        free //= state.ranks.local_size
    return min((each for each in state.ranks.gathered(free) if each is not None), default=None)


def _typical_step(state: TrainingState) -> int:
    """Return the tokens of a step of median size."""
    tokens = np.sort(tokens_of(state.steps, state.examples.lengths))
    return int(tokens[len(tokens) // 2])


def _warn(error: Exception, consequence: str) -> None:
    log.warning("the step cannot be traced, so %s: %s: %s", consequence, type(error).__name__, first_line(error))


def more_than_kept(model: PreTrainedModel) -> int:
    """Return bytes per token, two or three times what any path keeps: if that fits, nothing is traced."""
    hidden = int(model.get_input_embeddings().weight.shape[1])  # configs of models with several parts name it otherwise
    return kept_per_token(model.config, hidden, len(recomputable_layers(model)))


def kept_per_token(model_config: Any, hidden: int, layers: int) -> int:
    """Return the same for the config of a model with this size of hidden states."""
    inner = getattr(model_config.get_text_config(), "intermediate_size", None)  # a list, one per layer, in some models
    return 4 * layers * 16 * (hidden + (inner if isinstance(inner, int) else 4 * hidden))
