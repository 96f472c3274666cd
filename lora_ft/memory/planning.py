"""Plan a run: its memory, its time, what it downloads and writes, and what would make it fit.

    make(cfg)                                        reads the rows if cfg.data names any
    make_for(cfg, base, workload, machine)           for rows and a base that are known

Only the base's config is read, and its tokenizer if there are rows.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lora_ft import config
from lora_ft.memory import machine as machines
from lora_ft.memory import workload as workloads
from lora_ft.memory.machine import Machine
from lora_ft.memory.prediction import Prediction, Traces, predict
from lora_ft.memory.workload import Workload
from lora_ft.models.described import Described, described
from lora_ft.models.load import load_tokenizer
from lora_ft.training.dry_run import read_rows


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    cfg: its settings, with train.gradient_checkpointing as auto chooses it. advice: changes that save memory; empty if
    the run fits and none was asked for.
    """

    cfg: config.TrainRun
    base: Described
    prediction: Prediction

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of a step of median size; None if a rate of the machine is unknown."""
        return None

    @property
    def seconds(self) -> float | None:
        """Time of the run's steps; None if it, or the number of tokens, is unknown."""
        speed, tokens = self.tokens_per_second, self.prediction.workload.tokens
        return tokens / speed if speed and tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON; bytes and seconds."""
        found, work = self.prediction, self.prediction.workload
        return {
            "model": self.base.hub_id or self.cfg.model.path,
            "config_source": self.base.source,
            "hardware": {
                "name": found.machine.name,
                "memory_bytes": found.machine.memory_bytes,
                "used_bytes": found.machine.used_bytes,
                "budget_bytes": found.machine.budget_bytes,
                "sources": dict(found.machine.sources),
            },
            "fits": found.fits,
            "peak_bytes": found.peak_bytes,
            "left_bytes": found.left_bytes,
            "phase": found.phase,
            "gradient_checkpointing": found.gradient_checkpointing,
            "terms": [dataclasses.asdict(term) for term in found.terms],
            "micro_batch": list(map(int, work.largest)),
            "steps": work.steps,
            "tokens": work.tokens,
            "epochs": work.epochs,
            "tokens_per_step": work.typical_tokens,
            "assumed": work.assumed,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
        }


def make(cfg: config.CheckRun, advice: bool | None = None, traces: Traces | None = None) -> Plan:
    """Plan a run on `cfg.hardware`, with its own rows if `cfg.data` names any.

    advice: True for changes that save memory, None only if it does not fit. `traces` shares traces between plans.
    """
    base = described(cfg.model)
    if cfg.data.path:
        work = workloads.of_rows(cfg, read_rows(cfg, load_tokenizer(cfg.model)).dataset)
    else:
        work = workloads.of_settings(cfg, getattr(base.config, "max_position_embeddings", None))
    return make_for(cfg, base, work, machines.resolve(cfg.hardware, cfg.device), advice, traces)


def make_for(
    cfg: config.TrainRun,
    base: Described,
    workload: Workload,
    machine: Machine,
    advice: bool | None = None,
    traces: Traces | None = None,
) -> Plan:
    """Plan a run of these rows on this base and machine."""
    traces = {} if traces is None else traces
    found = predict(cfg, base.config, workload, machine, traces)
    train = dataclasses.replace(cfg.train, gradient_checkpointing=found.gradient_checkpointing)
    return Plan(dataclasses.replace(cfg, train=train), base, found)
