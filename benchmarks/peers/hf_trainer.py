"""Times any trainer that is built on transformers' Trainer, from the outside: its training_step and its callbacks."""

from protocol import Stopwatch
from transformers import Trainer, TrainerCallback


def timed(watch: Stopwatch) -> TrainerCallback:
    """Let `watch` see every forward of every Trainer of this process; the callback to give to the trainer."""
    inner = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        watch.forward(int(inputs["attention_mask"].sum()))
        return inner(self, model, inputs, *args, **kwargs)

    Trainer.training_step = training_step
    return _Marks(watch)


class _Marks(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.step()

    def on_log(self, args, state, control, logs, **kwargs):
        if "grad_norm" in logs:
            self.watch.learned(logs["loss"], logs["grad_norm"])
