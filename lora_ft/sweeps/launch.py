"""Run the jobs of a sweep that have no result yet, and keep its report up to date.

jobs -> scheduler -> workers -> result.json, failure.json -> eval losses
"""

import sys
import time
from pathlib import Path

from lora_ft import config, runs
from lora_ft.sweeps import jobs, live, report, scheduler
from lora_ft.sweeps.jobs import Job

_SECONDS_BETWEEN_REPORTS = 30.0


def launch(planned: list[Job], sweep: config.Sweep, settings: config.Launcher, folder: Path) -> dict[int, float | None]:
    """Run the jobs that have no result yet; return the eval loss of each job that has a result now, by number."""
    for warning in jobs.warnings(planned):
        sys.stderr.write(f"{warning}\n")
    left = [job for job in planned if not runs.is_finished(job.folder, job.cfg)]
    for job in left:
        if not runs.exists(job.folder):
            runs.write_overrides(job.folder, job.overrides)
    ended, written = -1, -_SECONDS_BETWEEN_REPORTS
    with live.displayed(planned, folder) as show:

        def watch() -> None:
            nonlocal ended, written
            show()
            now = sum((job.folder / name).exists() for job in planned for name in (runs.RESULT, runs.FAILURE))
            # A report takes half a second of a processor that the jobs use; the command writes the last one.
            if now != ended and time.monotonic() - written >= _SECONDS_BETWEEN_REPORTS:
                report.write(folder, pictures=False)
                ended, written = now, time.monotonic()

        scheduler.run(left, settings, sweep, folder, watch)
    finished = [job for job in planned if (job.folder / runs.RESULT).is_file()]
    return {job.number: runs.read_result(job.folder).get("eval_loss") for job in finished}
