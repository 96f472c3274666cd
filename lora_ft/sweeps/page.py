"""Render a sweep as one self-contained HTML page: page.html.jinja with page.css, page.js and the charts as SVG.

page(ranking, charts)  ->  <!doctype html> ...: summary, leaderboard, charts, stopped and failed jobs

Jinja escapes the text of settings, paths and messages; the content security policy of the page allows only its own
style and script. No torch here.
"""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from lora_ft.evaluation.charts import NUM_LOOKS, look, swatch
from lora_ft.io import templates
from lora_ft.sweeps import tables
from lora_ft.sweeps.figures import Chart, mean_look
from lora_ft.sweeps.leaderboard import Ranking
from lora_ft.sweeps.results import State, Sweep, shown

_FOLDER = Path(__file__).parent


def page(ranking: Ranking, charts: list[Chart]) -> str:
    """Render the whole document."""
    swatches = [_swatch("look", n) for n in sorted({job.number % NUM_LOOKS for job in ranking.sweep.jobs})]
    swatches += [_swatch("mean", n) for n in range(max((len(chart.means) for chart in charts), default=0))]
    style, script = ((_FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        policy=policy, style=Markup(style), script=Markup(script), swatches=swatches,
        ranking=ranking, sweep=ranking.sweep, tables=list(tables.tables(ranking)), progress=_progress(ranking.sweep),
        charts=[(chart, Markup(chart.svg)) for chart in charts], drawn={n for chart in charts for n in chart.jobs},
        num_looks=NUM_LOOKS,
    )  # fmt: skip


@functools.cache
def _template() -> jinja2.Template:
    environment = templates.environment(_FOLDER, is_html=True)
    environment.filters |= {
        "shown": shown,
        "describe": tables.describe,
        "loss": tables.loss_text,
        "perplexity": lambda loss: tables.perplexity_text(tables.perplexity(loss, ()) or float("inf")),
    }
    return environment.get_template("page.html.jinja")


def _source(text: str) -> str:
    """Return the source expression of the policy that allows one inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _swatch(kind: str, number: int) -> Markup:
    """Draw the look of a job, or of a line of means, as an SVG symbol with the id KIND-NUMBER."""
    return Markup(swatch(f"{kind}-{number}", look(number) if kind == "look" else mean_look(number)))


def _progress(sweep: Sweep) -> str:
    """Return the number of jobs in each state but finished, and the time trained so far."""
    counts = {state: sum(job.state is state for job in sweep.jobs) for state in State if state is not State.finished}
    seconds = sum(job.figures.train_seconds or 0 for job in sweep.jobs)
    parts = [", ".join(f"{count} {state.value}" for state, count in counts.items() if count)]
    parts += [f"trained for {tables.duration(seconds)}"] if seconds else []
    return "; ".join(filter(None, parts))
