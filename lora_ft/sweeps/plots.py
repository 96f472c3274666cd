"""The charts of a sweep as PNG files, for places that show no page; drawn by matplotlib, which is an extra.

draw(charts(standing), folder)  ->  train_loss.png heldout_loss.png rank.png size.png
"""

import io
import logging
from pathlib import Path
from typing import Any

from lora_ft.io import durable
from lora_ft.sweeps.charts import Chart, Kind, doublings, ticks, x_range, y_range
from lora_ft.sweeps.svg import DASHES, HUES

log = logging.getLogger("lora_ft")

_COLORS = ("#0067a5", "#d35400", "#00866a", "#a83f8f", "#b07d00", "#3b9edb")  # the page's, on white
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_MOST_NAMED = 12  # a longer legend would hide what it explains


def draw(charts: list[Chart], folder: Path) -> list[Path]:
    """Write each chart as a PNG; without matplotlib none, and a line that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no pictures beside the report: they need matplotlib: pip install 'lora_ft[plots]'")
        return []
    paths = []
    for chart in charts:
        figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
        _plot(chart, figure.subplots())
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        paths.append(folder / f"{chart.name}.png")
        durable.write_bytes(paths[-1], drawn.getvalue())
    return paths


def _plot(chart: Chart, axes) -> None:  # type: ignore[no-untyped-def]  # matplotlib's Axes, which may not be there
    styles: dict[Kind, dict[str, Any]] = {Kind.line: {"linewidth": 1.6}, Kind.raw: {"linewidth": 0.8, "alpha": 0.25},
              Kind.points: {"linestyle": "none", "markersize": 6}}  # fmt: skip
    means = 0
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True)
        if series.kind is Kind.means:
            axes.plot(xs, ys, color="#5c6570", linewidth=1.3, linestyle=_LINES[means % DASHES], zorder=1,
                      label=_literal(series.label))  # fmt: skip
            means += 1
        elif series.kind is Kind.rings:
            axes.plot(xs, ys, "o", markersize=13, markerfacecolor="none", markeredgecolor="#2f5fd0")
        elif series.job is not None:
            hue, dash = series.job % HUES, series.job // HUES % DASHES
            style = {"linestyle": _LINES[dash]} | styles[series.kind]
            marker = _MARKERS[hue] if series.kind is Kind.points else ""
            named = series.kind is Kind.line or (series.kind is Kind.points and not _has_line(chart, series.job))
            axes.plot(xs, ys, color=_COLORS[hue], marker=marker, label=_literal(f"job {series.label}" if named else ""),
                      markerfacecolor="white" if dash % 2 else _COLORS[hue], **style)  # fmt: skip
    _axes(chart, axes)
    entries = [(handle, label) for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
               if not label.startswith("_")]  # fmt: skip
    if 1 < len(entries) <= _MOST_NAMED:
        axes.legend(*zip(*entries, strict=True), fontsize=8, frameon=False)


def _has_line(chart: Chart, job: int) -> bool:
    return any(series.kind is Kind.line and series.job == job for series in chart.series)


def _literal(label: str) -> str:
    """A label that is drawn as it is: no formula is read from it; an empty one is left out of the legend."""
    return label.replace("$", r"\$") or "_nothing"


def _axes(chart: Chart, axes) -> None:  # type: ignore[no-untyped-def]
    low, high, cut = y_range(chart)
    left, right = x_range(chart)
    if chart.log2:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    places = chart.x_ticks or (doublings(left, right) if chart.log2 else ticks(left, right))
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.set_title(chart.title + (" (higher values are cut off)" if cut else ""), fontsize=11, loc="left")
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.set_ylabel(chart.y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
