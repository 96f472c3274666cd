"""Bootstrap intervals of metrics of generated answers, as lora_ft gives them for those of labels."""

from collections.abc import Sequence

import numpy as np

from lora_ft.evaluation import metrics
from lora_ft.evaluation.classification import LEVEL, SAMPLES

Interval = tuple[float, float]


def of_mean(values: Sequence[float]) -> Interval:
    """Return the interval of a mean over rows."""
    array, rng = np.asarray(values, np.float64), np.random.default_rng(0)
    found = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(SAMPLES)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def of_answers(name: str, answers: list[str], references: list[str]) -> Interval:
    """Return the interval of a metric of generated answers: exact_match, rouge_l, chrf or bleu."""
    if name in ("chrf", "bleu"):  # of the corpus: sacrebleu resamples the statistics of its sentences
        from sacrebleu.metrics import BLEU, CHRF

        metric = CHRF() if name == "chrf" else BLEU(force=True)
        score = metric.corpus_score(answers, [references], n_bootstrap=SAMPLES)
        return float(score._mean - score._ci), float(score._mean + score._ci)
    row = {"exact_match": metrics.exact_match, "rouge_l": metrics.rouge_l}[name]
    return of_mean([row([a], [r]) for a, r in zip(answers, references, strict=True)])
