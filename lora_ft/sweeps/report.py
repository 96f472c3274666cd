"""Write the reports of a sweep from its files: report.md, report.json, report.html and PNG charts. No torch here.

report = write(folder, pictures=False)     # after each job; with pictures at the end
sys.exit(exit_code(report.sweep))          # 0: all finished, 3: some did not; if all failed: that of the first
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.io import durable
from lora_ft.metric_table import LOSS
from lora_ft.sweeps import figures, leaderboard, results, tables
from lora_ft.sweeps.figures import Chart
from lora_ft.sweeps.leaderboard import Board, Ranking
from lora_ft.sweeps.page import page
from lora_ft.sweeps.results import JobResult, State, Sweep, shown
from lora_ft.sweeps.tables import Table

MARKDOWN, JSON, HTML = "report.md", "report.json", "report.html"

_FAILED_IN_PART = 3
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~])")


@dataclass(frozen=True)
class Report:
    """The ranking of a sweep and the paths of the files written."""

    ranking: Ranking
    paths: tuple[Path, ...]

    @property
    def sweep(self) -> Sweep:
        return self.ranking.sweep


def write(folder: Path, pictures: bool) -> Report:
    """Read a sweep and write its reports into its folder; ConfigError if it is not a sweep folder."""
    ranking = leaderboard.rank(results.read(folder))
    charts = figures.charts(ranking)
    record = json.dumps(_record(ranking), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    texts = {
        MARKDOWN: markdown(ranking, charts if pictures else []),
        HTML: page(ranking, charts),
        JSON: f"{record}\n",
    }
    files = {name: text.encode("utf-8", "replace") for name, text in texts.items()}  # results.shown removed secrets
    files |= {f"{chart.name}.png": chart.png() for chart in charts if pictures}
    for name, content in files.items():
        durable.write_bytes(ranking.sweep.folder / name, content)
    return Report(ranking, tuple(ranking.sweep.folder / name for name in files))


def exit_code(sweep: Sweep) -> int:
    """Return the exit code of the sweep's command."""
    if all(job.is_finished for job in sweep.jobs):
        return 0
    if all(job.state is State.failed for job in sweep.jobs):
        return sweep.jobs[0].exit_code or 1
    return _FAILED_IN_PART


def markdown(ranking: Ranking, charts: list[Chart]) -> str:
    """Make report.md: tables, links to the PNG files of `charts`, and the command of each job."""
    sweep = ranking.sweep
    lines = [f"# Sweep {_escaped(shown(sweep.folder.name))}", "", "```sh", sweep.own_command, "```"]
    for table in tables.tables(ranking):
        lines += ["", f"## {table.title}", "", *([table.note, ""] if table.note else []), *_grid(table)]
    if charts:
        lines += ["", "## Charts", "", *(f"![{chart.title}]({chart.name}.png)" for chart in charts)]
    if sweep.jobs:
        lines += ["", "## Command of each job", "", "```sh"]
        for job in sweep.jobs:
            lines += [f"# {_one_line(job.name)}", sweep.command(job)]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def _grid(table: Table) -> list[str]:
    rows = [[_escaped(column.name) for column in table.columns]]
    rows += [[_escaped(cell.text) for cell in row.cells] for row in table.rows]
    widths = [min(40, max(3, *map(len, texts))) for texts in zip(*rows, strict=True)]
    numbers = [column.is_number for column in table.columns]
    rows.insert(1, [f"{'-' * (w - 1)}:" if number else "-" * w for w, number in zip(widths, numbers, strict=True)])

    def line(row: list[str]) -> str:
        cells = zip(row, widths, numbers, strict=True)
        return f"| {' | '.join(text.rjust(w) if number else text.ljust(w) for text, w, number in cells)} |"

    return [line(row) for row in rows]


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _record(ranking: Ranking) -> dict[str, Any]:
    """Make report.json: the figures of all tables, units in the names, null for unknown or not finite."""
    sweep = ranking.sweep
    places = {job.name: (n, board.place(job)) for n, board in enumerate(ranking.boards) for job in board.ranked}
    return {
        "sweep": {
            "folder": shown(str(sweep.folder)), "overrides": list(sweep.overrides), "exit_code": exit_code(sweep)
        },
        "differing_settings": list(ranking.columns),
        "metric": ranking.metric,
        "best_job": ranking.best.name if ranking.best else None,
        "leaderboards": [_board(board) for board in ranking.boards],
        "jobs": [_job(ranking, job, *places.get(job.name, (None, None))) for job in sweep.jobs],
    }  # fmt: skip


def _board(board: Board) -> dict[str, Any]:
    unit = "eval_loss_nats_per_token" if board.metric == LOSS else f"eval_{board.metric}"
    return {
        "eval_tokens": board.eval_tokens,
        "base_eval_loss_nats_per_token": board.base_loss,
        "base_perplexity": tables.perplexity(board.base_loss),
        "base_value": board.base_value,
        "jobs": [job.name for job in board.ranked],
        "settings": [
            {
                "values": setting.values,
                "jobs": [job.name for job in setting.jobs],
                "n": len(setting.results),
                f"mean_{unit}": setting.mean,
                f"standard_deviation_{unit.removeprefix('eval_loss_')}": setting.deviation,
            }
            for setting in board.settings
        ],
    }


_UNITS = {"eval_loss": "nats_per_token", "base_eval_loss": "nats_per_token",
          "best_eval_loss": "nats_per_token", "eval_losses": "nats_per_token", "base_eval_losses": "nats_per_token",
          "peak_memory_bytes": "of_process"}  # fmt: skip


def _job(ranking: Ranking, job: JobResult, board: int | None, place: int | None) -> dict[str, Any]:
    figures = dataclasses.asdict(job.figures)
    return {
        "name": job.name,
        "folder": shown(str(job.folder)),
        "log": job.log,
        "leaderboard": board,
        "place": place,
        "settings": ranking.values(job),
        "overrides": list(job.overrides),
        "command": ranking.sweep.command(job),
        "status": job.state.value,
        "reason": job.reason or None,
        "exit_code": job.exit_code,
        "last_step": job.curve.last_step,
        "perplexity": tables.perplexity(job.figures.eval_loss),
    } | {f"{name}_{_UNITS[name]}" if name in _UNITS else name: value for name, value in figures.items()}
