"""Measure predictions with probabilities: pure functions of probabilities and right classes, however those were made.

found = Predictions(["neg", "pos"], probabilities, references)     # [rows, classes], [rows]
metrics(found)                        {"accuracy": 0.91, "macro_f1": 0.9, "micro_f1": 0.91, "auroc": 0.97, ...}
classify(found, seed=0)               Classification: these, their intervals, a table of classes, a confusion matrix
fit_temperature(found)                1.7: the probabilities were too sure; with_temperature(probabilities, 1.7)

The numbers are scikit-learn's, where it has them:

    accuracy   fraction of rows whose predicted class is right; multi-label: all of whose classes are
    macro_f1   mean F1 of the classes that occur as reference or prediction
    micro_f1   F1 of all decisions together; with one class a row it equals accuracy
    auroc      two classes: probability that a row of the second class gets more of it than one of the first
    brier      mean squared error of the probabilities, summed over the classes; of two classes that of one
    ece        expected calibration error: mean difference of confidence and accuracy over 15 bins of confidence
    log_loss   mean of -log p(right class), in nats; the temperature minimizes it

One class a row: `references` are indices, and probabilities of a row sum to 1. Several (multi-label): `references` are
truth values [rows, classes], each probability is one decision, and a class is predicted from 0.5 on. brier, ece and
log_loss are then means over the decisions, each of two classes: no and yes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METRICS = ("accuracy", "macro_f1", "micro_f1", "auroc", "brier", "ece", "log_loss")
LEVEL = 0.95  # of the bootstrap intervals
SAMPLES = 1000  # of the bootstrap
TEMPERATURES = (0.05, 20.0)  # bounds of a fit; predictions that are all right would fit to 0

_BINS = 15  # of the calibration error, as Guo et al. (2017) have it
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Predictions:
    """Probabilities of the classes `labels` for rows, and the right class (or classes) of each row.

    probabilities: float64 [rows, classes]. references: int [rows], or bool [rows, classes] for multi-label rows.
    Raises ValueError for shapes that do not fit together, and for numbers outside of 0 to 1.
    """

    labels: Sequence[str]
    probabilities: Floats
    references: NDArray[np.int64] | NDArray[np.bool_]

    def __post_init__(self) -> None:
        rows, classes = self.probabilities.shape
        if not rows or classes != len(self.labels):
            raise ValueError(f"probabilities of shape {rows, classes} for {len(self.labels)} labels")
        if self.references.shape not in ((rows,), (rows, classes)):
            raise ValueError(f"references of shape {self.references.shape} for probabilities of {rows, classes}")
        if not ((self.probabilities >= 0) & (self.probabilities <= 1 + 1e-9)).all():
            raise ValueError("probabilities must be from 0 to 1")

    @property
    def is_multi_label(self) -> bool:
        return self.references.ndim == 2

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Truth values [rows, classes]: the `decisions`."""
        return decisions(self.probabilities, multi_label=self.is_multi_label)

    def with_temperature(self, temperature: float) -> "Predictions":
        """Return the same rows with calibrated probabilities."""
        changed = with_temperature(self.probabilities, temperature, multi_label=self.is_multi_label)
        return replace(self, probabilities=changed)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Truth values [rows, classes] of the references."""
        if self.is_multi_label:
            return self.references.astype(np.bool_)
        return _one_hot(self.references.astype(np.int64), len(self.labels))


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall and F1 of one class (0 where undefined), and the rows of which it is right (support)."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Classification:
    """Metrics of predictions, as eval.json and result.json store them.

    intervals: bounds of each metric by the bootstrap over rows, of the level LEVEL. classes: in the order of the
    labels. confusion: rows of each right class (outer) by predicted class (inner); None for multi-label rows.
    temperature: that was applied; None without calibration.
    """

    rows: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    classes: list[ClassMetrics]
    confusion: list[list[int]] | None
    temperature: float | None = None


def classify(found: Predictions, seed: int, temperature: float | None = None, samples: int = SAMPLES) -> Classification:
    """Compute everything about predictions; `temperature` is recorded, and was applied by the caller."""
    return Classification(
        rows=len(found.references),
        metrics=metrics(found),
        intervals=intervals(found, seed, samples),
        classes=class_metrics(found),
        confusion=None if found.is_multi_label else confusion(found).tolist(),
        temperature=temperature,
    )


def metrics(found: Predictions) -> dict[str, float]:
    """Compute METRICS; auroc is left out unless there are two classes of single-label rows and both are right once."""
    return _means(_Rows.of(found))


def intervals(found: Predictions, seed: int, samples: int = SAMPLES) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of each metric over `samples` resamples of the rows, a function of the seed."""
    rows, generator = _Rows.of(found), np.random.default_rng(seed)
    values: dict[str, list[float]] = {name: [] for name in _means(rows)}
    for _ in range(samples):
        resampled = _means(rows.take(generator.integers(0, len(rows.hit), len(rows.hit))))
        for name in values.keys() & resampled.keys():  # a resample of one class has no auroc
            values[name].append(resampled[name])
    bounds = (50 - 50 * LEVEL, 50 + 50 * LEVEL)
    return {name: _pair(np.percentile(each, bounds)) for name, each in values.items()}


def _pair(bounds: Floats) -> tuple[float, float]:
    return float(bounds[0]), float(bounds[1])


def class_metrics(found: Predictions) -> list[ClassMetrics]:
    """Compute precision, recall, F1 and support of each class."""
    predicted, right = found.predicted, found.right
    hits, answered, support = (predicted & right).sum(0), predicted.sum(0), right.sum(0)
    columns = _ratio(hits, answered), _ratio(hits, support), _ratio(2 * hits, answered + support)
    return [
        ClassMetrics(label, float(precision), float(recall), float(f1), int(count))
        for label, precision, recall, f1, count in zip(found.labels, *columns, support, strict=True)
    ]


def confusion(found: Predictions) -> NDArray[np.int64]:
    """Count rows by right class (first index) and predicted class (second); single-label rows only."""
    return found.right.astype(np.int64).T @ found.predicted.astype(np.int64)


@dataclass(frozen=True)
class _Rows:
    """Values of each row that metrics are means of, so that a resample costs an index.

    predicted, right: [rows, classes]. hit: whether the row is right. confidence, agreed: of each decision [rows, n], as
    the calibration error compares them. brier, loss: [rows]. second: probability of the second of two classes.
    """

    predicted: NDArray[np.bool_]
    right: NDArray[np.bool_]
    hit: NDArray[np.bool_]
    confidence: Floats
    agreed: NDArray[np.bool_]
    brier: Floats
    loss: Floats
    second: Floats | None

    @classmethod
    def of(cls, found: Predictions) -> "_Rows":
        p, predicted, right = found.probabilities, found.predicted, found.right
        hit = (predicted == right).all(1)
        if found.is_multi_label:
            of_right = np.where(right, p, 1 - p)
            loss = -np.log(np.maximum(of_right, _TINY)).mean(1)
            confidence, agreed = np.maximum(p, 1 - p), predicted == right
            return cls(predicted, right, hit, confidence, agreed, ((1 - of_right) ** 2).mean(1), loss, None)
        loss = -np.log(np.maximum(p[right], _TINY))
        brier = ((p - right) ** 2).sum(1) / (2 if p.shape[1] == 2 else 1)
        second = p[:, 1] if p.shape[1] == 2 else None
        return cls(predicted, right, hit, p.max(1)[:, None], hit[:, None], brier, loss, second)

    def take(self, rows: NDArray[np.int64]) -> "_Rows":
        values: dict[str, Any] = {name: each if each is None else each[rows] for name, each in vars(self).items()}
        return _Rows(**values)


def _means(rows: _Rows) -> dict[str, float]:
    hits, answered, support = (rows.predicted & rows.right).sum(0), rows.predicted.sum(0), rows.right.sum(0)
    f1 = _ratio(2 * hits, answered + support)[answered + support > 0]
    found = {
        "accuracy": rows.hit.mean(),
        "macro_f1": f1.mean() if f1.size else 0.0,
        "micro_f1": _ratio(2 * hits.sum(), (answered + support).sum()),
        "auroc": None if rows.second is None else auroc(rows.second, rows.right[:, 1]),
        "brier": rows.brier.mean(),
        "ece": calibration_error(rows.confidence.ravel(), rows.agreed.ravel()),
        "log_loss": rows.loss.mean(),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def decisions(probabilities: Floats, *, multi_label: bool) -> NDArray[np.bool_]:
    """Return truth values [rows, classes]: the most probable class (the first of equals), or classes from 0.5 on."""
    if multi_label:
        return np.asarray(probabilities >= 0.5)
    return _one_hot(probabilities.argmax(1), probabilities.shape[1])


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """Return the probability that a positive row has the higher score (ties count half); None without both kinds."""
    if positive.all() or not positive.any():
        return None
    others = np.sort(scores[~positive])
    below, up_to = (np.searchsorted(others, scores[positive], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(others))


def calibration_error(confidence: Floats, is_right: NDArray[np.bool_]) -> float:
    """Return the expected calibration error over bins of equal width, each weighted by its decisions."""
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    differences = np.bincount(bins, confidence - is_right, _BINS)  # sum over a bin
    return float(np.abs(differences).sum() / len(confidence))


def with_temperature(probabilities: Floats, temperature: float, *, multi_label: bool = False) -> Floats:
    """Return the probabilities of logits divided by a temperature: softmax(log p / T), or of each decision."""
    if multi_label:
        pairs = np.stack([1 - probabilities, probabilities], -1)
        return softmax(_logs(pairs) / temperature)[..., 1]
    return softmax(_logs(probabilities) / temperature)


def fit_temperature(found: Predictions) -> float:
    """Return the temperature that minimizes the log loss, within TEMPERATURES.

    The loss is convex in 1 / T: its derivative, the mean of E[z] - z(right class) over decisions with logits z, rises.
    """
    if found.is_multi_label:
        logits = _logs(np.stack([1 - found.probabilities, found.probabilities], -1).reshape(-1, 2))
        right = _one_hot(found.right.ravel().astype(np.int64), 2)
    else:
        logits, right = _logs(found.probabilities), found.right
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((softmax(logits * middle) * logits).sum(1) - logits[right]).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(2 / (low + high))


def _logs(probabilities: Floats) -> Floats:
    return np.log(np.maximum(probabilities, _TINY))


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    """Divide counts; 0 where there is nothing to divide by."""
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)


def _one_hot(indices: NDArray[np.int64], classes: int) -> NDArray[np.bool_]:
    return np.asarray(indices[:, None] == np.arange(classes))
