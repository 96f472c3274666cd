"""Metrics of predictions with probabilities: equal to scikit-learn's, and known values where it has none."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

from lora_ft.evaluation import classification
from lora_ft.evaluation.classification import Predictions

CLASSES = [2, 3, 7]


def predictions(classes: int, rows: int = 200, seed: int = 0, sharpness: float = 2.0) -> Predictions:
    """Random predictions that are right more often than by chance."""
    generator = np.random.default_rng(seed)
    references = generator.integers(0, classes, rows)
    logits = generator.normal(size=(rows, classes)) * sharpness
    logits[np.arange(rows), references] += 1
    return Predictions([f"c{i}" for i in range(classes)], softmax(logits), references)


def several(classes: int = 4, rows: int = 150, seed: int = 1) -> Predictions:
    """Random multi-label predictions; some rows have no class."""
    generator = np.random.default_rng(seed)
    references = generator.random((rows, classes)) < 0.3
    logits = generator.normal(size=(rows, classes)) * 2 + np.where(references, 1.0, -1.0)
    return Predictions([f"c{i}" for i in range(classes)], 1 / (1 + np.exp(-logits)), references)


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", CLASSES)
def test_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    found = predictions(classes)
    right, p = found.references, found.probabilities
    answered = p.argmax(1)
    expected = {
        "accuracy": sklearn.accuracy_score(right, answered),
        "macro_f1": sklearn.f1_score(right, answered, average="macro"),
        "micro_f1": sklearn.f1_score(right, answered, average="micro"),
        "brier": sklearn.brier_score_loss(right, p if classes > 2 else p[:, 1]),
        "log_loss": sklearn.log_loss(right, p),
    } | ({"auroc": sklearn.roc_auc_score(right, p[:, 1])} if classes == 2 else {})
    values = classification.metrics(found)
    assert values.pop("ece") >= 0
    assert values == pytest.approx(expected, abs=1e-12)


def test_metrics_of_several_labels_a_row_equal_those_of_scikit_learn() -> None:
    found = several()
    right, p = found.references, found.probabilities
    answered = p >= 0.5
    pairs = right.ravel(), p.ravel()
    expected = {
        "accuracy": sklearn.accuracy_score(right, answered),
        "macro_f1": sklearn.f1_score(right, answered, average="macro"),
        "micro_f1": sklearn.f1_score(right, answered, average="micro"),
        "brier": sklearn.brier_score_loss(*pairs),
        "log_loss": sklearn.log_loss(*pairs),
    }
    values = classification.metrics(found)
    assert values.pop("ece") >= 0
    assert values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("found", [*map(predictions, CLASSES), several()], ids=str)
def test_table_of_classes_equals_that_of_scikit_learn(found: Predictions) -> None:
    expected = sklearn.precision_recall_fscore_support(
        found.right if found.is_multi_label else found.references,
        found.predicted if found.is_multi_label else found.probabilities.argmax(1),
        zero_division=0.0,
    )
    table = classification.class_metrics(found)
    assert [c.label for c in table] == list(found.labels)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [getattr(c, name) for c in table] == pytest.approx(list(column), abs=1e-12)


def test_confusion_matrix_has_right_classes_in_rows() -> None:
    found = predictions(3)
    assert np.array_equal(
        classification.confusion(found), sklearn.confusion_matrix(found.references, found.probabilities.argmax(1))
    )


def test_auroc_counts_ties_half_and_needs_both_classes() -> None:
    scores, positive = np.array([0.2, 0.5, 0.5, 0.5, 0.9]), np.array([False, False, True, True, True])
    assert classification.auroc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores), abs=1e-15)
    assert classification.auroc(scores, np.zeros(5, bool)) is None
    one_class = Predictions(["a", "b"], np.array([[0.3, 0.7], [0.6, 0.4]]), np.array([1, 1]))
    found = classification.classify(one_class, seed=0, samples=10)
    assert "auroc" not in found.metrics and "auroc" not in found.intervals


def test_classes_that_never_occur_do_not_lower_macro_f1() -> None:
    found = predictions(3)
    wider = Predictions(
        [*found.labels, "rare"], np.concatenate([found.probabilities, np.zeros((200, 1))], 1), found.references
    )
    assert classification.metrics(wider)["macro_f1"] == classification.metrics(found)["macro_f1"]
    assert classification.class_metrics(wider)[-1] == classification.ClassMetrics("rare", 0.0, 0.0, 0.0, 0)


def test_calibration_error_is_the_weighted_gap_of_bins() -> None:
    found = predictions(2, rows=400)
    confidence = found.probabilities.max(1)
    is_right = (found.predicted & found.right).any(1)
    shares, means = calibration_curve(is_right, confidence, n_bins=15)
    counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = (np.abs(shares - means) * counts[counts > 0]).sum() / 400
    assert classification.metrics(found)["ece"] == pytest.approx(expected, abs=1e-12)
    # Sure and always right: no error. Sure and right half the time: one half.
    assert classification.calibration_error(np.ones(4), np.ones(4, bool)) == 0
    assert classification.calibration_error(np.ones(4), np.array([True, False] * 2)) == 0.5


@pytest.mark.parametrize("found", [predictions(2, 2000), predictions(5, 2000), several(rows=2000)], ids=str)
def test_fitted_temperature_has_the_lowest_log_loss(found: Predictions) -> None:
    def loss(temperature: float) -> float:
        changed = classification.with_temperature(found.probabilities, temperature, multi_label=found.is_multi_label)
        return classification.metrics(replace(found, probabilities=changed))["log_loss"]

    best = classification.fit_temperature(found)
    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01), loss(1.0))


def test_temperature_of_sharpened_probabilities_is_their_factor() -> None:
    found = predictions(4, 1000)
    calibrated = classification.with_temperature(found.probabilities, classification.fit_temperature(found))
    again = replace(found, probabilities=classification.with_temperature(calibrated, 1 / 3))
    assert classification.fit_temperature(again) == pytest.approx(3.0, abs=1e-6)
    assert np.array_equal(calibrated.argmax(1), found.probabilities.argmax(1))
    assert classification.with_temperature(found.probabilities, 1.0) == pytest.approx(found.probabilities, abs=1e-15)


def test_temperature_stays_in_its_bounds_where_every_row_is_right_or_wrong() -> None:
    found = Predictions(["a", "b"], np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))
    low, high = classification.TEMPERATURES
    assert classification.fit_temperature(found) == pytest.approx(low)
    assert classification.fit_temperature(replace(found, references=np.array([1, 0]))) == pytest.approx(high)


def test_intervals_are_a_function_of_the_seed_and_contain_the_value() -> None:
    found = predictions(2)
    values = classification.metrics(found)
    first = classification.intervals(found, seed=3, samples=200)
    assert first == classification.intervals(found, seed=3, samples=200)
    assert first != classification.intervals(found, seed=4, samples=200)
    assert first.keys() == values.keys()
    for name in values.keys() - {"ece"}:  # which resampling raises
        assert first[name][0] < values[name] < first[name][1], name
    # The standard error of a share is known.
    half = (first["accuracy"][1] - first["accuracy"][0]) / 2
    assert half == pytest.approx(1.96 * np.sqrt(values["accuracy"] * (1 - values["accuracy"]) / 200), rel=0.2)


@pytest.mark.parametrize("found", [predictions(2), predictions(3), several()], ids=str)
def test_everything_is_json(found: Predictions) -> None:
    result = classification.classify(found, seed=0, samples=20)
    stored = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert stored["rows"] == len(found.references) and stored["metrics"] == result.metrics
    assert (stored["confusion"] is None) == found.is_multi_label


@pytest.mark.parametrize(
    ("probabilities", "references"),
    [
        (np.ones((2, 3)), np.array([0, 1])),
        (np.ones((2, 2)), np.array([0])),
        (np.full((2, 2), np.nan), np.array([0, 1])),
        (np.full((2, 2), -0.1), np.array([0, 1])),
        (np.zeros((0, 2)), np.zeros(0, np.int64)),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(probabilities: Any, references: Any) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        Predictions(["a", "b"], probabilities, references)
