"""The tables of a sweep in a terminal: what has no place is left out, and no number is cut in two. No torch here.

console.print(table(sweep))                # the figures of report.md, however narrow the window
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from lora_ft.sweeps import standing, tables
from lora_ft.sweeps.results import Sweep
from lora_ft.sweeps.tables import Cell, Column, Table

_GAP = 3  # blanks between columns
_TEXT = 24  # a longer text goes on in the next line rather than at the cost of a column


def table(sweep: Sweep) -> RenderableType:
    """The tables of report.md for a terminal: leaderboard, and what failed with its reason and log."""
    return Group(*(part for one in tables.tables(standing.of(sweep)) for part in _rich(one)))


def _rich(table: Table) -> Iterator[RenderableType]:
    yield Text(f"\n{table.title}", style="bold")
    if table.note:
        yield Text(table.note, style="dim")
    if table.title.startswith(("Without", "Stopped")):  # long texts, which columns would make into ribbons
        names = [column.name for column in table.columns]
        for row in table.rows:
            texts = dict(zip(names, (cell.text for cell in row), strict=True))
            yield Text(f"job {texts['job']}  {texts['status']}{': ' * bool(texts['why'])}{texts['why']}")
            if texts.get("log"):
                yield Padding(Text(texts["log"], style="dim", overflow="fold"), (0, 0, 0, 2))
        return
    yield _Fitted(table)


@dataclass(frozen=True)
class _Fitted:
    """A table without the columns that a narrow terminal has no place for, rather than with numbers cut in two."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = self.table.columns
        widths = [self._width(at) + _GAP for at in range(len(columns))]
        shown = set(range(len(columns)))
        for at in sorted(shown, key=lambda at: -columns[at].spare):
            if sum(widths[i] for i in shown) - _GAP > options.max_width and columns[at].spare:
                shown.remove(at)
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for at in sorted(shown):
            is_number = columns[at].is_number
            drawn.add_column(_named(columns[at]), justify="right" if is_number else "left", no_wrap=is_number,
                             overflow="fold")  # fmt: skip
        for row in self.table.rows:
            drawn.add_row(*(Text(_brief(columns[at], row[at])) for at in sorted(shown)))
        yield drawn

    def _width(self, at: int) -> int:
        column = self.table.columns[at]
        widest = max([cell_len(_named(column)), *(cell_len(_brief(column, row[at])) for row in self.table.rows)])
        return widest if column.is_number else min(widest, _TEXT)


def _named(column: Column) -> str:
    return column.short or column.name


def _brief(column: Column, cell: Cell) -> str:
    """A cell in a terminal, where reasons stand in full below the leaderboard."""
    return cell.text.partition(":")[0] if column.name == "status" else cell.text
