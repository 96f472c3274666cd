"""Successive halving: jobs are compared at rungs, and those with the worse metric stop (arXiv 1502.07943).

min_steps 20, eta 3:   9 jobs --20 steps--> 3 --60 steps--> 1 --180 steps--> ...

Each job runs to the rung, is evaluated, saved and detached. The survivors are resumed from their checkpoints.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from lora_ft import metric_table
from lora_ft.metric_table import LOSS


@dataclass(frozen=True)
class Halving:
    """One job in `eta` survives each rung. The first rung is at `min_steps` steps, each next at `eta` times as many."""

    eta: int
    min_steps: int

    def rungs(self) -> Iterator[int]:
        """Yield the steps of all rungs, without end."""
        for power in itertools.count():
            yield self.min_steps * self.eta**power

    def stopped(self, rung: int, values: dict[int, float], num_beyond: int, metric: str = LOSS) -> dict[int, str]:
        """Return the jobs to stop, each with the reason, of those that have these values of a metric at a rung.

        num_beyond: jobs that passed this rung before the sweep was interrupted; each takes the place of a survivor.
        (A surviving job is marked in its folder before any other is stopped.)
        """
        survivors = max(0, math.ceil((len(values) + num_beyond) / self.eta) - num_beyond)
        ranking = sorted(values, key=lambda job: metric_table.cost(metric, values[job]))
        title = metric_table.title(metric)
        return {
            job: f"halving at step {rung}: {title} {values[job]:.4f} ranks {place} of {len(ranking)}, "
            f"{survivors} continue"
            for place, job in enumerate(ranking, 1)
            if place > survivors
        }
