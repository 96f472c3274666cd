"""Show a classification: a table of classes and a confusion matrix as text, and the matrix as a picture.

          precision   recall      F1   rows          right \\ predicted   negative   positive
negative     0.9217   0.8833  0.9021    120          negative                 106         14
positive     0.8833   0.9217  0.9021    115          positive                   9        106
"""

from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_ft.evaluation import charts
from lora_ft.evaluation.classification import LEVEL, Classification
from lora_ft.evaluation.generation import visible

_MOST_COLUMNS = 12  # of a confusion matrix as text
_MOST_CLASSES = 20  # of the table in a terminal: those with the most rows
_MOST_PAIRS = 10
_MOST_COUNTS = 25  # classes of a picture that shows the counts


def metric_rows(base: Classification | None, adapter: Classification) -> Iterator[tuple[str, float | None, float, str]]:
    """Yield the name of each metric, the values of base and adapter, and the adapter's interval as text."""
    for name, value in adapter.metrics.items():
        low, high = adapter.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.4f} to {high:.4f} ({LEVEL:.0%} of resamples)"
        yield name, None if base is None else base.metrics.get(name), value, interval


def render(found: Classification) -> RenderableType:
    """Render the table of classes and the confusion matrix; with many classes the largest, and the largest errors."""
    parts: list[RenderableType] = [_classes(found)]
    if found.confusion is not None:
        wide = len(found.classes) > _MOST_COLUMNS
        parts += [Text(), _errors(found, found.confusion) if wide else _confusion(found, found.confusion)]
    if found.temperature is not None:
        parts += [Text(), Text(f"temperature {found.temperature:.4f}, applied to the probabilities of the adapter")]
    return Group(*parts)


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if number else "left", overflow="fold")
    return table


def _classes(found: Classification) -> Table:
    table = _table("", "precision", "recall", "F1", "rows")
    shown = sorted(found.classes, key=lambda c: -c.support)[:_MOST_CLASSES]
    for c in found.classes:
        if c in shown:
            numbers = (f"{value:.4f}" for value in (c.precision, c.recall, c.f1))
            table.add_row(Text(visible(c.label)), *numbers, f"{c.support:,}")
    if left_out := len(found.classes) - len(shown):
        table.add_row(Text(f"{left_out} more", style="dim"))
    return table


def _confusion(found: Classification, counts: list[list[int]]) -> Table:
    table = _table("right \\ predicted", *(visible(c.label) for c in found.classes))
    for c, row in zip(found.classes, counts, strict=True):
        table.add_row(Text(visible(c.label)), *(f"{count:,}" for count in row))
    return table


def _errors(found: Classification, counts: list[list[int]]) -> Table:
    table = _table("most frequent errors: right", "predicted", "rows")
    labels = [visible(c.label) for c in found.classes]
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    for n, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_MOST_PAIRS]:
        table.add_row(Text(labels[i]), Text(labels[j]), f"{n:,}")
    return table


def picture(found: Classification, title: str) -> bytes | None:
    """Draw the confusion matrix as a PNG: shares of the rows of each right class; None for multi-label rows."""
    if found.confusion is None:
        return None
    from matplotlib.figure import Figure

    counts = np.array(found.confusion)
    classes = len(counts)
    labels = [" ".join(c.label.split())[:24] for c in found.classes]
    with charts.drawing("confusion"):
        side = min(12.0, 1.8 + 0.5 * classes)
        figure = Figure(figsize=(side + 1, side))
        axes = figure.add_subplot()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        size = max(3.0, min(9.0, 360 / classes / 3))
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), labels, fontsize=size)
        axes.set_xlabel("predicted", color=charts.TEXT)
        axes.set_ylabel("right", color=charts.TEXT)
        for i, j in np.argwhere(counts > 0).tolist() if classes <= _MOST_COUNTS else ():
            color = charts.PAPER if shares[i, j] > 0.6 else charts.TEXT
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=size, color=color)
        return charts.png(figure, title)
