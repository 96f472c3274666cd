"""Draw the memory of a step as text: stacked bars over the step, one sign for each term.

7.9 |            ..####
    |   kkkkkkkkk
    |BBBBBBBBBBBBBBBBBBBBB
  0 +---------------------
     forward    loss  backward
"""

from collections.abc import Mapping, Sequence

from rich.text import Text

from lora_ft.memory.prediction import BASE, TRACED, Prediction

GIB = 2**30
PROCESS = "process"  # the terms beside tensors, which do not change during a step

# By term: sign, colour in a terminal, colour in a picture. From bottom to top.
LOOKS = {
    PROCESS: (":", "bright_black", "#9aa4b1"),
    BASE: ("B", "blue", "#0067a5"),
    "adapter": ("A", "cyan", "#3b9edb"),
    "gradients": ("G", "bright_cyan", "#7fc4ea"),
    "optimizer": ("O", "bright_blue", "#23527c"),
    "activations kept": ("k", "green", "#00866a"),
    "recomputed": ("r", "bright_green", "#6cc5a9"),
    "attention": ("a", "bright_magenta", "#d38fc6"),
    "loss": ("L", "red", "#d35400"),
    "dequantization": ("d", "magenta", "#a83f8f"),
    "other": (".", "yellow", "#b07d00"),
}
_FALLBACK = ("?", "white", "#5c6570")
_LEVELS = 14  # rows


def look(term: str) -> tuple[str, str, str]:
    """Return sign, terminal colour and picture colour of a term."""
    return LOOKS.get(term, _FALLBACK)


def stacked(found: Prediction) -> dict[str, list[int]]:
    """Return the bytes of each term at each sample point, from bottom to top; terms without bytes are left out."""
    timeline = found.trace.timeline
    process = sum(term.bytes for term in found.terms if term.source != TRACED)
    series = {PROCESS: [process] * len(timeline.phases), **timeline.terms}
    order = [*LOOKS, *(name for name in series if name not in LOOKS)]
    return {name: list(series[name]) for name in order if any(series.get(name, ()))}


def bars(found: Prediction, width: int = 100, levels: int = _LEVELS) -> list[Text]:
    """Return the lines of the picture, at most `width` columns wide, with axes and legend.

    If the weights are most of the memory, the axis starts below their top, and its first number tells where.
    """
    series, phases = stacked(found), found.trace.timeline.phases
    columns = _columns(series, phases, width - 17)
    budget = found.machine.budget_bytes
    top = max(found.peak_bytes, *(sum(values.values()) for _, values in columns))
    drawn_budget = budget if budget is not None and budget <= 1.15 * top else None
    top = max(top, drawn_budget or 0)
    steady = sum(series[name][0] for name in (PROCESS, BASE) if name in series)
    start = int(0.9 * steady) if steady > 0.4 * top else 0
    edges = [start + (top - start) * level // levels for level in range(levels + 1)]
    lines = [_row(columns, edges, level, drawn_budget) for level in reversed(range(levels))]
    lines.append(Text(f"{start / GIB:6.3g} +" + ("~" if start else "-") * len(columns), "dim"))
    lines.append(Text(" " * 8 + _phase_axis([phase for phase, _ in columns]), "dim"))
    return [*lines, *_legend(series, width)]


def _columns(
    series: Mapping[str, Sequence[int]], phases: Sequence[str], width: int
) -> list[tuple[str, dict[str, int]]]:
    """Return phase and terms of each column: of its sample points the one with the most bytes."""
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    count = min(width, len(totals))
    columns = []
    for column in range(count):
        start, end = column * len(totals) // count, (column + 1) * len(totals) // count
        most = max(range(start, end), key=totals.__getitem__)
        columns.append((phases[most], {name: values[most] for name, values in series.items()}))
    return columns


def _row(columns: Sequence[tuple[str, dict[str, int]]], edges: Sequence[int], level: int, budget: int | None) -> Text:
    """Draw the signs of the terms between two edges, each chosen in the middle between them."""
    low, high = edges[level : level + 2]
    crosses = budget is not None and low < budget <= high
    is_labelled = level == len(edges) - 2 or level % 4 == 3
    line = Text(f"{high / GIB:6.3g} |" if is_labelled else " " * 6 + " |", "dim")
    for _, values in columns:
        term = _term_at(values, (low + high) / 2)
        sign, color, _ = look(term) if term else ("-", "bold red", "") if crosses else (" ", "", "")
        line.append(sign, color)
    if crosses:
        line.append(" budget", "bold red")
    return line


def _term_at(values: Mapping[str, int], height: float) -> str | None:
    """Return the term whose part of the bar is at a height; None above the bar."""
    reached = 0
    for name, count in values.items():
        reached += count
        if height < reached:
            return name
    return None


def _phase_axis(phases: Sequence[str]) -> str:
    """Write the name of each phase below its columns, or right of them if they are too few for it."""
    axis = ""
    for column, phase in enumerate(phases):
        if column == 0 or phases[column - 1] != phase:
            axis = axis.ljust(column) + f"|{phase} "
    return axis.rstrip()


def _legend(series: Mapping[str, Sequence[int]], width: int) -> list[Text]:
    lines, line = [], Text(" " * 8)
    for name in series:
        sign, color, _ = look(name)
        if line.cell_len + len(name) + 5 > width:
            lines.append(line)
            line = Text(" " * 8)
        line.append(sign, f"bold {color}").append(f" {name}   ")
    return [*lines, line]
