"""Lay out the plans of a sweep's jobs as a table, and sum them up.

job  settings     peak GiB  verdict   tokens/s   time     adapter
  0  adapter.r=4      7.61  fits
  ...
3 jobs: peak 7.9 GiB, 2 h 10 min, 1.3 GB on the disk
"""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_ft.memory.plan_page import GIB, duration, size, verdict
from lora_ft.memory.planning import Plan


def table(plans: Sequence[tuple[int, list[str], Plan]]) -> RenderableType:
    """Lay out the plans of jobs, each with its number and its overrides; settings that all jobs share are left out."""
    shared = set.intersection(*(set(overrides) for _, overrides, _ in plans)) if len(plans) > 1 else set()
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("job", justify="right")
    made.add_column("settings", overflow="fold")
    made.add_column("peak GiB", justify="right")
    made.add_column("verdict")
    for name in ("tokens/s", "time", "run folder"):
        made.add_column(name, justify="right")
    for number, overrides, plan in plans:
        found, speed = plan.prediction, plan.tokens_per_second
        own = " ".join(each for each in overrides if each not in shared) or "as all"
        fits = {True: Text("fits", "green"), False: Text("does not fit", "red"), None: Text("unknown", "yellow")}
        made.add_row(
            str(number), own, f"{found.needed_bytes / GIB:.2f}", fits[found.fits],
            f"{speed:,.0f}" if speed else "?", duration(plan.seconds),
            size(plan.storage.run_bytes),
        )  # fmt: skip
    return Group(made, Text(), Text(_sum(plans), "bold"))


def _sum(plans: Sequence[tuple[int, list[str], Plan]]) -> str:
    made = [plan for _, _, plan in plans]
    worst = max(made, key=lambda plan: plan.prediction.needed_bytes)
    seconds = None if any(plan.seconds is None for plan in made) else sum(plan.seconds or 0 for plan in made)
    time = "time unknown" if seconds is None else duration(seconds)
    disk = f"{size(sum(plan.storage.run_bytes for plan in made))} on the disk"
    return (
        f"{len(made)} jobs on {worst.prediction.machine.name}: the largest {verdict(worst.prediction)}; {time}, {disk}"
    )
