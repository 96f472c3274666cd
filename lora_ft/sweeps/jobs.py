"""The jobs of a sweep, and the groups of jobs that share a base. No torch here.

adapter.r=4,8  model=smollm2_135m,gpt2      ->  [r=4 smollm2, r=8 smollm2]  [r=4 gpt2, r=8 gpt2]

A job trains to the same bytes whether it shares its base or not. So jobs of a group have equal settings for everything
that decides the base, its rows and the code paths of its layers. Adapter, optimizer, steps, seed and data.mix may
differ.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError

_MAY_DIFFER = ("adapter", "optim", "train", "seed", "track", "resume")  # within a group
_ORDER_OF_ROWS = ("mix", "mix_until")  # settings of data that may differ: they change no row


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its number, absolute folder, settings, and the overrides that gave them."""

    number: int
    folder: Path
    cfg: config.TrainRun
    overrides: list[str]


def grouped(jobs: list[Job], share: bool) -> list[list[Job]]:
    """Group the jobs that can share a base, in the order of their numbers; without `share`, each is its own group."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        key = _base_key(job.cfg) if share and not job.cfg.model.added_tokens else f"job {job.number}"
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def _base_key(cfg: config.TrainRun) -> str:
    same = {name: value for name, value in validation.to_plain(cfg).items() if name not in _MAY_DIFFER}
    same["data"] = {name: value for name, value in same["data"].items() if name not in _ORDER_OF_ROWS}
    # A layer that one job trains in full is not accelerated, for all jobs of the group. Deterministic kernels may
    # evaluate the bare base, which the jobs of a group do once, to other last bits.
    return json.dumps([same, sorted(cfg.adapter.modules_to_save), cfg.train.deterministic], sort_keys=True)


def train_config(cfg: config.SweepRun) -> config.TrainRun:
    """Return the settings with which `lora-ft train` runs a job."""
    return config.TrainRun(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(config.TrainRun)})


def to_plain(job: Job) -> dict[str, Any]:
    """Convert a job to JSON values, for `from_plain` in another process."""
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
    """Return the job with `resume=auto`, to continue from its newest checkpoint if it has one."""
    return dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, resume="auto"))


def has_outcome(job: Job) -> bool:
    return (job.folder / runs.FAILURE).is_file() or runs.is_finished(job.folder, job.cfg)


def last_checkpoint(job: Job) -> int:
    """Return the steps of a job's newest checkpoint, 0 if it has none."""
    found = (job.folder / runs.CHECKPOINTS).glob("step-[0-9]*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def warnings(jobs: list[Job], groups: list[list[Job]], sweep: config.Sweep) -> Iterator[str]:
    """Yield warnings about the settings of a sweep; `groups` are the jobs of each worker.

    Raises ConfigError if `sweep.halving` can stop no job.
    """
    adapters = [job.cfg.adapter for job in jobs]
    ranks = sorted({a.r for a in adapters})
    if len(ranks) > 1 and len({a.lora_alpha for a in adapters}) == 1 and not any(a.use_rslora for a in adapters):
        scales = [adapters[0].lora_alpha / r for r in ranks]
        yield (
            f"adapter.r varies from {ranks[0]} to {ranks[-1]} while adapter.lora_alpha stays {adapters[0].lora_alpha:g}"
            f": the scale of the update, lora_alpha / r, falls from {scales[0]:g} to {scales[-1]:g}, so the effective "
            "learning rate varies too. 'adapter.lora_alpha=${adapter.r}' or adapter.use_rslora=true keeps it constant"
        )
    if sweep.halving:
        yield from _without_halving(groups, sweep)


def _without_halving(groups: list[list[Job]], sweep: config.Sweep) -> Iterator[str]:
    """Yield a warning that names the jobs that `sweep.halving` compares with no other.

    Raises ConfigError if it compares none and nothing has been trained: a later batch of a sweeper may have one job.
    """
    alone = sorted(job.number for group in groups if len(group) == 1 for job in group)
    numbers = [job.number for group in groups for job in group]
    is_new = 0 in numbers and len(numbers) > 1
    advice = "check hydra.launcher.share_base, model.added_tokens and hydra.launcher.devices"
    if is_new and len(alone) == len(groups):
        raise ConfigError(
            "sweep.halving=true has no jobs to compare: it compares jobs that share a base in one process, and each "
            f"job of this sweep has a process of its own. Set sweep.halving=false, or {advice}"
        )
    lengths = [job.cfg.train.max_steps for group in groups if len(group) > 1 for job in group]
    if is_new and all(steps is not None and steps <= sweep.min_steps for steps in lengths):
        raise ConfigError(
            f"sweep.min_steps must be below train.max_steps for sweep.halving=true, got {sweep.min_steps}: "
            "every job ends before the first comparison"
        )
    if alone:
        names = f"job{'s' * (len(alone) > 1)} {', '.join(map(str, alone))}"
        yield f"sweep.halving compares {names} with no other job, because no other job shares the process: {advice}"
