"""Successive halving: learners of one base are compared at rungs, and those that fall behind stop (arXiv 1502.07943).

min_steps 20, eta 3:   9 learners --20 steps--> 3 --60 steps--> 1 --180 steps--> ...

At a rung a learner waits until all others have come to it, so that who goes on does not depend on whose turn it was.
"""

import math
from dataclasses import dataclass

from lora_ft.training.state import Learner


@dataclass(frozen=True)
class Halving:
    """One in `eta` goes on at each rung; the first is behind `min_steps` steps, each further one `eta` times as far."""

    eta: int
    min_steps: int

    def set_rungs(self, learner: Learner) -> None:
        """Let a learner be evaluated at its rungs, and wait there; its last step is none."""
        steps, rungs = self.min_steps, []
        while steps < len(learner.steps):
            rungs.append(steps)
            steps *= self.eta
        learner.rungs = tuple(rungs)

    def waits(self, learner: Learner) -> bool:
        """Whether a learner stands at a rung where it is not decided yet who goes on."""
        return learner.stopped_by is None and learner.step in learner.rungs[learner.rungs_passed :]

    def decide(self, active: list[Learner]) -> None:
        """Let the best of those at a rung go on and stop the others, if none has still to come to it."""
        waiting = [learner for learner in active if self.waits(learner)]
        for rung in sorted({learner.step for learner in waiting}):
            here = [learner for learner in waiting if learner.step == rung]
            if any(learner.step < rung and rung in learner.rungs for learner in active):
                continue
            # Those that were sent on before the sweep was broken off have their places.
            beyond = sum(rung in learner.rungs and learner.step > rung for learner in active)
            places = max(0, math.ceil((len(here) + beyond) / self.eta) - beyond)
            ranking = sorted(here, key=_loss)
            for place, learner in enumerate(ranking):
                learner.rungs_passed = learner.rungs.index(rung) + 1
                if place >= places:
                    learner.stopped_by = (
                        f"halving at step {rung}: held-out loss {_loss(learner):.4f} is number {place + 1} of "
                        f"{len(ranking)}, and {places} go on"
                    )


def _loss(learner: Learner) -> float:
    return learner.evaluations[-1].heldout.loss
