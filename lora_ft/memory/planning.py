"""Plan a run: its memory, its time, what it downloads and writes, and what would make it fit.

    make(cfg, cfg.hardware)                          reads the rows if cfg.data names any
    make(cfg, cfg.hardware, known=known)             shares traces, configs and rows with other plans

Only the base's config is read, and its tokenizer if there are rows.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_ft import config, mixing, validation
from lora_ft.data.dataset import Dataset
from lora_ft.memory import workload as workloads
from lora_ft.memory.advice import Advice, advise, nearest_hardware
from lora_ft.memory.auto import settings_of
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.pairs import Sizes, fastest
from lora_ft.memory.prediction import Prediction, Traces, predict
from lora_ft.memory.shallow import num_layers
from lora_ft.memory.storage import Storage, storage
from lora_ft.memory.workload import Workload
from lora_ft.models.described import Described, described
from lora_ft.models.heads import with_classes
from lora_ft.models.load import load_tokenizer
from lora_ft.training.dry_run import read_rows


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    cfg: its settings, with the values that replace auto. advice: changes that make it fit, the cheapest first; empty if
    it fits and none was asked for. nearest_hardware: the smallest device of conf/hardware that it fits on, if neither
    the run nor any change fits on this one.
    """

    cfg: config.TrainRun
    base: Described
    prediction: Prediction
    storage: Storage
    advice: tuple[Advice, ...] = ()
    nearest_hardware: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of a step of median size; None if the rates of the machine are unknown."""
        return self.prediction.tokens_per_second

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
            "loading_bytes": found.loading_bytes,
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
            "storage": {**dataclasses.asdict(self.storage), "disk_bytes": self.storage.disk_bytes},
            "advice": [
                {
                    "changes": list(each.changes),
                    "peak_bytes": each.prediction.peak_bytes,
                    "slowdown": each.slowdown,
                    "cost": each.cost,
                }
                for each in self.advice
            ],
            "nearest_hardware": self.nearest_hardware,
            "step": dataclasses.asdict(found.time) if found.time else None,
        }


@dataclass
class Known:
    """Values that the plans of several runs share: traces, and configs of bases, rows and devices by their settings.

    is_quick: trace three layers of models whose layers are alike; the plans have no timeline of all layers.
    """

    traces: Traces = field(default_factory=dict)
    bases: dict[str, Described] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)
    is_quick: bool = False


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
    if mixing.has_rows(cfg.data):
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
    given = cfg
    if rows is not None and rows.classes:
        base = dataclasses.replace(base, config=with_classes(base.config, rows.classes))
    if cfg.train.tokens_per_microbatch == "auto":
        cfg = _with_micro_batch(cfg, base, rows, machine, known.traces)
    work = workload_of(cfg, base, rows)
    found = predict(cfg, base.config, work, machine, known.traces, known.is_quick)
    cfg = cfg.with_train(gradient_checkpointing=found.gradient_checkpointing)
    stored = storage(cfg, base.config, found.trace.num_trainable, work.steps, base, machine.target)
    changes: list[Advice] = []
    nearest = None
    if advice or (advice is None and found.fits is False):
        changes = advise(given, base.config, workload_of(given, base, rows), machine, known.traces, found)
        changes = [each for each in changes if each.changes]
        nearest = nearest_hardware(found) if not (found.fits or changes) else None
    return Plan(cfg, base, found, stored, tuple(changes), nearest)


def _with_micro_batch(
    cfg: config.TrainRun, base: Described, rows: Dataset | None, machine: Machine, traces: Traces
) -> config.TrainRun:
    """Return the settings with the micro-batch, and the recomputation, of the fastest step that fits."""
    whole = cfg.with_train(tokens_per_microbatch=None)
    work = workload_of(whole, base, rows)
    sizes = Sizes(work.longest, sum(work.largest), work.typical_tokens)

    @functools.cache
    def predicted(setting: str, tokens: int) -> Prediction:
        chosen = whole.with_train(gradient_checkpointing=setting, tokens_per_microbatch=tokens)
        work = workload_of(chosen, base, rows)
        # A micro-batch as full as the setting allows, of which the time is asked as well.
        return predict(chosen, base.config, work.of_largest(), machine, traces)

    def seconds(setting: str, tokens: int) -> float:
        time = predicted(setting, tokens).time
        return time.seconds if time else predicted(setting, tokens).trace.flops

    if machine.budget_bytes is None:
        return cfg.with_train(tokens_per_microbatch=sizes.most)
    layers = num_layers(base.config)
    settings = settings_of(layers) if cfg.train.gradient_checkpointing == "auto" else [cfg.train.gradient_checkpointing]
    needed = lambda setting, tokens: predicted(setting, tokens).peak_bytes  # noqa: E731
    setting, tokens = fastest(settings, sizes, needed, seconds, machine.budget_bytes)
    return cfg.with_train(gradient_checkpointing=setting, tokens_per_microbatch=tokens)


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
