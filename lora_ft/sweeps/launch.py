"""The jobs of a sweep from Hydra's plans to their values: what is missing is run, and the report kept up to date.

plans -> jobs -> [children] -> result.json, failure.json -> held-out losses
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from lora_ft import config, runs
from lora_ft.cli.tasks import FAILED, Plan
from lora_ft.sweeps import children, jobs, live, report
from lora_ft.sweeps.jobs import Job


def launch(plans: Mapping[int, Plan], settings: config.Launcher, folder: Path) -> dict[int, float | None]:
    """Run the jobs that have no result yet, by number; the held-out loss of each, `FAILED` for one without result."""
    if not plans:
        return {}
    sweep: config.Sweep = next(iter(plans.values())).cfg.sweep
    planned = [Job(number, plan.folder, jobs.alone(plan.cfg), plan.words) for number, plan in plans.items()]
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
    return {job.number: _value(job) for job in planned}


def _value(job: Job) -> float | None:
    if not (job.folder / runs.RESULT).is_file():
        return FAILED
    value: float | None = runs.read_result(job.folder).get("heldout_loss")
    return value
