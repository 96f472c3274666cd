"""Executors run the jobs of a sweep. To add one, write a file here and a line in `EXECUTORS`."""

from lora_ft.errors import ConfigError
from lora_ft.sweeps.executors.interface import Executor
from lora_ft.sweeps.executors.local import LocalProcesses

EXECUTORS: dict[str, Executor] = {"local": LocalProcesses()}


def executor(name: str) -> Executor:
    """Return the executor that `hydra.launcher.executor` names; raises ConfigError for an unknown name."""
    if name not in EXECUTORS:
        raise ConfigError(f"hydra.launcher.executor must be one of {', '.join(EXECUTORS)}, got {name}")
    return EXECUTORS[name]
