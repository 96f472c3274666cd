"""Predict the peak memory and the time of a run on a device, from its traced step.

predict(cfg, model_config, workload, machine) -> Prediction(terms=(...), peak_bytes=..., fits=True, ...)

    base weights, adapter, ... other     traced: bytes of tensors at the peak of the step
    workspaces, allocator, context       measured or assumed: what a process needs beside its tensors

memory/trace.py explains the traced terms.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_ft import config, objectives, validation
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.memory.auto import fewest_recomputed
from lora_ft.memory.deepened import FEW, MORE, are_alike, deepened
from lora_ft.memory.machine import Machine
from lora_ft.memory.roofline import StepTime, step_time
from lora_ft.memory.shallow import ENOUGH, extrapolated, num_layers, shallow
from lora_ft.memory.storage import loading_bytes
from lora_ft.memory.trace import StepTrace, trace_step
from lora_ft.memory.workload import Workload
from lora_ft.memory.workspaces import SLACK_SHARE, allocator_slack, workspaces
from lora_ft.models import build
from lora_ft.models.build import first_line
from lora_ft.ops.gradient_checkpointing import recomputable_layers

log = logging.getLogger("lora_ft")

TRACED, MEASURED, ASSUMED = "traced", "measured", "assumed"  # sources of a term
BASE = "base weights"

# Settings that a trace does not depend on. Of those of a group, only the named ones.
_NOT_TRACED = {
    "data": None, "track": None, "seed": None, "resume": None, "device": None, "hardware": None, "fit": None,
    "out": None, "sweep": None, "model": ("path", "revision", "hub_id", "chat_template"),
    "adapter": ("init_from", "lora_alpha", "alpha_pattern"),
    "optim": ("lr", "lora_plus_ratio", "beta1", "beta2", "eps", "schedule", "warmup_steps", "decay_fraction",
              "min_lr_ratio"),
    "train": ("epochs", "max_steps", "tokens_per_step", "log_every_steps", "eval_every_steps", "eval_rows",
              "patience", "on_oom", "samples", "save_every_steps", "keep_checkpoints", "deterministic"),
}  # fmt: skip

Traces = dict[str, StepTrace]
"""Traces by everything that they depend on, shared by predictions."""

_known_loading: dict[str, int] = {}
_known_layers: "dict[tuple[str, type, str], _Layers]" = {}


@dataclass(frozen=True)
class Term:
    """A part of the peak. source: traced (exact bytes of tensors), measured or assumed. note: on what, or why."""

    name: str
    bytes: int
    source: str
    note: str = ""


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of a run on a machine, and its parts.

    phase: forward, loss, backward or optimizer, in which the peak occurs. gradient_checkpointing: off or every_k, what
    auto chooses on this machine. trace: of the largest micro-batch. typical: of `workload.typical_micro_batch`.
    time: of a step of median size, None if the rates of the machine are unknown. loading_bytes: of a GPU while the base
    is loaded, its context included; 0 on a CPU.
    """

    machine: Machine
    workload: Workload
    terms: tuple[Term, ...]
    phase: str
    gradient_checkpointing: str
    trace: StepTrace
    typical: StepTrace
    time: StepTime | None = None
    loading_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All terms: the memory that a step needs at its peak."""
        return sum(term.bytes for term in self.terms)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of a step of median size; None if the rates of the machine are unknown."""
        # As many tokens as were timed: of micro-batches that differ, all count as the one that was traced.
        tokens = len(self.workload.typical) * sum(self.workload.typical_micro_batch)
        return tokens / self.time.seconds if self.time else None

    @property
    def needed_bytes(self) -> int:
        """The memory that the run needs: for a step, or to load the base if that is more."""
        return max(self.peak_bytes, self.loading_bytes)

    @property
    def least_bytes(self) -> int:
        """The terms that are not assumed: no device with less memory than this can run the step."""
        return sum(term.bytes for term in self.terms if term.source != ASSUMED)

    @property
    def left_bytes(self) -> int | None:
        """Bytes of the budget that the run leaves, negative if it does not fit; None if the memory is unknown."""
        budget = self.machine.budget_bytes
        return None if budget is None else budget - self.needed_bytes

    @property
    def fits(self) -> bool | None:
        """True if loading and steps are within the machine's budget; None if its memory is unknown."""
        return None if self.left_bytes is None else self.left_bytes >= 0


def predict(
    cfg: config.TrainRun,
    model_config: Any,
    workload: Workload,
    machine: Machine,
    traces: Traces | None = None,
    is_quick: bool = False,
) -> Prediction:
    """Predict a run of `cfg` on a model of a transformers config.

    train.gradient_checkpointing=auto is what training chooses on this machine: the fewest recomputed layers that fit.
    `traces` shares traces between predictions. is_quick: where layers are alike, three of them are traced; the result
    is the same but for the timeline. Raises ConfigError for a model that cannot be traced.
    """
    traces = {} if traces is None else traces

    def with_recompute(setting: str) -> Prediction:
        chosen = cfg.with_train(gradient_checkpointing=setting)
        return _predict(chosen, model_config, workload, machine, traces, is_quick)

    setting = cfg.train.gradient_checkpointing
    if setting == "auto":
        setting = _fewest_recomputed(with_recompute, cfg, model_config, workload, machine, traces)
    found = with_recompute(setting)
    typical = found.trace
    if list(workload.typical_micro_batch) != list(workload.largest):
        chosen = cfg.with_train(gradient_checkpointing=setting)
        typical = _traced(chosen, model_config, workload.typical_micro_batch, machine, traces, is_quick)
    time = step_time(typical.costs, machine, len(workload.typical))
    return dataclasses.replace(
        found, typical=typical, time=time, loading_bytes=loading_peak(cfg, model_config, machine)
    )


def loading_peak(cfg: config.TrainRun, model_config: Any, machine: Machine) -> int:
    """Return the bytes of a GPU while the base is loaded, its context included; 0 on a CPU."""
    chosen = validation.to_plain(cfg.quant), cfg.model.dtype, cfg.objective.name, dataclasses.astuple(machine.target)
    key = f"{chosen} {model_config.to_json_string(use_diff=False)}"
    if key not in _known_loading:
        _known_loading[key] = loading_bytes(cfg, model_config, machine.target)
    return _known_loading[key] + machine.context_bytes if _known_loading[key] else 0


def estimated_peak(
    cfg: config.TrainRun, model_config: Any, workload: Workload, machine: Machine, traces: Traces
) -> float:
    """Return the peak as a few traced layers tell it; `train.gradient_checkpointing` is off or every_k."""

    def peak(setting: str, model_config: Any) -> int:
        chosen = cfg.with_train(gradient_checkpointing=setting)
        return _predict(chosen, model_config, workload, machine, traces, is_quick=True).peak_bytes

    return extrapolated(peak, cfg.train.gradient_checkpointing, model_config, _grows_evenly(cfg, model_config))


def _grows_evenly(cfg: config.TrainRun, model_config: Any) -> bool:
    """Return True if each layer adds the same; bitsandbytes has other states for few parameters than for many."""
    return cfg.optim.name is config.Optimizer.adamw and _layers(cfg, model_config).are_alike


@dataclass(frozen=True)
class _Layers:
    """The number of layers that can be recomputed, and True if they are all those of the model, and alike."""

    count: int
    are_alike: bool


def _layers(cfg: config.TrainRun, model_config: Any) -> _Layers:
    key = cfg.objective.name, type(model_config), model_config.to_json_string(use_diff=False)
    if key not in _known_layers:
        model_class = objectives.find(cfg.objective).model_class
        network = build.on_meta(copy.deepcopy(model_config), torch.float32, model_class, cfg.model.path)
        found = recomputable_layers(network)
        all_alike = len(found) == num_layers(model_config) and are_alike(found)
        _known_layers[key] = _Layers(len(found), all_alike)
    return _known_layers[key]


def _fewest_recomputed(
    predicted: Callable[[str], Prediction],
    cfg: config.TrainRun,
    model_config: Any,
    workload: Workload,
    machine: Machine,
    traces: Traces,
) -> str:
    """Return off or every_k: the setting with the fewest recomputed layers that fits, every_1 if none does."""
    budget = machine.budget_bytes
    if budget is None:
        return "off"
    layers = _layers(cfg, model_config).count
    if not layers:
        return "off"

    def estimated(setting: str) -> float:
        chosen = cfg.with_train(gradient_checkpointing=setting)
        return estimated_peak(chosen, model_config, workload, machine, traces)

    has_many = num_layers(model_config) > ENOUGH
    needed = lambda setting: predicted(setting).peak_bytes  # noqa: E731
    return fewest_recomputed(layers, needed, budget, estimated if has_many else None)


def _predict(
    cfg: config.TrainRun, model_config: Any, workload: Workload, machine: Machine, traces: Traces, is_quick: bool
) -> Prediction:
    found = _traced(cfg, model_config, workload.largest, machine, traces, is_quick)
    traced = tuple(_traced_terms(found))
    terms = (*traced, *_process_terms(found, machine))
    return Prediction(machine, workload, terms, found.peak_phase, cfg.train.gradient_checkpointing, found, found)


def _traced_terms(found: StepTrace) -> Iterator[Term]:
    for name, count in found.terms_at_peak.items():
        if name == BASE:
            for kind, part in sorted(found.base_bytes.items(), key=lambda item: -item[1]):
                yield Term(f"{BASE}, {kind}", part, TRACED)
        elif count:
            yield Term(name, count, TRACED)


def _process_terms(found: StepTrace, machine: Machine) -> Iterator[Term]:
    """Yield what a process needs beside the tensors that a trace counts."""
    kind = machine.target.kind
    if inside := workspaces(found, machine.target):
        note = "buffers inside kernels, and those of cuBLAS" if kind == "cuda" else "buffers inside kernels"
        yield Term("workspaces", inside, ASSUMED, note)
    note = f"gaps between tensors, {SLACK_SHARE.get(kind, SLACK_SHARE['cuda']):.0%} of what comes and goes in a step"
    yield Term("allocator", allocator_slack(found, machine.target), ASSUMED, note)
    if machine.context_bytes:
        source = machine.sources.get("context_bytes", ASSUMED)
        note = source.partition(": ")[2] or "the process and its libraries"
        yield Term(
            "context", machine.context_bytes, MEASURED if machine.is_measured("context_bytes") else ASSUMED, note
        )


def _traced(
    cfg: config.TrainRun,
    model_config: Any,
    lengths: Sequence[int],
    machine: Machine,
    traces: Traces,
    is_quick: bool = False,
) -> StepTrace:
    """Return the trace of one micro-batch; `traces` has it already if the settings that it depends on are the same."""
    key = _key(cfg, model_config, lengths, machine)
    layers, is_even = num_layers(model_config), cfg.train.gradient_checkpointing in ("off", "every_1")
    if is_quick and key not in traces and is_even and layers > ENOUGH and _grows_evenly(cfg, model_config):
        few, more = (_traced(cfg, shallow(model_config, count), lengths, machine, traces) for count in (FEW, MORE))
        if (found := deepened(few, more, layers)) is not None:
            return found
    if key not in traces:
        try:
            traces[key] = trace_step(cfg, copy.deepcopy(model_config), lengths, machine.target)
        except LoraFtError:
            raise
        except Exception as error:  # code of a model family that does not run without values
            log.debug("the step cannot be traced", exc_info=True)
            raise ConfigError(
                f"the memory of {model_config.model_type} cannot be predicted, because its code does not run without "
                f"weights ({type(error).__name__}: {first_line(error)}); lora-ft train may still train it"
            ) from error
    return traces[key]


def _key(cfg: config.TrainRun, model_config: Any, lengths: Sequence[int], machine: Machine) -> str:
    plain = validation.to_plain(cfg)
    for group, names in _NOT_TRACED.items():
        if names is None:
            plain.pop(group, None)
        else:
            plain[group] = {name: value for name, value in plain[group].items() if name not in names}
    given = [plain, model_config.to_dict(), list(map(int, lengths)), dataclasses.astuple(machine.target)]
    return json.dumps(given, sort_keys=True, default=str)
