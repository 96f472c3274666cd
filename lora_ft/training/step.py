"""One optimizer step on its way to metrics.jsonl: facts known on the host, and values that stay on the device.

steps.append(step)     ...     read(steps, ranks)     one copy for all of them: each copy waits for the GPU
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ft.ops.ranks import Ranks
from lora_ft.training.callbacks import Metrics


@dataclass
class Step:
    """The 1-based step `number`. Its `means` (loss first) and `grad_norm` are None and NaN until `read`.

    facts: numbers of rows, tokens and micro-batches. names: of the sums, loss first. values: scalars on the device,
    [names * micro-batches + 1]: all sums of a name before those of the next, then the gradient norm. weight: of all
    micro-batches and ranks. seconds: time of the host, which includes waiting for the device once the step is read.
    is_skipped: the optimizer does not take it, because float16 overflowed.
    """

    number: int
    sources: list[str]
    facts: dict[str, int]
    names: list[str]
    values: Tensor
    weight: float
    seconds: float
    lr: float = 0.0
    means: dict[str, float] | None = None
    grad_norm: float = math.nan
    is_skipped: bool = False

    @property
    def loss(self) -> float:
        """Mean loss, NaN until the step is read."""
        return self.means["loss"] if self.means else math.nan

    def metrics(self) -> Metrics:
        """Return the metrics of the step; loss and gradient norm of a skipped one may be NaN or infinite."""
        return {
            "step": self.number,
            **(self.means or {}),
            "grad_norm": self.grad_norm,
            **self.facts,
            "seconds": self.seconds,
            "lr": self.lr,
            "tokens_per_second": self.facts["tokens"] / self.seconds,
        }


def read(steps: Sequence[Step], ranks: Ranks) -> None:
    """Copy the values of steps from the device, and share the time of all of them by their tokens."""
    unread = [step for step in steps if step.means is None]
    if not unread:
        return
    started = time.perf_counter()
    values = torch.cat([step.values for step in unread]).tolist()
    seconds = sum(step.seconds for step in unread) + time.perf_counter() - started
    tokens = sum(step.facts["tokens"] for step in unread)
    for step in unread:
        count = len(step.values)
        *sums, step.grad_norm = values[:count]
        values = values[count:]
        each = len(sums) // len(step.names)
        totals = ranks.totals([sum(sums[i : i + each]) for i in range(0, len(sums), each)])
        step.means = {name: total / step.weight for name, total in zip(step.names, totals, strict=True)}
        step.seconds = seconds * step.facts["tokens"] / tokens
