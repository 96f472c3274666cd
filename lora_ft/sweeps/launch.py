"""Run the jobs of a sweep that have no result, with a live display and a report that follows them.

jobs -> scheduler -> workers -> result.json, failure.json -> eval losses
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lora_ft import config, runs
from lora_ft.sweeps import executors, jobs, live, report, scheduler
from lora_ft.sweeps.executors.interface import Handle
from lora_ft.sweeps.jobs import Job

_SECONDS_BETWEEN_REPORTS = 30.0


def launch(planned: list[Job], sweep: config.Sweep, settings: config.Launcher, folder: Path) -> dict[int, float | None]:
    """Run the jobs that have no result; return the eval loss of each job that then has one, by number.

    Raises ConfigError for settings that the executor does not honour, and the errors of `scheduler.run`.
    """
    executors.check(settings)
    for warning in jobs.warnings(planned, scheduler.groups(planned, settings), sweep):
        sys.stderr.write(f"{warning}\n")
    left = [job for job in planned if not runs.is_finished(job.folder, job.cfg)]
    for job in left:
        if not runs.exists(job.folder):
            runs.write_overrides(job.folder, job.overrides)
    num_ended, written = -1, -_SECONDS_BETWEEN_REPORTS
    with live.displayed(planned, left) as show:

        def watch(running: Sequence[Handle]) -> None:
            nonlocal num_ended, written
            show(running)
            # A report takes half a second of a processor that the jobs use; the command writes the last one.
            if time.monotonic() - written >= _SECONDS_BETWEEN_REPORTS:
                written = time.monotonic()
                now = sum((job.folder / name).exists() for job in planned for name in (runs.RESULT, runs.FAILURE))
                if now != num_ended:
                    report.write(folder, pictures=False)
                    num_ended = now

        scheduler.run(left, settings, sweep, folder, watch)
    finished = [job for job in planned if (job.folder / runs.RESULT).is_file()]
    return {job.number: runs.objective(runs.read_result(job.folder)) for job in finished}
