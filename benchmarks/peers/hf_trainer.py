"""Times any trainer that is built on transformers' Trainer, from the outside: its training_step and its callbacks."""

from collections.abc import Mapping

import torch
from protocol import Stopwatch
from transformers import Trainer, TrainerCallback


def timed(watch: Stopwatch) -> TrainerCallback:
    """Let `watch` see every forward of every Trainer of this process; the callback to give to the trainer."""
    inner = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        watch.forward(real_tokens(inputs))
        return inner(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step
    return _Marks(watch)


def real_tokens(inputs: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch that are no padding; one without a mask is rows laid end to end, and has none."""
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()


class _Marks(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.step()

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs:
            self.watch.learned(logs["loss"], logs["grad_norm"])
