"""Compare a run with the memory of its device: before its weights are loaded, after it ran out of memory, at its end.

    forecast.check(...)       ResourceError if even the exact terms exceed the memory; a warning if others do
    forecast.explain(...)     measured and predicted peak, changes that fit, the last checkpoint
    forecast.peak(...)        predicted_peak_bytes of result.json

A run that surely fits is not traced at its start, and a short one not at all: a trace takes a twentieth of a second for
each layer of the model, of which at most eight are traced.
"""

import dataclasses
import functools
import logging
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from lora_ft import config, errors, validation
from lora_ft.config import OnOom, QuantKind
from lora_ft.data.dataset import Dataset
from lora_ft.data.packing import longest_group
from lora_ft.errors import CheckpointError, ResourceError
from lora_ft.memory.advice import Advice, advise
from lora_ft.memory.auto import USABLE, kept_per_token
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.prediction import Prediction, Traces, predict
from lora_ft.memory.shallow import ENOUGH, extrapolated, num_layers
from lora_ft.memory.workload import of_rows
from lora_ft.models.build import first_line
from lora_ft.models.heads import with_classes
from lora_ft.models.meta_model import read_config
from lora_ft.models.stored import of_config
from lora_ft.settings.plan import Hardware
from lora_ft.settings.setting import OnResume
from lora_ft.training import checkpoint
from lora_ft.training.dry_run import DryRun
from lora_ft.training.metrics import peak_memory_bytes
from lora_ft.training.shared import Shared
from lora_ft.training.state import TrainingState, longest

log = logging.getLogger("lora_ft")

_SHARE_OF_TIME = 0.02  # of a run, that a trace for its result may take
_SECONDS_PER_LAYER = 0.05
_LESS = 0.95  # of the predicted peak, that another prediction may have after the run ran out of memory
_ALLOCATOR = 64 << 20  # more than the gaps that a prediction of a small run allows for


class Forecast:
    """The memory of one run on the device that it trains on."""

    def __init__(self, cfg: config.TrainRun, shared: Shared, device: torch.device) -> None:
        self.cfg, self.shared, self.device = cfg, shared, device
        self._traces: Traces = {}
        self._started = time.perf_counter()

    def check(self, found: DryRun) -> None:
        """Raise ResourceError if the run cannot fit into the free memory; warn if it may not fit.

        Only exact terms refuse a run. A family that cannot be traced is trained.
        """
        machine = self._machine
        budget = machine.budget_bytes
        if budget is None or _bound(self.cfg, found, self._model_config) <= USABLE * budget:
            return
        try:
            needed = self._predict(_frugal(self.cfg, self.shared.rows.dataset), machine)
            if needed.fits:
                return
            what = "loading its base" if needed.loading_bytes > needed.peak_bytes else f"its {needed.phase}"
            figures = f"{what} needs {_gb(needed.needed_bytes)}, and {_gb(budget)} are free"
            if refused := needed.least_bytes - self._mapped(needed) > budget:
                figures += f". {_listed(self._advice(machine))}"
        except Exception as error:  # code of a model family that does not run without values
            log.info("the memory of this run cannot be predicted: %s", first_line(error))
            return
        if refused:
            raise ResourceError(f"the run does not fit into the memory of {machine.name}: {figures}")
        log.warning("the run may not fit into the memory of %s: %s, part of it assumed", machine.name, figures)

    def follow(self, state: TrainingState) -> None:
        """Take over the settings that the state has settled."""
        self.cfg = self.cfg.with_train(
            gradient_checkpointing=state.gradient_checkpointing, tokens_per_microbatch=state.tokens_per_microbatch
        )

    def peak(self) -> int | None:
        """Return the predicted peak, to compare with `metrics.peak_memory_bytes`; None if it is not worth the time.

        On a GPU it is that of tensors, on a CPU that of the process.
        """
        seconds = _SECONDS_PER_LAYER * min(num_layers(self._model_config), ENOUGH)
        if seconds > _SHARE_OF_TIME * (time.perf_counter() - self._started):
            return None
        machine = self._machine

        def peak(setting: str, model_config: Any) -> float:
            cfg = self.cfg.with_train(gradient_checkpointing=setting)
            return self._comparable(self._predict(cfg, machine, model_config))

        try:
            return int(extrapolated(peak, self.cfg.train.gradient_checkpointing, self._model_config))
        except Exception as error:  # as in `check`
            log.debug("the memory of this run cannot be predicted: %r", error)
            return None

    def explain(self, folder: Path) -> str:
        """Return the text of an error after the run has run out of memory: peaks, changes that fit, how to go on."""
        measured = peak_memory_bytes(self.device)
        try:
            machine = self._machine
            found = self._predict(self.cfg, machine)
            figures = f"{_gb(measured)} at the peak, {_gb(self._comparable(found))} predicted"
            # What was predicted and what was measured did not fit, so less must be predicted.
            tensors = min(measured, int(_LESS * self._comparable(found)))
            most = tensors + found.peak_bytes - self._comparable(found)
            machine = dataclasses.replace(machine, memory_bytes=min(machine.budget_bytes or most, most), used_bytes=0)
            advice = self._advice(machine, is_loaded=True)
        except Exception as error:
            log.debug("no advice: %r", error)
            figures, advice = f"{_gb(measured)} at the peak", []
        return "\n".join([f"{figures}. {_listed(advice)}", self._continuation(folder, advice)])

    def _continuation(self, folder: Path, advice: list[Advice]) -> str:
        """Return the line that names the last checkpoint, and a command that continues from it with less memory."""
        try:
            last = checkpoint.newest(folder)
        except CheckpointError:
            last = None
        if last is None:
            return "there is no checkpoint yet: start again with one of these changes"
        free = next((each.changes for each in advice if _may_change(each.changes)), None)
        shrink = [] if self.cfg.train.on_oom is OnOom.shrink else ["train.on_oom=shrink"]
        words = shlex.join([f"resume={folder}", *(free or shrink)])
        return f"last checkpoint: {last}; continue with: lora-ft train {words}"

    @functools.cached_property
    def _machine(self) -> Machine:
        """The device with the memory that was free when the run began: later, the run itself uses it."""
        machine = resolve(Hardware(), str(self.device), rates=False)
        loaded = self.shared.base
        if loaded is None or self.device.type == "cuda":  # a GPU's own tensors do not count as used
            return machine
        held = sum(p.untyped_storage().nbytes() for p in loaded.base.model.parameters())
        return dataclasses.replace(machine, used_bytes=max(0, machine.used_bytes - held))

    @functools.cached_property
    def _model_config(self) -> Any:
        return with_classes(read_config(self.cfg.model), self.shared.rows.dataset.classes)

    def _predict(self, cfg: config.TrainRun, machine: Machine, model_config: Any = None) -> Prediction:
        work = of_rows(cfg, self.shared.rows.dataset).of_largest()
        return predict(cfg, model_config or self._model_config, work, machine, self._traces)

    def _comparable(self, found: Prediction) -> int:
        return found.trace.peak_bytes if self.device.type == "cuda" else found.peak_bytes

    def _mapped(self, found: Prediction) -> int:
        """Return the bytes of weights that stay in the mapped file on a CPU: the system can drop them."""
        files = of_config(self._model_config)
        is_mapped = files.trains if files else self.cfg.quant.kind is QuantKind.none
        if self.device.type != "cpu" or not is_mapped:
            return 0
        return sum(term.bytes for term in found.terms if term.name.startswith("base"))

    def _advice(self, machine: Machine, is_loaded: bool = False) -> list[Advice]:
        work = of_rows(self.cfg, self.shared.rows.dataset)
        return advise(self.cfg, self._model_config, work, machine, self._traces, is_loaded=is_loaded)


def _frugal(cfg: config.TrainRun, rows: Dataset) -> config.TrainRun:
    """Return the settings with auto at its most frugal."""
    if cfg.train.gradient_checkpointing == "auto":
        cfg = cfg.with_train(gradient_checkpointing="every_1")
    if cfg.train.tokens_per_microbatch == "auto":
        cfg = cfg.with_train(tokens_per_microbatch=max(longest(cfg, rows.train), longest_group(rows.eval)))
    return cfg


def _bound(cfg: config.TrainRun, found: DryRun, model_config: Any) -> int:
    """Return bytes that no run of these settings exceeds, from a few numbers."""
    text = model_config.get_text_config()
    tokens = min(found.steps.largest, cfg.train.microbatch_limit or found.steps.largest)
    weights = 4 * found.layers.base + 16 * found.layers.trainable + _ALLOCATOR
    loss = 16 * text.vocab_size * tokens
    heads = 8 * text.num_attention_heads * tokens * num_layers(model_config)
    attention = heads * (1 if cfg.fast.attention else tokens)
    return (
        weights + loss + attention + tokens * kept_per_token(model_config, text.hidden_size, num_layers(model_config))
    )


def _may_change(changes: list[str]) -> bool:
    """Return True if a resumed run may change these settings."""
    free = {s.key for s in validation.settings(config.TrainRun) if s.on_resume is OnResume.free}
    return all(change.partition("=")[0] in free for change in changes)


def _listed(advice: list[Advice]) -> str:
    if not advice:
        return f"To save memory, {errors.SAVES_MEMORY['train']}"
    return "\n  ".join(["Each of these lines fits:", *map(str, advice)])


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
