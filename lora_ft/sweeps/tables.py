"""The tables of a sweep, the same in report.md, report.html and the terminal. No torch here.

for table in tables(ranking):          leaderboards, repeats with other seeds, stopped jobs, jobs without a result
    table.rows[0].cells[3].text        "2.3366"; .value is the number to sort by
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft import metric_table
from lora_ft.metric_table import LOSS
from lora_ft.sweeps.leaderboard import SEED, Board, Ranking, base_value_of, value_of, values_of
from lora_ft.sweeps.results import JobResult, State, finite

_STATUS = 48  # characters of a reason in a leaderboard


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and the number to sort by if the text is one."""

    text: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A column: its title, the cell of each row, a short title, the unit, and `kind`: number, text, prose or status.

    Narrow output leaves out columns by `spare`, the highest first; columns with 0 always stay.
    """

    title: str
    cell: Callable[[Any], Cell]
    short: str = ""
    unit: str = ""
    kind: str = "number"
    spare: int = 0

    @property
    def name(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def is_number(self) -> bool:
        return self.kind == "number"


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    job: JobResult | None = None  # None for the base and for settings


@dataclass(frozen=True)
class Table:
    """A table; `kind` is leaderboard, settings or reasons."""

    kind: str
    title: str
    note: str
    columns: list[Column]
    rows: list[Row]


def tables(ranking: Ranking) -> Iterator[Table]:
    """Make all tables of a report."""
    boards = ranking.boards or (Board(None, None, (), ()),)
    for number, board in enumerate(boards, 1):
        which = "" if len(boards) == 1 else f" {number}"
        yield _leaderboard(ranking, board, f"Leaderboard{which}", ranking.rest if len(boards) == 1 else ())
        if ranking.has_seeds and any(len(setting.jobs) > 1 for setting in board.settings):
            yield _settings(ranking, board, f"Settings{which}")
    if stopped := [job for job in ranking.sweep.jobs if job.state is State.stopped]:
        yield _reasons(ranking, "Stopped early", stopped)
    if ranking.rest:
        log = Column("log", lambda job: Cell(job.log or ""), kind="prose")
        yield _reasons(ranking, "Without a result", ranking.rest, log)


def _leaderboard(ranking: Ranking, board: Board, title: str, rest: Sequence[JobResult]) -> Table:
    def loss(job: JobResult) -> Cell:
        missing = "not finite" if job.is_finished and job.figures.base_eval_loss else ""
        return _number(job.figures.eval_loss, loss_text, missing)

    def figure(name: str, form: str, unit: float = 1) -> Callable[[JobResult], Cell]:
        return lambda job: _number(getattr(job.figures, name), lambda value: form.format(value / unit))

    columns = [
        Column("place", lambda job: _number(board.place(job), str), "#"),
        *_job_columns(ranking),
        *_metric_columns(board),
        Column("eval loss", loss, "loss", loss_unit(board.ranked)),
        *_source_columns(board),
        Column("perplexity", lambda job: _perplexity(job.figures.eval_loss, [job]), "ppl", spare=1),
        Column("tokens/s", figure("tokens_per_second", "{:,.0f}"), spare=2),
        Column("peak memory", figure("peak_memory_bytes", "{:.2f}", 1e9), "GB", "GB", spare=3),
        Column("adapter", figure("adapter_bytes", "{:.2f}", 1e6), "MB", "MB", spare=4),
        Column("parameters", figure("trainable_parameters", "{:,.0f}"), "parameters", "trainable", spare=5),
        Column("train time", lambda job: _number(job.figures.train_seconds, duration), "time"),
        Column("status", lambda job: Cell(status(job)), kind="status"),
    ]
    rows = _rows(columns, [*board.ranked, *rest])
    return Table("leaderboard", title, _note(ranking, board), columns, [*_base_rows(board, columns), *rows])


def _base_rows(board: Board, columns: list[Column]) -> Iterator[Row]:
    """Yield a row for each base of the jobs, if the metric of the board is known for it."""
    for jobs in board.bases:
        if (value := base_value_of(jobs, board.metric)) is None:
            continue
        loss, of_sources = jobs[0].figures.base_eval_loss, jobs[0].figures.base_eval_losses
        names = ", ".join(job.name for job in sorted(jobs, key=lambda job: job.number))
        cells = {"job": Cell(f"base of {names}" if len(board.bases) > 1 else "base"),
                 "eval loss": _number(loss, loss_text), "perplexity": _perplexity(loss, jobs)}  # fmt: skip
        cells |= {f"eval loss {name}": _number(loss, loss_text) for name, loss in of_sources.items()}
        cells |= {metric_table.title(board.metric): _number(value, loss_text)}
        yield Row(tuple(cells.get(column.title, Cell()) for column in columns))


def _source_columns(board: Board) -> Iterator[Column]:
    """Yield a column for the eval loss of each source of data.sources."""
    for name in sorted({name for job in board.ranked for name in job.figures.eval_losses}):

        def loss(job: JobResult, name: str = name) -> Cell:
            return _number(job.figures.eval_losses.get(name), loss_text)

        yield Column(f"eval loss {name}", loss, name, loss_unit(board.ranked))


def _metric_columns(board: Board) -> Iterator[Column]:
    """Yield the column of the metric that ranks the jobs, unless it is the loss, which has one."""
    if board.metric != LOSS:
        yield Column(
            metric_table.title(board.metric), lambda job: _number(value_of(job, board.metric), loss_text), board.metric
        )


def _note(ranking: Ranking, board: Board) -> str:
    notes = []
    if board.metric != LOSS:
        direction = "higher" if metric_table.METRICS[board.metric].higher_is_better else "lower"
        notes.append(f"Ranked by {board.metric} over the same eval rows, {direction} is better.")
    elif board.eval_tokens and board.base_loss is not None:
        notes.append(f"Losses over the same {board.eval_tokens:,} eval tokens.")
    elif board.ranked:
        notes.append("The eval loss of the base is unknown, so the jobs are not ranked.")
    if any(job.has_head for job in board.ranked):
        notes.append("The base of a head is the class frequencies of the training rows.")
    if len(ranking.boards) > 1:
        notes.append(f"Do not compare {'losses' if board.metric == LOSS else board.metric} of different leaderboards: "
                     "their eval rows or bases differ.")  # fmt: skip
    if any(job.figures.peak_memory_bytes for job in board.ranked):
        notes.append("Peak memory is that of the process, which jobs on one base share.")
    return " ".join(notes)


def _settings(ranking: Ranking, board: Board, title: str) -> Table:
    places = {id(setting): place for place, setting in enumerate(board.settings, 1) if setting.results}
    columns = [
        Column("place", lambda setting: _number(places.get(id(setting)), str), "#"),
        *_setting_columns(ranking.columns, lambda setting: setting.values),
        Column(
            f"mean {metric_table.title(board.metric)}",
            lambda setting: _number(setting.mean, loss_text),
            f"mean {board.metric}",
            loss_unit(board.ranked) if board.metric == LOSS else "",
        ),
        Column("standard deviation", lambda setting: _number(setting.deviation, "{:.4f}".format), "deviation"),
        Column("n", lambda setting: _number(len(setting.results), str)),
        Column("jobs", lambda setting: Cell(", ".join(job.name for job in setting.jobs)), kind="prose"),
    ]
    note = "Jobs that differ in seed only, as repeats of one setting. The deviation is the sample's (n - 1)."
    return Table("settings", title, note, columns, _rows(columns, board.settings))


def _reasons(ranking: Ranking, title: str, jobs: Sequence[JobResult], *more: Column) -> Table:
    columns = [
        *_job_columns(ranking),
        Column("status", lambda job: Cell(job.state.value), kind="status"),
        Column("why", lambda job: Cell(job.reason), kind="prose"),
        *more,
    ]
    return Table("reasons", title, "", columns, _rows(columns, jobs))


def _rows(columns: list[Column], items: Sequence[Any]) -> list[Row]:
    return [
        Row(tuple(column.cell(item) for column in columns), item if isinstance(item, JobResult) else None)
        for item in items
    ]


def _job_columns(ranking: Ranking) -> Iterator[Column]:
    """Yield the columns of the job's name and of the settings in which the jobs differ."""
    number = {job.name: finite(int(job.name)) for job in ranking.sweep.jobs if job.name.isdecimal()}
    yield Column("job", lambda job: Cell(job.name, number.get(job.name)), kind="text")
    yield from _setting_columns([*ranking.columns, *([SEED] if ranking.has_seeds else [])], values_of)


def _setting_columns(names: Sequence[str], values: Callable[[Any], dict[str, Any]]) -> Iterator[Column]:
    last = [name.rpartition(".")[2] for name in names]
    for name, short in zip(names, last, strict=True):

        def cell(item: Any, name: str = name) -> Cell:
            known = values(item)
            return Cell(value_text(known[name]), finite(known[name])) if name in known else Cell()

        yield Column(name, cell, short if last.count(short) == 1 else name)


def value_text(value: Any) -> str:
    """Return a setting's value as typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    return "null" if value is None else str(value)


def describe(values: dict[str, Any]) -> str:
    """Return settings and their values in one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def _number(value: float | None, form: Callable[[Any], str], missing: str = "") -> Cell:
    return Cell(missing) if value is None else Cell(form(value), value)


def _perplexity(loss: float | None, jobs: Iterable[JobResult]) -> Cell:
    return _number(perplexity(loss, jobs), perplexity_text)


def loss_text(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.3g}"


def loss_unit(jobs: Iterable[JobResult]) -> str:
    """Return the unit of the losses of jobs; classifiers with a head have one of their own."""
    units = dict.fromkeys("nats per row" if job.has_head else "nats per token" for job in jobs)
    return " or ".join(units) or "nats per token"


def perplexity(loss: float | None, jobs: Iterable[JobResult]) -> float | None:
    """Return exp(loss); None for the loss of classifiers with a head among the jobs."""
    if any(job.has_head for job in jobs):
        return None
    return math.exp(loss) if loss is not None and loss < 700 else None


def perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"


def status(job: JobResult) -> str:
    """Return a job's state in one line, with the beginning of the reason."""
    first = job.reason.partition("\n")[0]
    first = first if len(first) <= _STATUS else f"{first[: _STATUS - 1].rstrip()}…"
    return f"{job.state.value}: {first}" if first else job.state.value
