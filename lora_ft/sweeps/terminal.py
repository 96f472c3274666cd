"""Print the tables of a sweep in a terminal: narrow ones leave out columns rather than cut numbers. No torch here.

console.print(table(ranking))
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from lora_ft.sweeps import tables
from lora_ft.sweeps.leaderboard import Ranking
from lora_ft.sweeps.tables import Cell, Column, Kind, Table

_GAP = 3  # blanks between columns
_TEXT = 24  # a longer text is wrapped to keep the other columns


def table(ranking: Ranking) -> RenderableType:
    """The tables of report.md for a terminal."""
    return Group(*(part for one in tables.tables(ranking) for part in _rich(one)))


def _rich(table: Table) -> Iterator[RenderableType]:
    yield Text(f"\n{table.title}", style="bold")
    if table.note:
        yield Text(table.note, style="dim")
    if table.kind is not Kind.reasons:
        yield _Fitted(table)
        return
    for row in table.rows:  # long texts do not fit into columns
        texts = {column.title: cell.text for column, cell in zip(table.columns, row.cells, strict=True)}
        yield Text(f"job {texts['job']}  {texts['status']}{': ' * bool(texts['why'])}{texts['why']}")
        if texts.get("log"):
            yield Padding(Text(texts["log"], style="dim", overflow="fold"), (0, 0, 0, 2))


@dataclass(frozen=True)
class _Fitted:
    """A table without the columns that do not fit into the terminal."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = self.table.columns
        texts = [[_brief(column, row.cells[at]) for row in self.table.rows] for at, column in enumerate(columns)]
        widths = [_width(column, cells) for column, cells in zip(columns, texts, strict=True)]
        shown = list(range(len(columns)))
        for at in sorted(shown, key=lambda at: -columns[at].spare):
            if sum(widths[i] + _GAP for i in shown) - _GAP > options.max_width and columns[at].spare:
                shown.remove(at)
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for at in shown:
            is_number = columns[at].is_number
            drawn.add_column(_name(columns[at]), justify="right" if is_number else "left", no_wrap=is_number,
                             overflow="fold")  # fmt: skip
        for number in range(len(self.table.rows)):
            drawn.add_row(*(Text(texts[at][number]) for at in shown))
        yield drawn


def _width(column: Column, texts: list[str]) -> int:
    widest = max(map(cell_len, [_name(column), *texts]))
    return widest if column.is_number else min(widest, _TEXT)


def _name(column: Column) -> str:
    return column.short or column.name


def _brief(column: Column, cell: Cell) -> str:
    """The text of a cell; a status without its reason, which is printed in full below."""
    return cell.text.partition(":")[0] if column.kind == "status" else cell.text
