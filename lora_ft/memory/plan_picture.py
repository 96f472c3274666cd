"""Draw the memory of a step as a picture: terms stacked over the step, with the phases and the budget.

check_path("plan.png")              before the work: right suffix, no such file
write("plan.html", plan)            PNG, or a page with the chart as SVG and the table of terms; self-contained
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from lora_ft.errors import ConfigError
from lora_ft.evaluation.charts import HUES, TEXT, blank, drawing, png, svg
from lora_ft.io import durable, templates
from lora_ft.memory.plan_bars import GIB, look, stacked
from lora_ft.memory.plan_page import file_facts, hundredths, run_facts, share, title, verdict
from lora_ft.memory.planning import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FOLDER = Path(__file__).parent
_NAME = "memory"  # of the chart in the page
_BUDGET = "#b3261e"


def check_path(out: str) -> Path:
    """Return the path of a picture to write; raises ConfigError for another suffix, or if the file exists."""
    path = Path(out)
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"out={out} must end with .png or .html")
    if path.exists():
        raise ConfigError(f"out={out} exists: remove it, or choose another name")
    return path


def write(out: str, plan: Plan) -> Path:
    """Write the picture of a plan; raises the errors of `check_path`, and ResourceError if it cannot be written."""
    path = check_path(out)
    with drawing(_NAME):
        figure = _figure(plan)
        durable.write_bytes(
            path, png(figure, _caption(plan)) if path.suffix == ".png" else _page(plan, figure).encode()
        )
    return path


def _caption(plan: Plan) -> str:
    return f"{title(plan)}\n{verdict(plan.prediction)}"


def _figure(plan: Plan) -> "Figure":
    found = plan.prediction
    series, phases = stacked(found), found.trace.timeline.phases
    figure, axes = blank("", "memory, GiB")
    points = range(len(phases))
    values = [[count / GIB for count in counts] for counts in series.values()]
    # The terms that come and go are drawn as steps: a curve between two samples would show bytes that are not there.
    axes.stackplot(points, values, labels=list(series), colors=[look(name)[2] for name in series], step="post", lw=0)
    top = max(found.peak_bytes / GIB, *axes.get_ylim())
    budget = found.machine.budget_bytes
    if budget is not None and budget / GIB <= 1.5 * top:
        axes.axhline(budget / GIB, color=_BUDGET, linewidth=1.4, linestyle=(0, (4, 2.2)))
        axes.text(len(phases) - 1, budget / GIB, "budget", color=_BUDGET, ha="right", va="bottom")
        top = max(top, 1.08 * budget / GIB)
    starts = [point for point in points if point == 0 or phases[point] != phases[point - 1]]
    for point in starts[1:]:
        axes.axvline(point, color=TEXT, linewidth=0.6)
    axes.set_ylim(0, top)
    axes.set_xlim(0, len(phases) - 1)
    axes.set_xticks(_apart(starts, len(phases) // 12), [phases[point] for point in starts], ha="left")
    axes.tick_params(axis="x", length=0)
    return figure


def _apart(points: list[int], least: int) -> list[int]:
    """Move positions of labels to the right so that they do not overlap."""
    placed: list[int] = []
    for point in points:
        placed.append(max(point, placed[-1] + least) if placed else point)
    return placed


def _page(plan: Plan, figure: "Figure") -> str:
    found = plan.prediction
    chart = svg(figure, f"memory over a step: {verdict(found)}")
    rows = [(term, hundredths(term.bytes), share(term.bytes, found.peak_bytes)) for term in found.terms]
    return _template().render(
        title=title(plan), verdict=verdict(found), fits=found.fits, phase=found.phase, chart=Markup(chart), rows=rows,
        peak=hundredths(found.peak_bytes), legend=[(name, look(name)[2]) for name in stacked(found)],
        facts=[*run_facts(plan), *file_facts(plan)],
        hues=Markup(" ".join(f"--c{number}: {hue};" for number, hue in enumerate(HUES))),
    )  # fmt: skip


@functools.cache
def _template() -> jinja2.Template:
    return templates.environment(_FOLDER, is_html=True).get_template("plan.html.jinja")
