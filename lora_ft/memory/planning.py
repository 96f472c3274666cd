"""Plan a run: its memory, its time, what it downloads and writes, and what would make it fit.

    make(cfg, cfg.hardware)                          reads the rows if cfg.data names any
    make(cfg, cfg.hardware, known=known)             shares traces, configs and rows with other plans

Only the base's config is read, and its tokenizer if there are rows.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_ft import config, validation
from lora_ft.data.dataset import Dataset
from lora_ft.memory import workload as workloads
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.prediction import Prediction, Traces, predict
from lora_ft.memory.workload import Workload
from lora_ft.models.described import Described, described
from lora_ft.models.load import load_tokenizer
from lora_ft.training.dry_run import read_rows


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    cfg: its settings, with the values that replace auto. advice: changes that save memory; empty if the run fits and
    none was asked for.
    """

    cfg: config.TrainRun
    base: Described
    prediction: Prediction

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of a step of median size; None if the rates of the machine are unknown."""
        time, work = self.prediction.time, self.prediction.workload
        # As many tokens as were timed: of micro-batches that differ, all count as the one that was traced.
        return len(work.typical) * sum(work.typical_micro_batch) / time.seconds if time else None

    @property
    def seconds(self) -> float | None:
        """Time of the run's steps; None if it, or the number of tokens, is unknown."""
        speed, tokens = self.tokens_per_second, self.prediction.workload.tokens
        return tokens / speed if speed and tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON; bytes and seconds."""
        found, work = self.prediction, self.prediction.workload
        machine = found.machine
        return {
            "model": self.base.hub_id or self.cfg.model.path,
            "config_source": self.base.source,
            "hardware": {
                "name": machine.name,
                "memory_bytes": machine.memory_bytes,
                "used_bytes": machine.used_bytes,
                "budget_bytes": machine.budget_bytes,
                "sources": dict(machine.sources),
            },
            "fits": found.fits,
            "peak_bytes": found.peak_bytes,
            "left_bytes": found.left_bytes,
            "phase": found.phase,
            "terms": [dataclasses.asdict(term) for term in found.terms],
            "gradient_checkpointing": found.gradient_checkpointing,
            "micro_batch": list(map(int, work.largest)),
            "tokens_per_step": work.typical_tokens,
            "steps": work.steps,
            "tokens": work.tokens,
            "epochs": work.epochs,
            "assumed": work.assumed,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "step": dataclasses.asdict(found.time) if found.time else None,
        }


@dataclass
class Known:
    """What the plans of several runs share: traces, and configs of bases, rows and devices by their settings."""

    traces: Traces = field(default_factory=dict)
    bases: dict[str, Described] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)


def make(
    cfg: config.TrainRun, hardware: config.Hardware, advice: bool | None = None, known: Known | None = None
) -> Plan:
    """Plan a run on a device, with its own rows if `cfg.data` names any.

    advice: True for changes that save memory, None only if it does not fit.
    """
    known = known or Known()
    base = _once(known.bases, (cfg.model,), lambda: described(cfg.model))
    machine = _once(known.machines, (hardware, cfg.device), lambda: resolve(hardware, cfg.device))
    rows = None
    if cfg.data.path:
        chosen = (cfg.model, cfg.data, cfg.objective)
        rows = _once(known.datasets, chosen, lambda: read_rows(cfg, load_tokenizer(cfg.model)).dataset)
    return make_for(cfg, base, rows, machine, advice, known)


def make_for(
    cfg: config.TrainRun,
    base: Described,
    rows: Dataset | None,
    machine: Machine,
    advice: bool | None = None,
    known: Known | None = None,
) -> Plan:
    """Plan a run on a base and a device, with these rows or without rows."""
    known = known or Known()
    found = predict(cfg, base.config, workload_of(cfg, base, rows), machine, known.traces)
    train = dataclasses.replace(cfg.train, gradient_checkpointing=found.gradient_checkpointing)
    return Plan(dataclasses.replace(cfg, train=train), base, found)


def workload_of(cfg: config.TrainRun, base: Described, rows: Dataset | None) -> Workload:
    """Return the work of a run on these rows; without rows, on the longest that settings and base allow."""
    if rows is not None:
        return workloads.of_rows(cfg, rows)
    return workloads.of_settings(cfg, getattr(base.config, "max_position_embeddings", None))


def _once(found: dict[str, Any], settings: tuple[Any, ...], find: Callable[[], Any]) -> Any:
    """Return what was found for these settings, or find it."""
    plain = [validation.to_plain(each) if dataclasses.is_dataclass(each) else each for each in settings]
    key = json.dumps(plain, sort_keys=True)
    if key not in found:
        found[key] = find()
    return found[key]
