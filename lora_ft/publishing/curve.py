"""The losses of a run as a picture for its card: an SVG of a few shapes, the same bytes for the same figures.

draw([(1, 3.38), (2, 2.87), ...], [(0, 3.25), (40, 2.4)])    # training: thin; held-out: thick, with dots
"""

import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 40
_MOST_POINTS = 600  # more than there are pixels
_STYLE = (
    "text{font:13px sans-serif;fill:#555}.y{text-anchor:end}.x{text-anchor:middle}path{fill:none}"
    ".axis{stroke:#999}.train{stroke:#9ab6d8}.heldout{stroke:#c0392b;stroke-width:2}circle{fill:#c0392b}"
    "@media (prefers-color-scheme:dark){text{fill:#bbb}}"
)


def draw(train: Points, heldout: Points) -> str | None:
    """The curves as SVG, None where fewer than two points are known; what is not finite is left out."""
    train, heldout = ([(x, y) for x, y in points if math.isfinite(y)] for points in (train, heldout))
    every = [*train, *heldout]
    if len(every) < 2:
        return None
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*every, strict=True))

    def at(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - point[1]) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f} {y:.1f}"

    floor = _HEIGHT - _BOTTOM
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        "<title>loss by step</title>",
        f"<style>{_STYLE}</style>",
        f'<text x="{_LEFT}" y="20">loss, nats per token: training (thin), held out (thick)</text>',
        f'<text class="y" x="{_LEFT - 8}" y="{_TOP + 5}">{high:.3f}</text>',
        f'<text class="y" x="{_LEFT - 8}" y="{floor + 5}">{low:.3f}</text>',
        f'<text class="x" x="{_LEFT}" y="{floor + 22}">step {left:g}</text>',
        f'<text class="y" x="{_WIDTH - _RIGHT}" y="{floor + 22}">{right:g}</text>',
        f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{_WIDTH - _RIGHT}"/>',
        *_line("train", [at(p) for p in _thinned(train)]),
        *_line("heldout", [at(p) for p in _thinned(heldout)]),
        *(f'<circle r="3" transform="translate({at(p)})"/>' for p in _thinned(heldout)),
        "</svg>\n",
    ])  # fmt: skip


def _line(kind: str, places: list[str]) -> list[str]:
    return [f'<path class="{kind}" d="M{"L".join(places)}"/>'] if len(places) > 1 else []


def _thinned(points: Points) -> Points:
    """Every n-th point and the last, so that a long run's picture is no larger than a short one's."""
    stride = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:stride], *points[-1:]] if stride > 1 else points
