"""Predict the memory and the time of a training on any device, before anything is downloaded.

lora-ft plan model=llama3_1_8b quant=nf4 adapter.r=16 data.max_length=4096 hardware=rtx_4090

config.json -> the run's own step on tensors without values -> terms of the peak, time, files -> verdict -> advice

The exit code is 7 if the run does not fit, and 0 if it fits or if the memory of the device is unknown.
"""

import copy
import dataclasses
import sys
from collections.abc import Sequence

from lora_ft import config, validation
from lora_ft.cli import entry, terminal
from lora_ft.cli.grid import GridJob
from lora_ft.errors import ConfigError, LoraFtError, ResourceError
from lora_ft.memory import plan_page, plan_picture, plan_table, planning
from lora_ft.memory.cards import cards
from lora_ft.memory.plan_page import WIDTH, page
from lora_ft.memory.planning import Plan


def main(cfg: config.PlanRun, invocation: entry.Invocation) -> None:
    """Print the plan; raise ResourceError if the run does not fit."""
    if cfg.out:
        plan_picture.check_path(cfg.out)
    made = planning.make(cfg, cfg.hardware, cfg.fit or None)
    terminal.write(page(made), most_columns=WIDTH, piped_columns=WIDTH)
    if cfg.out:
        sys.stdout.write(f"\n{plan_picture.write(cfg.out, made)}\n")
    if made.prediction.fits is False:
        raise ResourceError(plan_page.verdict(made.prediction))


def plan_jobs(jobs: Sequence[GridJob]) -> None:
    """Print the plans of the jobs of a sweep; raise ResourceError if a job does not fit."""
    if any(job.cfg.out or job.cfg.fit for job in jobs):
        raise ConfigError("out and fit are for the plan of one run: leave them out, or give one value to each setting")
    known, plans = planning.Known(is_quick=True), []
    for job in jobs:
        try:
            plans.append((job.number, job.overrides, planning.make(job.cfg, job.cfg.hardware, False, known)))
        except LoraFtError as error:
            raise type(error)(f"job {job.number} ({' '.join(job.overrides)}): {error}") from error
    terminal.write(plan_table.table(plans), most_columns=WIDTH, piped_columns=WIDTH)
    over = [number for number, _, made in plans if made.prediction.fits is False]
    if over:
        raise ResourceError(f"{len(over)} of {len(plans)} jobs do not fit: {', '.join(map(str, over))}")


def plan(cfg: config.TrainRun, hardware: "str | config.Hardware | None" = None) -> Plan:
    """Plan a run from Python; see `lora_ft.plan`."""
    if type(cfg) not in (config.TrainRun, config.CheckRun, config.PlanRun):
        raise ConfigError(f"cfg must be a config of train, check or plan, got {type(cfg).__name__}")
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    run = validation.typed(config.PlanRun(**values), config.PlanRun)
    if hardware is not None:
        run.hardware = _named(hardware) if isinstance(hardware, str) else validation.typed(hardware, config.Hardware)
    validation.locate_paths(run)
    validation.validate(run)
    return planning.make(run, run.hardware, run.fit or None)


def _named(choice: str) -> config.Hardware:
    found = {card.choice: card.hardware for card in cards()} | {"local": config.Hardware()}
    if choice not in found:
        raise ConfigError(f"hardware={choice}: choose one of {', '.join(sorted(found))}")
    return copy.copy(found[choice])


if __name__ == "__main__":
    entry.run("plan")
