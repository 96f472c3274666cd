"""Run the jobs of a sweep that have no result yet, and keep its report up to date.

jobs -> [children] -> result.json, failure.json -> eval losses
"""

import sys
from pathlib import Path

from lora_ft import config, runs
from lora_ft.sweeps import children, jobs, live, report
from lora_ft.sweeps.jobs import Job


def launch(planned: list[Job], sweep: config.Sweep, settings: config.Launcher, folder: Path) -> dict[int, float | None]:
    """Run the jobs that have no result yet; return the eval loss of each job that has a result now, by number."""
    for warning in jobs.warnings(planned):
        sys.stderr.write(f"{warning}\n")
    left = [job for job in planned if not runs.is_finished(job.folder, job.cfg)]
    for job in left:
        if not runs.exists(job.folder):
            runs.write_overrides(job.folder, job.words)
    ended = -1
    with live.displayed(planned, folder) as show:

        def watch() -> None:
            nonlocal ended
            show()
            now = sum((job.folder / name).exists() for job in planned for name in (runs.RESULT, runs.FAILURE))
            if now != ended:
                report.write(folder, pictures=False)
                ended = now

        children.run(left, settings, sweep, folder, watch)
    finished = [job for job in planned if (job.folder / runs.RESULT).is_file()]
    return {job.number: runs.read_result(job.folder).get("heldout_loss") for job in finished}
