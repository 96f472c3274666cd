"""Draw the losses of runs over their steps as a PNG: a line for the train loss, points for the eval loss.

    python benchmarks/tasks/curves.py tasks.png runs/tasks/topic-adapter-0 runs/tasks/topic-adapter-1
    python benchmarks/tasks/curves.py overfitting.png many_epochs held_down --together

Runs whose names differ only in a number at the end share a panel; with --together, all runs do.
"""

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from lora_ft import runs
from lora_ft.evaluation.charts import GRID, HUES, TEXT
from lora_ft.io import durable
from lora_ft.sweeps.figures import smoothed

COLUMNS = 4
_SEED = re.compile(r"-\d+$")

Points = list[tuple[float, float]]


def losses(folder: Path) -> tuple[Points, Points]:
    """Return the train loss of each step and the eval losses of a run."""
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text("utf-8").splitlines()]
    train, evaluated = (
        [(line["step"], line[name]) for line in lines if name in line] for name in ("loss", "eval_loss")
    )
    return train, evaluated


def panels(folders: list[Path], together: bool) -> dict[str, list[Path]]:
    """Return the runs of each panel by its title."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        found.setdefault("" if together else _SEED.sub("", folder.name), []).append(folder)
    return found


def draw(folders: list[Path], together: bool = False) -> Any:
    """Return the figure; the scale of losses is logarithmic, and linear for runs that are compared in one panel."""
    from matplotlib.figure import Figure

    found = panels(folders, together)
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    size = (7.2, 3.8) if len(found) == 1 else (2.6 * columns, 2.2 * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, own) in zip(grid, found.items(), strict=False):
        _panel(axes, own, is_log=not together)
        axes.set_title(title, fontsize=9)
        if together:
            axes.legend(fontsize=8, frameon=False)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9, color=TEXT)
    figure.supylabel("loss: line in training, points on eval rows", fontsize=9, color=TEXT)
    return figure


def _panel(axes: Any, folders: list[Path], is_log: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    seen: list[float] = []
    for number, folder in enumerate(folders):
        train, evaluated = losses(folder)
        color = HUES[number % len(HUES)]
        axes.plot(*zip(*smoothed(train), strict=True), color=color, linewidth=1, alpha=0.6)
        axes.plot(*zip(*evaluated, strict=True), "o--", color=color, markersize=4, linewidth=1, label=folder.name)
        seen += [loss for _, loss in [*train, *evaluated]]
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)) if max(seen) > 8 * min(seen) else MaxNLocator(4))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=TEXT)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--together", action="store_true", help="all runs in one panel")
    given = parser.parse_args(arguments)
    durable.write_bytes(given.out.absolute(), png(draw(given.runs, given.together)))
    return 0


def png(figure: Any) -> bytes:
    """Return the picture with 64 colors, which makes it half as large."""
    from PIL import Image

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    Image.open(drawn).convert("RGB").quantize(64).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
