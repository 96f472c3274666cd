"""The task that Hydra calls once for each job of a command. It keeps failures, instead of letting Hydra report them.

task(composed)             runs the job here: main(cfg, folder, overrides)
task.plan(composed)        the job's config, folder and overrides, for a launcher that runs jobs elsewhere
"""

import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lora_ft import runs
from lora_ft.cli.overrides import as_typed
from lora_ft.errors import ConfigError, LoraFtError, out_of_memory
from lora_ft.io import redact

FAILED = float("inf")  # the value of a job that failed: a sweeper that minimizes a loss never takes it for the best

_OF_THE_SWEEP = ("sweep.", "resume=")  # overrides that are not part of the command of a single job


class Plan(typing.NamedTuple):
    """The parts of a job: its checked config, the absolute run folder, and the overrides as typed."""

    cfg: Any
    folder: Path
    overrides: list[str]


@dataclass
class Task:
    """The jobs of one call of a command, and their outcomes.

    `checked` turns a composed config into the command's dataclass; `implied` are overrides that nobody typed.
    """

    command: str
    main: Callable[[Any, Path, list[str]], float | None]
    checked: Callable[[DictConfig], Any]
    implied: list[str]
    multirun: bool
    succeeded: int = 0
    failures: list[Exception] = field(default_factory=list)

    def plan(self, composed: DictConfig) -> Plan:
        """Return the parts of a job; a ConfigError about its config names the job's number and overrides."""
        folder, overrides = self._folder_and_overrides()
        try:
            return Plan(self.checked(composed), folder, overrides)
        except ConfigError as error:
            raise ConfigError(f"job {HydraConfig.get().job.num} ({' '.join(overrides)}): {error}") from error

    def __call__(self, composed: DictConfig) -> float | None:
        folder, overrides = self._folder_and_overrides()
        try:
            # A launcher may call this in a process of its own, where nothing else keeps secrets off the screen.
            with redact.shown():
                result = self.main(self.checked(composed), folder, overrides)
        except Exception as error:
            self._fail(error, folder, overrides)
            return FAILED
        self.succeeded += 1
        return result

    def _fail(self, error: Exception, folder: Path, overrides: list[str]) -> None:
        """Keep the reason why a job failed; the jobs of a sweep also write it to their folders and to stderr."""
        failure = out_of_memory(self.command, error) or error
        self.failures.append(failure)
        if self.command == "sweep":
            runs.fail(folder, failure, overrides)
        if self.multirun:
            text = "\n" + "".join(traceback.format_exception(failure)).rstrip()  # of a bug
            text = str(failure) if isinstance(failure, LoraFtError) else text
            sys.stderr.write(f"job {HydraConfig.get().job.num} ({' '.join(overrides)}): {text}\n")

    def _folder_and_overrides(self) -> tuple[Path, list[str]]:
        hydra = HydraConfig.get()
        listed = typing.cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False))
        own = [o for o in listed if o not in self.implied and not o.startswith(_OF_THE_SWEEP)]
        return Path(hydra.runtime.output_dir), list(as_typed(self.command, own))
