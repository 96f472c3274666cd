"""The metrics of an eval set by name: which direction is better, what each is computed from, the package it needs.

    loss                                        of the objective, for every row
    accuracy macro_f1 micro_f1 auroc brier ...  of the probabilities of labels (evaluation/classification.py)
    exact_match chrf bleu rouge_l               of generated answers (evaluation/metrics.py)

Settings (eval.metrics, train.eval_metrics, train.best_metric), checkpoints, halving, sweeps and reports read this one
table. No torch here.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from lora_ft.errors import ConfigError, ResourceError

LOSS = "loss"


class Source(Enum):
    """Result of a model that a metric is computed from."""

    loss = "loss"
    classes = "probabilities of labels"
    answers = "generated answers"


@dataclass(frozen=True)
class Metric:
    """A metric: its source, its direction, and the package that computes it (None: no other than numpy)."""

    source: Source
    higher_is_better: bool = True
    package: str | None = None


METRICS = {
    LOSS: Metric(Source.loss, higher_is_better=False),
    "accuracy": Metric(Source.classes),
    "macro_f1": Metric(Source.classes),
    "micro_f1": Metric(Source.classes),
    "auroc": Metric(Source.classes),
    "brier": Metric(Source.classes, higher_is_better=False),
    "ece": Metric(Source.classes, higher_is_better=False),
    "log_loss": Metric(Source.classes, higher_is_better=False),
    "exact_match": Metric(Source.answers),
    "chrf": Metric(Source.answers, package="sacrebleu"),
    "bleu": Metric(Source.answers, package="sacrebleu"),
    "rouge_l": Metric(Source.answers, package="rouge_score"),
}

_RENAMED = {"f1": "macro_f1", "eval_loss": LOSS}


def check(key: str, names: Iterable[str]) -> None:
    """Check the metrics that a setting names; the loss is one only for `train.best_metric`.

    Raises ConfigError for an unknown metric, ResourceError if the package of a metric is not installed.
    """
    known = [name for name in METRICS if name != LOSS or key == "train.best_metric"]
    for name in names:
        if name not in known:
            advice = f"{name} is now {_RENAMED[name]}" if _RENAMED.get(name) in known else ""
            raise ConfigError(f"{key}: {name} is not a metric; {advice or 'choose from ' + ', '.join(known)}")
    missing = sorted({p for n in names if (p := METRICS[n].package) and importlib.util.find_spec(p) is None})
    if missing:
        raise ResourceError(f"{key} needs {', '.join(missing)}: pip install 'lora_ft[metrics]'")


def of(source: Source, names: Sequence[str]) -> list[str]:
    """Return the metrics among `names` that are computed from one source."""
    return [name for name in names if METRICS[name].source is source]


def cost(name: str, value: float) -> float:
    """Return a number that is lower for a better value, as a loss is. Metrics of an objective's own count as losses."""
    return -value if name in METRICS and METRICS[name].higher_is_better else value


def title(name: str) -> str:
    """Return the name of a metric in text: "eval loss", "eval macro_f1"."""
    return f"eval {name}"
