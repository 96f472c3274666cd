"""Print the tables of a sweep in a terminal; a narrow one gets fewer columns, with their numbers whole. No torch here.

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
from lora_ft.sweeps.tables import Table

_GAP = 3  # blanks between columns
_TEXT = 24  # longer texts are wrapped, to keep the other columns


def table(ranking: Ranking) -> RenderableType:
    """Return the tables of report.md for a terminal."""
    return Group(*(part for one in tables.tables(ranking) for part in _rich(one)))


def _rich(table: Table) -> Iterator[RenderableType]:
    yield Text(f"\n{table.title}", style="bold")
    if table.note:
        yield Text(table.note, style="dim")
    if table.kind != "reasons":
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
        texts, widths = {}, {}
        for at, column in enumerate(self.table.columns):
            cells = [row.cells[at].text for row in self.table.rows]
            # A status without its reason, which is printed in full below.
            texts[column] = [text.partition(":")[0] for text in cells] if column.kind == "status" else cells
            widest = max(map(cell_len, [column.short or column.name, *texts[column]]))
            widths[column] = widest if column.is_number else min(widest, _TEXT)
        for column in sorted(texts, key=lambda column: -column.spare):
            if column.spare and sum(width + _GAP for width in widths.values()) - _GAP > options.max_width:
                del texts[column], widths[column]
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for column in texts:
            drawn.add_column(column.short or column.name, justify="right" if column.is_number else "left",
                             no_wrap=column.is_number, overflow="fold")  # fmt: skip
        for row in zip(*texts.values(), strict=True):
            drawn.add_row(*map(Text, row))
        yield drawn
