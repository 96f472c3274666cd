"""Train once for each combination of the values given, over one base in memory, and report.

lora-ft sweep model=smollm2_135m data=chatterbot adapter.r=2,4,8

overrides -> Hydra's sweeper -> hydra/launcher=lora_ft -> sweeps/ -> SWEEP FOLDER: 0/ 1/ 2/ report.html
"""

import sys
from pathlib import Path

from rich.console import Console

from lora_ft import config, validation
from lora_ft.cli import entry
from lora_ft.sweeps import jobs, leaderboard, report, results, terminal


def main(cfg: config.SweepRun, invocation: entry.Invocation) -> float | None:
    """Run one job of a sweep in this process, for a launcher of Hydra other than ours; return the eval loss."""
    from lora_ft.train import main as train  # here: the process that only launches jobs needs no torch

    return train(jobs.train_config(cfg), invocation)


def sweep(overrides: list[str], folder: Path) -> leaderboard.Ranking:
    """Run a sweep in `folder` and write its report; return the ranking of its jobs."""
    from lora_ft.cli import composition

    folder = folder.expanduser().absolute()
    own = [*overrides, f"hydra.sweep.dir={validation.escape(str(folder))}"]
    composition.run(composition.CommandLine("sweep", own, multirun=True), _unused, end)
    return leaderboard.rank(results.read(folder))


def _unused(*_: object) -> None:
    raise AssertionError("hydra/launcher=lora_ft runs jobs in processes of their own")


def end(folder: Path) -> int:
    """Write and print the report of a sweep whose jobs have ended; return the exit code of the command."""
    written = report.write(folder, pictures=True)
    Console().print(terminal.table(written.ranking))
    sys.stdout.write(f"\n{folder / 'report.html'}\n")
    return report.exit_code(written.sweep)


if __name__ == "__main__":
    entry.run("sweep")
