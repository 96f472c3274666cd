"""What is written of a sweep: report.md, report.json, report.html and pictures, from its files alone. No torch here.

sweep = write(folder, pictures=False)      # after each job; with pictures at the end
sys.exit(exit_code(sweep))                 # 0 all finished, 3 some did not, all failed: the first failure's own
"""

import json
import re
from pathlib import Path
from typing import Any

from lora_ft.io import durable
from lora_ft.sweeps import plots, results, standing, tables
from lora_ft.sweeps.charts import charts
from lora_ft.sweeps.page import page
from lora_ft.sweeps.results import JobResult, State, Sweep, shown
from lora_ft.sweeps.standing import Board, Standing
from lora_ft.sweeps.tables import Table

MARKDOWN, JSON, HTML = "report.md", "report.json", "report.html"

_FAILED_IN_PART = 3
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~])")


def write(folder: Path, pictures: bool) -> Sweep:
    """Read a sweep and write its reports into its folder; ConfigError where the folder is none."""
    sweep = results.read(folder)
    known = standing.of(sweep)
    if pictures:
        plots.draw(charts(known), sweep.folder)
    record = json.dumps(_record(known), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    for name, text in ((JSON, f"{record}\n"), (HTML, page(known)), (MARKDOWN, markdown(known))):
        durable.write_bytes(sweep.folder / name, text.encode("utf-8", "replace"))  # without secrets: results.shown
    return sweep


def written(sweep: Sweep) -> list[Path]:
    """The reports and pictures that lie in a sweep's folder."""
    names = [MARKDOWN, HTML, JSON, *(f"{chart.name}.png" for chart in charts(standing.of(sweep)))]
    return [path for name in names if (path := sweep.folder / name).is_file()]


def exit_code(sweep: Sweep) -> int:
    """What the sweep's command ends with."""
    if all(job.is_finished for job in sweep.jobs):
        return 0
    if all(job.state is State.failed for job in sweep.jobs):
        return sweep.jobs[0].exit_code or 1
    return _FAILED_IN_PART


def markdown(known: Standing) -> str:
    """report.md: tables as GitHub shows them, pictures where they are, and the command of each job."""
    sweep = known.sweep
    lines = [f"# Sweep {_escaped(shown(sweep.folder.name))}", "", "```sh", sweep.own_command, "```"]
    for one in tables.tables(known):
        lines += ["", f"## {one.title}", "", *([one.note, ""] if one.note else []), *_grid(one)]
    if found := [chart for chart in charts(known) if (sweep.folder / f"{chart.name}.png").is_file()]:
        lines += ["", "## Charts", ""]
        lines += [f"![{chart.title}]({chart.name}.png)" for chart in found]
    if sweep.jobs:
        lines += ["", "## Each job alone", "", "```sh"]
        for job in sweep.jobs:
            lines += [f"# {_one_line(job.name)}", sweep.command(job)]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def _grid(table: Table) -> list[str]:
    rows = [[_escaped(column.name) for column in table.columns]]
    rows += [[_escaped(cell.text) for cell in row] for row in table.rows]
    widths = [min(40, max(3, *(len(row[i]) for row in rows))) for i in range(len(table.columns))]
    right = [column.is_number for column in table.columns]

    def line(row: list[str]) -> str:
        cells = [text.rjust(width) if number else text.ljust(width)
                 for text, width, number in zip(row, widths, right, strict=True)]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    ruler = [f"{'-' * (width - 1)}:" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return [line(rows[0]), line(ruler), *map(line, rows[1:])]


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _record(known: Standing) -> dict[str, Any]:
    """report.json: everything of the tables, with units in the names; null where a figure is unknown or not finite."""
    sweep = known.sweep
    places = {job.name: (number, board.place(job)) for number, board in enumerate(known.boards) for job in board.ranked}
    return {
        "sweep": {"folder": shown(str(sweep.folder)), "words": list(sweep.words), "exit_code": exit_code(sweep)},
        "differing_settings": list(known.columns),
        "best_job": known.best.name if known.best else None,
        "leaderboards": [_board(known, board) for board in known.boards],
        "jobs": [_job(known, job, *places.get(job.name, (None, None))) for job in sweep.jobs],
    }


def _board(known: Standing, board: Board) -> dict[str, Any]:
    return {
        "heldout_tokens": board.heldout_tokens,
        "base_heldout_loss_nats_per_token": board.base_loss,
        "base_perplexity": tables.perplexity(board.base_loss),
        "jobs": [job.name for job in board.ranked],
        "settings": [
            {
                "values": setting.values,
                "jobs": [job.name for job in setting.jobs],
                "n": len(setting.losses),
                "mean_heldout_loss_nats_per_token": setting.mean if setting.losses else None,
                "standard_deviation_nats_per_token": setting.deviation,
            }
            for setting in board.settings
        ],
    }


def _job(known: Standing, job: JobResult, board: int | None, place: int | None) -> dict[str, Any]:
    figures = job.figures
    return {
        "name": job.name,
        "folder": shown(str(job.folder)),
        "log": job.log,
        "leaderboard": board,
        "place": place,
        "settings": known.values(job),
        "words": list(job.words),
        "command": known.sweep.command(job),
        "status": job.state.value,
        "reason": job.reason or None,
        "exit_code": job.exit_code,
        "last_step": job.curve.last_step,
        "steps": figures.steps,
        "tokens": figures.tokens,
        "heldout_loss_nats_per_token": figures.heldout_loss,
        "perplexity": tables.perplexity(figures.heldout_loss),
        "base_heldout_loss_nats_per_token": figures.base_heldout_loss,
        "heldout_tokens": figures.heldout_tokens,
        "best_step": figures.best_step,
        "best_heldout_loss_nats_per_token": figures.best_heldout_loss,
        "tokens_per_second": figures.tokens_per_second,
        "train_seconds": figures.train_seconds,
        "peak_memory_bytes_of_process": figures.peak_memory_bytes,
        "adapter_bytes": figures.adapter_bytes,
        "trainable_parameters": figures.trainable_parameters,
    }
