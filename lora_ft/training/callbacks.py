"""Callbacks: code that follows a training run. Subclass `Callback` and define only the methods you need.

    class Log(lora_ft.Callback):
        def on_step(self, state, metrics):
            print(metrics["step"], metrics["loss"])

    class StopBelow(lora_ft.Callback):
        def on_evaluate(self, state, metrics):
            if metrics["eval_loss"] < 2.0:
                state.request_stop("the eval loss is below 2.0")

The progress display, the trackers and the heartbeat of a sweep are callbacks, too. An exception raised in a callback
fails the run.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from lora_ft.errors import ConfigError

if TYPE_CHECKING:
    from lora_ft.training.finish import Result
    from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

Metrics = dict[str, Any]
Outcome = Union["Result", BaseException, None]


class Callback:
    """Base of all callbacks: every method does nothing."""

    def on_start(self, state: "TrainingState") -> None:
        """Called when the adapter is attached and restored from its checkpoint, before the next step."""

    def on_step(self, state: "TrainingState", metrics: Metrics) -> None:
        """Called for each optimizer step, when its line is in metrics.jsonl.

        With train.log_every_steps above 1, for several steps one after the other; `state` is after the last of them.
        """

    def on_evaluate(self, state: "TrainingState", metrics: Metrics) -> None:
        """Called after each evaluation; `metrics` holds `step` (0 before the first step) and the eval loss."""

    def on_checkpoint(self, state: "TrainingState", path: Path) -> None:
        """Called when a checkpoint is written and verified."""

    def on_end(self, state: "TrainingState", outcome: Outcome) -> None:
        """Called once at the end, with the result, the exception that ended the run, or None if the run is paused."""


def checked(callbacks: Any) -> list[Callback]:
    """Return a list of callbacks; raises ConfigError for anything else."""
    if not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks must be a list, got {type(callbacks).__name__}")
    for number, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            given = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(f"callbacks[{number}] must be an instance of lora_ft.Callback, got {given}")
    return list(callbacks)


class Callbacks(Callback):
    """Calls several callbacks in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_start(self, state: "TrainingState") -> None:
        for callback in self._callbacks:
            callback.on_start(state)

    def on_step(self, state: "TrainingState", metrics: Metrics) -> None:
        for callback in self._callbacks:
            callback.on_step(state, metrics)

    def on_evaluate(self, state: "TrainingState", metrics: Metrics) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(state, metrics)

    def on_checkpoint(self, state: "TrainingState", path: Path) -> None:
        for callback in self._callbacks:
            callback.on_checkpoint(state, path)

    def on_end(self, state: "TrainingState", outcome: Outcome) -> None:
        for callback in self._callbacks:
            try:
                callback.on_end(state, outcome)
            except Exception as error:
                if not isinstance(outcome, BaseException):
                    raise
                # The error that ended the run is raised, not this one.
                log.warning("%s.on_end failed: %s: %s", type(callback).__name__, type(error).__name__, error)
