"""Train once for each combination of the values given, over one base in memory, and report.

lora-ft sweep model=smollm2_135m data=chatterbot adapter.r=2,4,8

words -> Hydra's sweeper -> hydra/launcher=lora_ft -> sweeps/ -> SWEEP FOLDER: 0/ 1/ 2/ report.html
"""

import sys
from pathlib import Path

from rich.console import Console

from lora_ft import config
from lora_ft.cli import entry
from lora_ft.sweeps import jobs, report, terminal


def main(cfg: config.SweepRun, invocation: entry.Invocation) -> float | None:
    """One job of a sweep in this process, for other launchers than ours; returns the held-out loss."""
    from lora_ft import train  # here: the process that only launches jobs needs no torch

    return train.main(jobs.alone(cfg), invocation)


def end(folder: Path) -> int:
    """Report on a sweep whose jobs have ended; returns its exit code."""
    written = report.write(folder, pictures=True)
    Console().print(terminal.table(written.ranking))
    sys.stdout.write(f"\n{folder / 'report.html'}\n")
    return report.exit_code(written.sweep)


if __name__ == "__main__":
    entry.run("sweep")
