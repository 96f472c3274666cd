"""A sweep as one page of HTML that needs nothing else: no network, no font, no script to be complete. No torch here.

page(standing)  ->  <!doctype html> ... best · leaderboard · charts · what was stopped · what failed

All text of settings, paths and messages is escaped; the page's policy lets only its own style and script act.
"""

import base64
import hashlib
import html
from collections.abc import Iterator

from lora_ft.sweeps import svg
from lora_ft.sweeps.charts import Chart, Kind, charts, y_range
from lora_ft.sweeps.results import JobResult, State, shown
from lora_ft.sweeps.standing import Standing
from lora_ft.sweeps.style import CSS, JS
from lora_ft.sweeps.tables import Cell, Column, Table, duration, loss_cell, perplexity_cell, tables, value_text

_TEXTS = {"why", "log", "jobs"}


def page(standing: Standing) -> str:
    """The whole document."""
    numbers = {job.name: number for number, job in enumerate(standing.sweep.jobs)}
    first, *rest = [_table(table, standing, numbers) for table in tables(standing)]
    pictures = charts(standing)
    return "".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>Sweep {_text(shown(standing.sweep.folder.name))}</title>\n",
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n",
        *_head(standing),
        first,
        *(_charts(standing, pictures) if pictures else ()),
        *rest,
        "<footer>Written by lora-ft from the files of the sweep. Losses are means over supervised tokens; "
        "perplexity is exp(loss).</footer>\n",
        f"</main>\n<script>{JS}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _policy() -> str:
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (CSS, JS))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _head(standing: Standing) -> Iterator[str]:
    sweep = standing.sweep
    yield f'<h1>Sweep {_text(shown(sweep.folder.name))}</h1>\n<p class="path">{_text(shown(str(sweep.folder)))}</p>\n'
    yield f'<code class="command">{_text(sweep.own_command)}</code>\n'
    yield '<dl class="tiles">\n'
    if best := standing.best:
        base = standing.boards[0].base_loss
        of_base = "" if base is None else f"base {loss_cell(base).text}"
        yield _tile("Best held-out loss", loss_cell(best.figures.heldout_loss).text, of_base, "best")
        of_base = "" if base is None else f"base {perplexity_cell(base).text}"
        yield _tile("Perplexity", perplexity_cell(best.figures.heldout_loss).text, of_base)
        yield _tile("Best job", best.name, describe(standing, best))
    finished = sum(job.is_finished for job in sweep.jobs)
    counts = [(state, sum(job.state is state for job in sweep.jobs)) for state in State if state is not State.finished]
    others = ", ".join(f"{count} {state.value}" for state, count in counts if count)
    seconds = sum(job.figures.train_seconds or 0 for job in sweep.jobs)
    others += f"{'; ' * bool(others)}trained for {duration(seconds)}" if seconds else ""
    yield _tile("Jobs finished", f"{finished} of {len(sweep.jobs)}", others)
    yield "</dl>\n"


def _tile(name: str, value: str, more: str, kind: str = "") -> str:
    small = f"<small>{_text(more)}</small>" if more else ""
    return f'<div class="{kind}"><dt>{_text(name)}</dt><dd>{_text(value)}{small}</dd></div>\n'


def describe(standing: Standing, job: JobResult) -> str:
    """The settings by which a job differs from the others."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in standing.values(job).items())


def _table(table: Table, standing: Standing, numbers: dict[str, int]) -> str:
    with_command = table.title.startswith("Leaderboard")
    columns = [*table.columns, *([Column("command", is_number=False)] if with_command else [])]
    body = []
    for row, job in zip(table.rows, table.jobs, strict=True):
        number = numbers[job.name] if job else None
        cells = [_cell(cell, column, job, number) for cell, column in zip(row, table.columns, strict=True)]
        if with_command:
            cells.append(_command(standing.sweep.command(job)) if job else "<td></td>")
        marker = "" if number is None else f' data-job="{number}"'
        body.append(f'<tr class="{_row_class(job, standing, with_command)}"{marker}>{"".join(cells)}</tr>\n')
    empty = f'<tr><td colspan="{len(columns)}">No job has begun.</td></tr>\n'
    note = f'<p class="note">{_text(table.note)}</p>\n' if table.note else ""
    return (
        f'<section>\n<h2>{_text(table.title)}</h2>\n{note}<div class="scroll" tabindex="0">\n<table>\n'
        f"<thead><tr>{''.join(map(_header, columns))}</tr></thead>\n"
        f"<tbody>\n{''.join(body) or empty}</tbody>\n</table>\n</div>\n</section>\n"
    )


def _row_class(job: JobResult | None, standing: Standing, is_leaderboard: bool) -> str:
    if job is None:
        return "base" if is_leaderboard else ""
    best = standing.best
    first = is_leaderboard and best is not None and job.name == best.name
    return "first" if first else "" if job.is_finished else "out"


def _header(column: Column) -> str:
    name, _, unit = column.name.partition(", ")
    small = f"<small>{_text(unit)}</small>" if unit else ""
    kind = ' class="n"' if column.is_number else ""
    return f'<th scope="col"{kind}><button type="button">{_text(name)}</button>{small}</th>'


def _cell(cell: Cell, column: Column, job: JobResult | None, number: int | None) -> str:
    kinds = ["n"] if column.is_number and (cell.value is not None or not cell.text) else []
    if column.name in _TEXTS:
        kinds.append("wrap")
    elif column.name == "status":
        kinds.append("status")
    elif column.is_number and len(cell.text) > 24:
        kinds.append("value")
    if column.name == "status" and job and job.state in (State.failed, State.unreadable):
        kinds.append("failed")
    before = svg.swatch(number) if column.name == "job" and number is not None else ""
    sort = "" if cell.value is None else f' data-v="{cell.value}"'
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}{sort}>{before}{_text(cell.text)}</td>"


def _command(command: str) -> str:
    return f'<td><button class="copy" type="button">Copy</button><code class="cmd">{_text(command)}</code></td>'


def _charts(standing: Standing, pictures: list[Chart]) -> Iterator[str]:
    jobs = standing.sweep.jobs
    titles = [", ".join(filter(None, [f"job {job.name}", describe(standing, job), _loss(job)])) for job in jobs]
    drawn = sorted({number for chart in pictures for number in chart.jobs})
    yield '<section>\n<h2>Charts</h2>\n<ul class="legend">\n'
    for number in drawn:
        settings = describe(standing, jobs[number])
        said = f"{jobs[number].name}: {settings}" if settings else f"job {jobs[number].name}"
        yield f'<li data-job="{number}">{svg.swatch(number)}{_text(said)}</li>\n'
    yield '</ul>\n<div class="charts">\n'
    for chart in pictures:
        notes = [chart.note, "Higher values are cut off." if y_range(chart)[2] else ""]
        yield f"<figure>\n<h3>{_text(chart.title)}</h3>\n{svg.draw(chart, titles)}\n"
        means = [series.label for series in chart.series if series.kind is Kind.means and series.label]
        if means and not chart.name.startswith("size"):
            lines = [f"<li>{svg.mean_swatch(i % svg.DASHES)}{_text(label)}</li>" for i, label in enumerate(means)]
            yield f'<ul class="legend">{"".join(lines)}</ul>\n'
        yield f'<figcaption class="note">{_text(" ".join(filter(None, notes)))}</figcaption>\n</figure>\n'
    yield "</div>\n</section>\n"


def _loss(job: JobResult) -> str:
    loss = job.figures.heldout_loss
    return job.state.value if loss is None else f"held-out loss {loss_cell(loss).text}"
