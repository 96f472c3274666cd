"""Draw charts of losses with matplotlib: SVG for an HTML page, PNG as a file. Imports neither pyplot nor torch.

with drawing("train_loss"):
    figure, axes = blank("step", "loss, nats per token")
    axes.plot(steps, losses, gid="job-3", **look(3))
    svg(figure)                  # an <svg> without style attributes; colours are CSS variables of the page
    png(figure, "Train loss")    # with title and legend
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Six hues that colour-blind readers can distinguish (after Okabe and Ito, 2008), each with its own marker.
HUES = ("#0067a5", "#d35400", "#00866a", "#a83f8f", "#b07d00", "#3b9edb")
TEXT, GRID, ACCENT, PAPER = "#5c6570", "#e3e6ea", "#2f5fd0", "#ffffff"
DASHES: tuple[Any, ...] = ("-", (0, (4, 2.2)), (0, (1, 2.2)), (0, (5, 2.2, 1, 2.2)))
NUM_LOOKS = len(HUES) * len(DASHES)

_MARKERS = (("o", 8.5), ("s", 8), ("D", 7.5), ("^", 9), ("v", 9), ("P", 10))  # and sizes that look equal
_VARIABLES = {color: f"var(--c{number})" for number, color in enumerate(HUES)} | {
    TEXT: "var(--soft)", GRID: "var(--line)", ACCENT: "var(--accent)", PAPER: "var(--paper)"
}  # fmt: skip
_WIDTH, _HEIGHT = 440, 290  # points
_MOST_NAMED = 24  # a longer legend would be larger than the chart
_DECIMAL = re.compile(r"\d+\.\d+")


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """Set matplotlib's options in a block; `name` makes the element ids of the chart unique in a page."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        yield


def blank(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    """Create a figure with empty axes, horizontal grid lines and round numbers at the ticks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes((54 / _WIDTH, 46 / _HEIGHT, (_WIDTH - 66) / _WIDTH, (_HEIGHT - 74) / _HEIGHT))
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
    axes.tick_params(labelsize=9, labelcolor=TEXT, color=TEXT)
    axes.tick_params(axis="x", pad=5)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=x_label == "step", min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(useOffset=False)
    axes.margins(x=0.02)
    axes.set_xlabel(x_label, fontsize=9, color=TEXT, labelpad=7)
    figure.text(2 / _WIDTH, 1 - 14 / _HEIGHT, y_label, fontsize=9, color=TEXT)
    return figure, axes


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and dash of the `number`-th job as options of `axes.plot`, the same in every chart."""
    hue, dash = number % len(HUES), number // len(HUES) % len(DASHES)
    marker, size = _MARKERS[hue]
    return {
        "color": HUES[hue],
        "linestyle": DASHES[dash],
        "linewidth": 1.8,
        "marker": marker,
        "markersize": size,
        "markerfacecolor": PAPER if dash % 2 else HUES[hue],
    }


def swatch(name: str, options: dict[str, Any]) -> str:
    """Return an SVG <symbol> with id `name`: a short line in one look, with its marker in the middle."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with drawing(name):
        figure = Figure(figsize=(30 / 72, 14 / 72))
        figure.patch.set_visible(False)
        figure.add_artist(Line2D([0.03, 0.5, 0.97], [0.5] * 3, markevery=[1], **options))
        symbol = _element(figure, {})
    symbol.tag = "symbol"
    symbol.set("id", name)
    return ET.tostring(symbol, encoding="unicode")


def svg(figure: "Figure", label: str = "", titles: dict[int, str] | None = None) -> str:
    """Return the figure as an <svg> element. `titles` are the tooltips of the parts with gid job-NUMBER."""
    root = _element(figure, titles or {})
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def png(figure: "Figure", title: str) -> bytes:
    """Return the figure as PNG data, with a title and a legend of the labelled lines."""
    added: list[Any] = [figure.text(2 / _WIDTH, 1.03, title, fontsize=11)]
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(handles) <= _MOST_NAMED:
        names = [" ".join(label.split())[:60] for label in labels]
        added.append(axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.02, 1.05), fontsize=8,
                                 frameon=False))  # fmt: skip
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing", UserWarning
        )  # labels may have characters that the font lacks
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight", facecolor="white", transparent=False)
    for artist in added:
        artist.remove()
    return file.getvalue()


def _element(figure: "Figure", titles: dict[int, str]) -> ET.Element:
    """Return the figure as an SVG element without namespaces, style attributes, metadata and unused ids."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    view_box = root.get("viewBox", "")
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = element.text = (element.text or "").strip() or None
        element.tail = None
        element.attrib = dict(_attributes(element))
        if job := element.get("data-job"):
            ET.SubElement(element, "title").text = titles.get(int(job))
    root.attrib = {"viewBox": view_box}
    return root


def _attributes(element: ET.Element) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        match key.rpartition("}")[2]:
            case "style":  # the page's content security policy forbids style attributes
                styles = (part.partition(":")[::2] for part in value.split(";") if ":" in part)
                yield from ((k.strip(), _VARIABLES.get(v.strip(), v.strip())) for k, v in styles if k.strip() != "font")
            case "id" if element.tag == "g":
                if value.startswith("job-"):
                    yield from (("class", "run"), ("data-job", value.removeprefix("job-")))
            case "d" | "x" | "y" as name:
                yield name, _DECIMAL.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            case "transform" if value.startswith("rotate(-0 "):
                pass
            case name:
                yield name, value
