"""The tables that every report shows: report.md, report.html and the terminal alike. No torch here.

for table in tables(standing):         leaderboards, seeds as repeats, what was stopped, what has no result
    table.rows[0][3].text              "2.3366"; .value is what it is sorted by
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lora_ft.sweeps.results import JobResult, State, finite
from lora_ft.sweeps.standing import SEED, Board, Standing, values_of

_STATUS = 48  # characters of a reason beside a job's figures


@dataclass(frozen=True)
class Column:
    """A table's column: its name, a short one for narrow places, and whether its cells are numbers.

    spare: where the place is too narrow for all, the column with the highest is the first to be left out; 0: never.
    """

    name: str
    short: str = ""
    is_number: bool = True
    spare: int = 0


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by (the text itself where it is no number)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells; `jobs[i]` is the job that row i is of, None for the base and for settings."""

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    jobs: tuple[JobResult | None, ...]


def tables(standing: Standing) -> Iterator[Table]:
    """All that a report shows: the leaderboards, seeds as repeats, what was stopped, what has no result."""
    boards = standing.boards or (Board(None, None, (), ()),)
    for number, board in enumerate(boards):
        alone = len(boards) == 1
        yield _leaderboard(standing, board, "" if alone else f" {number + 1}", standing.rest if alone else ())
        if standing.has_seeds and any(len(setting.jobs) > 1 for setting in board.settings):
            yield _repeats(standing, board, "" if alone else f" {number + 1}")
    stopped = [job for job in standing.sweep.jobs if job.state is State.stopped]
    if stopped:
        yield _reasons("Stopped early", "why", stopped, standing, with_log=False)
    if standing.rest:
        yield _reasons("Without a result", "why", standing.rest, standing, with_log=True)


def _leaderboard(standing: Standing, board: Board, number: str, rest: Iterable[JobResult]) -> Table:
    columns = (
        Column("place", "#"),
        Column("job", is_number=False),
        *_setting_columns(standing, seed=standing.has_seeds),
        Column("held-out loss, nats per token", "loss"),
        Column("perplexity", "ppl", spare=1),
        Column("tokens/s", spare=2),
        Column("peak memory, GB", "GB", spare=3),
        Column("adapter, MB", "MB", spare=4),
        Column("parameters, trainable", "parameters", spare=5),
        Column("train time", "time"),
        Column("status", is_number=False),
    )
    rows: list[tuple[Cell, ...]] = []
    jobs: list[JobResult | None] = []
    if board.base_loss is not None:
        blanks = [Cell("")] * len(columns)
        at = len(columns) - 8  # behind place, job and settings
        losses = [loss_cell(board.base_loss), perplexity_cell(board.base_loss)]
        rows.append((blanks[0], Cell("base"), *blanks[2:at], *losses, *blanks[at + 2 :]))
        jobs.append(None)
    for job in (*board.ranked, *rest):
        figures = job.figures
        place = board.place(job)
        rows.append((
            number_cell(place, "{:d}"),
            Cell(job.name, finite(int(job.name)) if job.name.isdecimal() else None),
            *setting_cells(standing, values_of(job), seed=standing.has_seeds),
            loss_cell(figures.heldout_loss, missing="not finite" if job.is_finished and board.base_loss else ""),
            perplexity_cell(figures.heldout_loss),
            number_cell(figures.tokens_per_second, "{:,.0f}"),
            number_cell(figures.peak_memory_bytes, "{:.2f}", 1e9),
            number_cell(figures.adapter_bytes, "{:.2f}", 1e6),
            number_cell(figures.trainable_parameters, "{:,.0f}"),
            Cell(duration(figures.train_seconds), figures.train_seconds),
            Cell(status(job)),
        ))  # fmt: skip
        jobs.append(job)
    return Table(f"Leaderboard{number}", _note(standing, board), columns, tuple(rows), tuple(jobs))


def _note(standing: Standing, board: Board) -> str:
    notes = []
    if board.heldout_tokens and board.base_loss is not None:
        notes.append(f"Losses over the same {board.heldout_tokens:,} held-out tokens.")
    elif board.ranked:
        notes.append("No held-out loss of the base, so there is nothing to rank by.")
    if len(standing.boards) > 1:
        notes.append("Losses of different leaderboards are of different rows or bases, and not to be compared.")
    if any(job.figures.peak_memory_bytes for job in board.ranked):
        notes.append("Peak memory is that of the process, which jobs that take turns on one base share.")
    return " ".join(notes)


def _repeats(standing: Standing, board: Board, number: str) -> Table:
    columns = (
        Column("place", "#"),
        *_setting_columns(standing, seed=False),
        Column("mean held-out loss, nats per token", "mean loss"),
        Column("standard deviation", "deviation"),
        Column("n"),
        Column("jobs", is_number=False),
    )
    rows = [
        (
            number_cell(place if setting.losses else None, "{:d}"),
            *setting_cells(standing, setting.values, seed=False),
            loss_cell(setting.mean if setting.losses else None),
            number_cell(setting.deviation, "{:.4f}"),
            number_cell(len(setting.losses), "{:d}"),
            Cell(", ".join(job.name for job in setting.jobs)),
        )
        for place, setting in enumerate(board.settings, 1)
    ]
    note = "Jobs that differ in seed only, as repeats of one setting. The deviation is the sample's (n - 1)."
    return Table(f"Settings{number}", note, columns, tuple(rows), (None,) * len(rows))


def _reasons(title: str, why: str, jobs: Iterable[JobResult], standing: Standing, *, with_log: bool) -> Table:
    columns = [Column("job", is_number=False), *_setting_columns(standing, seed=standing.has_seeds)]
    columns += [Column("status", is_number=False), Column(why, is_number=False)]
    columns += [Column("log", is_number=False)] if with_log else []
    rows = []
    for job in jobs:
        cells = [Cell(job.name, finite(int(job.name)) if job.name.isdecimal() else None)]
        cells += setting_cells(standing, values_of(job), seed=standing.has_seeds)
        cells += [Cell(job.state.value), Cell(job.reason)]
        cells += [Cell(job.log or "")] if with_log else []
        rows.append(tuple(cells))
    return Table(title, "", tuple(columns), tuple(rows), tuple(jobs))


def _setting_columns(standing: Standing, *, seed: bool) -> Iterator[Column]:
    last = [name.rpartition(".")[2] for name in standing.columns]
    for name, short in zip(standing.columns, last, strict=True):
        yield Column(name, short if last.count(short) == 1 else name)
    if seed:
        yield Column(SEED)


def setting_cells(standing: Standing, values: dict[str, Any], *, seed: bool) -> list[Cell]:
    names = [*standing.columns, SEED] if seed else standing.columns
    return [Cell(value_text(values[name]), finite(values[name])) if name in values else Cell("") for name in names]


def value_text(value: Any) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    return "null" if value is None else str(value)


def number_cell(value: float | None, form: str, unit: float = 1) -> Cell:
    return Cell("") if value is None else Cell(form.format(value / unit if unit != 1 else value), value)


def loss_cell(loss: float | None, missing: str = "") -> Cell:
    return Cell(missing) if loss is None else Cell(f"{loss:.4f}" if loss < 1e4 else f"{loss:.3g}", loss)


def perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def perplexity_cell(loss: float | None) -> Cell:
    value = perplexity(loss)
    return Cell("") if value is None else Cell(f"{value:.2f}" if value < 1e4 else f"{value:.3g}", value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def status(job: JobResult) -> str:
    """A job's state in a line; a longer reason stands whole in a table of its own."""
    first = job.reason.partition("\n")[0]
    first = first if len(first) <= _STATUS else f"{first[: _STATUS - 1].rstrip()}…"
    return f"{job.state.value}: {first}" if first else job.state.value
