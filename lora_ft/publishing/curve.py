"""Draw the losses of a run as a PNG chart for its model card; the same points give the same bytes.

draw([(1, 3.38), (2, 2.87), ...], [(0, 3.25), (40, 2.4)])    # training loss, eval loss by step
"""

import math
from collections.abc import Sequence

from lora_ft.evaluation import charts

Points = Sequence[tuple[float, float]]


def draw(train: Points, evaluations: Points) -> bytes | None:
    """Draw both curves as a PNG file; return None if fewer than two points are finite."""
    train, evaluations = ([(x, y) for x, y in points if math.isfinite(y)] for points in (train, evaluations))
    if len(train) + len(evaluations) < 2:
        return None
    with charts.drawing("loss"):
        figure, axes = charts.blank("step", "loss, nats per token")
        if train:
            form = "-" if len(train) > 1 else "."
            axes.plot(*zip(*train, strict=True), form, color=charts.HUES[0], label="training", linewidth=1, alpha=0.6)
        if evaluations:
            axes.plot(*zip(*evaluations, strict=True), "o-", color=charts.HUES[1], label="eval", markersize=4)
        return charts.png(figure, "Loss by step")
