"""Predict the peak memory and the time of a run on a device, from its traced step.

predict(cfg, model_config, workload, machine) -> Prediction(terms=(...), peak_bytes=..., fits=True, ...)
"""

from dataclasses import dataclass
from typing import Any

from lora_ft import config
from lora_ft.memory.machine import Machine
from lora_ft.memory.trace import StepTrace, trace_step
from lora_ft.memory.workload import Workload


@dataclass(frozen=True)
class Term:
    """A part of the peak. source: traced (exact bytes of tensors), measured or assumed. note: on what, or why."""

    name: str
    bytes: int
    source: str
    note: str = ""


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of a run on a machine, and its parts."""

    machine: Machine
    workload: Workload
    terms: tuple[Term, ...]
    phase: str
    trace: StepTrace

    @property
    def peak_bytes(self) -> int:
        """All terms: the memory that the run needs at its peak."""
        return sum(term.bytes for term in self.terms)

    @property
    def least_bytes(self) -> int:
        """The terms that are exact: no device with less memory than this can run the step."""
        return sum(term.bytes for term in self.terms if term.source != "assumed")

    @property
    def fits(self) -> bool | None:
        """True if the peak is within the machine's budget; None if its memory is unknown."""
        budget = self.machine.budget_bytes
        return None if budget is None else self.peak_bytes <= budget


def predict(cfg: config.TrainRun, model_config: Any, workload: Workload, machine: Machine) -> Prediction:
    """Predict a run of `cfg` on a model of a transformers config; gradient_checkpointing must be off or every_k."""
    found = trace_step(cfg, model_config, workload.largest, machine.target)
    terms = [Term(name, count, "traced") for name, count in found.at_peak.items()]
    terms.append(Term("context", machine.context_bytes, "assumed"))
    return Prediction(machine, workload, tuple(terms), found.peak_phase, found)
