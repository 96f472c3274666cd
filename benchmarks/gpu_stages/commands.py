"""Commands of lora_ft, `lora-ft COMMAND key=value ...`, each in a process of its own.

A process starts anew on a GPU, since CUDA cannot be used after a fork. A dry run forks one that has imported lora_ft,
which saves four seconds a command; all that follows is the same.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_stages.setting import Setting


@dataclass
class Command:
    """A command that has started; `log` is the file of its output."""

    process: Any
    log: Path
    started: float

    def finish(self, expected: int = 0) -> float:
        """Wait for the end and return the seconds; raises RuntimeError with the output's end for another exit code."""
        self.process.join()
        if self.process.exitcode != expected:
            lines = self.log.read_text("utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.log.stem}: exit code {self.process.exitcode}: {' '.join(lines[-2:])[-300:]}")
        return time.perf_counter() - self.started

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Kill the process with SIGKILL as soon as a condition holds; raises RuntimeError if it has ended by then."""
        while not condition() and self.process.exitcode is None:
            time.sleep(0.002)
        self.process.kill()
        self.finish(expected=-9)


def start(setting: Setting, name: str, command: str, *overrides: str, memory: int | None = None) -> Command:
    """Start a command; its output goes to NAME.log in the work folder. `memory` limits its bytes, but not on a GPU."""
    log = setting.work / f"{name}.log"
    context: Any = multiprocessing.get_context(setting.sized("spawn", "fork"))
    process = context.Process(target=_run, args=(command, list(overrides), str(log), memory))
    process.start()
    return Command(process, log, time.perf_counter())


def _run(command: str, overrides: list[str], log: str, memory: int | None) -> None:
    from lora_ft.cli import entry

    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = ["lora-ft", command]
    entry.run(command, overrides)
