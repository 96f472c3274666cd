"""Executors run the jobs of a sweep. To add one, write a file here and a line in `EXECUTORS`."""

import dataclasses

from lora_ft import config
from lora_ft.errors import ConfigError
from lora_ft.sweeps.executors.interface import Executor
from lora_ft.sweeps.executors.local import LocalProcesses
from lora_ft.sweeps.executors.ray import RayTasks
from lora_ft.sweeps.executors.slurm import SlurmJobs

EXECUTORS: dict[str, Executor] = {"local": LocalProcesses(), "slurm": SlurmJobs(), "ray": RayTasks()}

_OF_ALL = frozenset({"executor", "share_base"})


def executor(name: str) -> Executor:
    """Return the executor that `hydra.launcher.executor` names; raises ConfigError for an unknown name."""
    if name not in EXECUTORS:
        raise ConfigError(f"hydra.launcher.executor must be one of {', '.join(EXECUTORS)}, got {name}")
    return EXECUTORS[name]


def check(launcher: config.Launcher) -> None:
    """Raise ConfigError for settings that the chosen executor does not honour."""
    honoured, defaults = executor(launcher.executor).settings | _OF_ALL, config.Launcher()
    problems = []
    for name in (field.name for field in dataclasses.fields(config.Launcher)):
        value = getattr(launcher, name)
        if name not in honoured and value != getattr(defaults, name):
            others = " or ".join(other for other, found in EXECUTORS.items() if name in found.settings)
            problems.append(
                f"hydra.launcher.{name} needs hydra.launcher.executor={others}, got {launcher.executor}: "
                f"leave out hydra.launcher.{name}={value}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
