"""Charts as SVG in a page: shapes and classes only; colours, dashes and sizes are the style's. No torch here.

<g class="run c2 d0" data-job="2"><title>job 2 ...</title><path class="line" d="M52 20L..."/></g>
"""

import html
import math
from collections.abc import Callable, Iterator

from lora_ft.sweeps.charts import Chart, Kind, Series, doublings, ticks, x_range, y_range

HUES, DASHES = 6, 4  # a job's look: twelve that differ in hue, marker and dash at once, twice as many in all

_WIDTH, _HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 20, 30, 46
# One shape a hue, about 9 wide, so that hue is never all that tells two jobs apart.
_MARKERS = (
    "M-4.4 0A4.4 4.4 0 1 0 4.4 0A4.4 4.4 0 1 0-4.4 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0-5L5 4H-5Z",
    "M0 5L5-4H-5Z",
    "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
)

Place = Callable[[float], float]


def look(job: int) -> str:
    """The classes of a job's colour and dash."""
    return f"run c{job % HUES} d{job // HUES % DASHES}"


def swatch(job: int) -> str:
    """A job's line and marker, for legend and table."""
    return (
        f'<svg class="swatch {look(job)}" viewBox="0 0 30 14" aria-hidden="true"><path class="line" d="M1 7H29"/>'
        f'<path class="dot" transform="translate(15 7)" d="{_MARKERS[job % HUES]}"/></svg>'
    )


def mean_swatch(number: int) -> str:
    line = f'<path class="mean m{number}" d="M1 7H29"/>'
    return f'<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{line}</svg>'


def draw(chart: Chart, titles: list[str]) -> str:
    """A chart as an SVG element; `titles` says what hovering over a job shows."""
    low, high, _ = y_range(chart)
    left, right = x_range(chart)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    across = _scale(left, right, _LEFT, _LEFT + width, log=chart.log2)
    down = _scale(high, low, _TOP, _TOP + height)
    area = f'<rect x="{_LEFT - 6}" y="{_TOP - 6}" width="{width + 12}" height="{height + 12}"/>'
    return "".join([
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">',
        f'<clipPath id="area-{chart.name}">{area}</clipPath>',
        *_axes(chart, across, down, (left, right), (low, high)),
        f'<g clip-path="url(#area-{chart.name})">',
        *_drawn(chart, across, down, titles),
        "</g></svg>",
    ])  # fmt: skip


def _scale(first: float, last: float, begin: float, end: float, *, log: bool = False) -> Place:
    if log:
        at = _scale(math.log2(first), math.log2(last), begin, end)
        return lambda value: at(math.log2(value))
    return lambda value: begin + (value - first) / (last - first) * (end - begin)


def _axes(chart: Chart, across: Place, down: Place, x: tuple[float, float], y: tuple[float, float]) -> Iterator[str]:
    floor = _HEIGHT - _BOTTOM
    for value, text in _labels(ticks(*y)):
        at = f"{down(value):.1f}"
        yield f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>'
        yield f'<text class="y" x="{_LEFT - 8}" y="{at}" dy=".35em">{text}</text>'
    for value, text in _labels(chart.x_ticks or (doublings(*x) if chart.log2 else ticks(*x))):
        at = f"{across(value):.1f}"
        yield f'<path class="tick" d="M{at} {floor}v5"/><text class="x" x="{at}" y="{floor + 19}">{text}</text>'
    yield f'<path class="axis" d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}"/>'
    yield f'<text class="label" x="2" y="14">{html.escape(chart.y_label)}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text class="x label" x="{middle}" y="{_HEIGHT - 6}">{html.escape(chart.x_label)}</text>'


def _labels(values: tuple[float, ...] | list[float]) -> Iterator[tuple[float, str]]:
    """Numbers with as many digits as tell them apart."""
    digits = next((d for d in range(8) if all(abs(v - round(v, d)) < 1e-9 * max(1.0, abs(v)) for v in values)), 8)
    for value in values:
        yield value, f"{value:,.{digits}f}"


def _drawn(chart: Chart, across: Place, down: Place, titles: list[str]) -> Iterator[str]:
    # A diverged run leaves the picture; far outside, coordinates would only be long.
    def points(series: Series) -> list[str]:
        return [f"{across(x):.1f} {max(-_HEIGHT, min(2 * _HEIGHT, down(y))):.1f}" for x, y in series.points]

    for number, series in enumerate(s for s in chart.series if s.kind is Kind.means):
        yield f'<path class="mean m{number % DASHES}" d="M{"L".join(points(series))}"/>'
    for job in chart.jobs:
        own = [series for series in chart.series if series.job == job]
        yield f'<g class="{look(job)}" data-job="{job}"><title>{html.escape(titles[job])}</title>'
        for series in own:
            if series.kind is Kind.points:
                marker = _MARKERS[job % HUES]
                yield from (f'<path class="dot" transform="translate({at})" d="{marker}"/>' for at in points(series))
            else:
                name = f"{chart.name}-{job}-{series.kind.value}"
                yield f'<path id="{name}" class="{series.kind.value}" d="M{"L".join(points(series))}"/>'
                # a wide line over the thin one, not to be seen, which is easier to point at
                yield f'<use class="reach" href="#{name}"/>' if series.kind is Kind.line else ""
        yield "</g>"
    for series in chart.series:
        if series.kind is Kind.rings:
            yield from (f'<circle class="ring" r="9" transform="translate({at})"/>' for at in points(series))
