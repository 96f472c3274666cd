"""Bootstrap intervals of metrics: 95 % of the values on 1,000 resamples of the eval rows."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 1000, 0.95

Interval = tuple[float, float]


def of_mean(values: Sequence[float]) -> Interval:
    """Return the interval of a mean over rows."""
    array = np.asarray(values, np.float64)
    return of(lambda chosen: float(array[chosen].mean()), len(array))


def of(metric: Callable[[NDArray[np.int64]], float], num_rows: int) -> Interval:
    """Return the interval of a metric, a function of the indices of the rows that are counted."""
    rng = np.random.default_rng(0)
    found = [metric(rng.integers(0, num_rows, num_rows)) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def of_answers(name: str, answers: list[str], references: list[str]) -> Interval:
    """Return the interval of a metric of generated answers: exact_match, rouge_l, chrf or bleu."""
    from lora_ft.evaluation import metrics

    if name in ("chrf", "bleu"):  # of the corpus: sacrebleu resamples the statistics of its sentences
        from sacrebleu.metrics import BLEU, CHRF

        metric = CHRF() if name == "chrf" else BLEU(force=True)
        score = metric.corpus_score(answers, [references], n_bootstrap=RESAMPLES)
        return float(score._mean - score._ci), float(score._mean + score._ci)
    row = {"exact_match": metrics.exact_match, "rouge_l": metrics.rouge_l}[name]
    return of_mean([row([a], [r]) for a, r in zip(answers, references, strict=True)])
