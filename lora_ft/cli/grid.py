"""Compose the jobs of a grid of values, as a sweep does, without running them or making a folder. No torch here.

adapter.r=4,8 seed=1,2  ->  GridJob(number=0, cfg=..., overrides=["adapter.r=4", "seed=1"]), ... 4 jobs
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from lora_ft.cli import guard
from lora_ft.cli.composition import CommandLine, checked, composing, implied
from lora_ft.cli.tasks import Task
from lora_ft.errors import ConfigError


@dataclass(frozen=True)
class GridJob:
    """A job of a grid: its number, its checked config, and the overrides as typed."""

    number: int
    cfg: Any
    overrides: list[str]


def jobs(line: CommandLine) -> list[GridJob]:
    """Compose the jobs of a command line in the order of a sweep; raise one ConfigError that names all bad jobs."""
    line = dataclasses.replace(line, multirun=True)
    found, wrong = [], []
    with composing(line) as (hydra, composed, _):
        guard.check_composed(composed)
        sweeper = composed.hydra.sweeper
        if not sweeper._target_.endswith(".BasicSweeper"):
            raise ConfigError(f"a plan needs the values of its jobs, which {sweeper._target_} chooses during the sweep")
        typed = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)  # keeps the escapes of texts
        assert isinstance(typed, list)
        grid = [*(f"{key}={value}" for key, value in (sweeper.params or {}).items()), *typed]
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(grid)
        [each_job] = BasicSweeper.split_arguments(parsed, None)
        task = Task(line.command, _unused, functools.partial(checked, line), implied(line), multirun=True)
        for number, overrides in enumerate(each_job):
            job = hydra.config_loader.load_sweep_config(composed, overrides)
            with open_dict(job):
                job.hydra.job.id = job.hydra.job.num = number
                job.hydra.runtime.output_dir = str(Path.cwd())
            HydraConfig.instance().set_config(job)
            try:
                plan = task.plan(job)
            except ConfigError as error:
                wrong.append(str(error))
            else:
                found.append(GridJob(number, plan.cfg, plan.overrides))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _unused(*_: object) -> None:
    raise AssertionError("the jobs of a plan are not run")
