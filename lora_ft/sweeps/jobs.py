"""The jobs of a sweep, and which of them may share a base. No torch here.

adapter.r=4,8  model=smollm2_135m,gpt2      ->  [r=4 smollm2, r=8 smollm2]  [r=4 gpt2, r=8 gpt2]

Jobs share a base where each learns, byte for byte, what it would learn alone. So everything that the base, its rows
and its paths through the layers are made from has to be equal; adapter, optimizer, steps and seed may differ.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import config, validation

_ALONE = ("adapter", "optim", "train", "seed", "track", "resume")  # what one job may have otherwise than another


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its number, absolute folder, settings and the overrides that gave them."""

    number: int
    folder: Path
    cfg: config.TrainRun
    overrides: list[str]


def grouped(jobs: list[Job], share: bool) -> list[list[Job]]:
    """The jobs by the base that they share, in the order of their numbers; a job that shares with none is alone."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        alone = not share or job.cfg.model.added_tokens
        groups.setdefault(f"job {job.number}" if alone else _shared(job.cfg), []).append(job)
    return list(groups.values())


def _shared(cfg: config.TrainRun) -> str:
    plain = validation.to_plain(cfg)
    same = {name: value for name, value in plain.items() if name not in _ALONE}
    # A layer that one job trains in full is computed by its plain path in all.
    return json.dumps([same, sorted(cfg.adapter.modules_to_save)], sort_keys=True)


def pieces(group: list[Job], count: int) -> list[list[Job]]:
    """A group cut for `count` devices: as even as can be, none empty."""
    return [piece for i in range(count) if (piece := group[i::count])]


def alone(cfg: config.SweepRun) -> config.TrainRun:
    """What a job would be run with by `lora-ft train`."""
    return config.TrainRun(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(config.TrainRun)})


def to_plain(job: Job) -> dict[str, Any]:
    """A job as JSON has it, for `from_plain` in another process."""
    return {
        "number": job.number,
        "folder": str(job.folder),
        "cfg": validation.to_plain(job.cfg),
        "overrides": job.overrides,
    }


def from_plain(plain: dict[str, Any]) -> Job:
    cfg = validation.from_plain(config.TrainRun, plain["cfg"])
    return Job(plain["number"], Path(plain["folder"]), cfg, plain["overrides"])


def from_checkpoint(job: Job) -> Job:
    """Return the job with `resume=auto`, to go on where an earlier process left it, or to begin."""
    return dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, resume="auto"))


def warnings(jobs: list[Job]) -> Iterator[str]:
    """What the values that were chosen do beside what they say."""
    adapters = [job.cfg.adapter for job in jobs]
    ranks = sorted({a.r for a in adapters})
    if len(ranks) > 1 and len({a.lora_alpha for a in adapters}) == 1 and not any(a.use_rslora for a in adapters):
        scales = [adapters[0].lora_alpha / r for r in ranks]
        yield (
            f"adapter.r goes from {ranks[0]} to {ranks[-1]} at one adapter.lora_alpha, {adapters[0].lora_alpha:g}: the "
            f"update's scale, lora_alpha / r, falls from {scales[0]:g} to {scales[-1]:g}, so the effective learning "
            "rate is swept as well. 'adapter.lora_alpha=${adapter.r}' or adapter.use_rslora=true keeps it constant"
        )
