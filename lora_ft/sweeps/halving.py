"""Successive halving: jobs are compared at rungs, and those that fall behind stop (arXiv 1502.07943).

min_steps 20, eta 3:   9 jobs --20 steps--> 3 --60 steps--> 1 --180 steps--> ...

Each job runs to the rung, is evaluated, saved and detached; those that go on are resumed from their checkpoints.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Halving:
    """One in `eta` goes on at each rung; the first is after `min_steps` steps, each further one `eta` times as far."""

    eta: int
    min_steps: int

    def rungs(self) -> Iterator[int]:
        """Yield the steps of all rungs, without end."""
        for power in itertools.count():
            yield self.min_steps * self.eta**power

    def stopped(self, rung: int, losses: dict[int, float], beyond: int) -> dict[int, str]:
        """Return who stops, with the reason, of the jobs that have these eval losses at a rung.

        `beyond` counts jobs that passed this rung before the sweep was interrupted: their places are taken. (A job that
        passed is marked in its folder before any is stopped.)
        """
        places = max(0, math.ceil((len(losses) + beyond) / self.eta) - beyond)
        ranking = sorted(losses, key=lambda job: losses[job])
        return {
            job: f"halving at step {rung}: eval loss {losses[job]:.4f} is number {place} of {len(ranking)}, "
            f"and {places} go on"
            for place, job in enumerate(ranking, 1)
            if place > places
        }
