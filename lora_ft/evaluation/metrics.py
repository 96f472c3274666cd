"""Compute task metrics of generated answers, with the libraries whose numbers papers report.

    exact_match  accuracy  f1  rouge_l     0 to 1
    chrf  bleu                             0 to 100, as in sacrebleu

accuracy and f1 (macro) are over the labels seen in training; any other answer is wrong. Whitespace around answers and
references is removed, and nothing else is changed.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial

from lora_ft.errors import ConfigError, DataError, ResourceError

Texts = Sequence[str]

# The package that each metric needs.
PACKAGES = {
    "exact_match": None,
    "accuracy": None,
    "f1": "sklearn",
    "chrf": "sacrebleu",
    "bleu": "sacrebleu",
    "rouge_l": "rouge_score",
}

# The tokenizer of rouge_score, [a-z0-9]+, finds no words in most scripts, so every score would be 0. In scripts without
# spaces between words (kana and Han), each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric, ResourceError if the package of a metric is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"eval.metrics: {name} is not a metric; choose from {', '.join(PACKAGES)}")
    missing = sorted({p for n in names if (p := PACKAGES[n]) and importlib.util.find_spec(p) is None})
    if missing:
        raise ResourceError(f"eval.metrics needs {', '.join(missing)}: pip install 'lora_ft[metrics]'")


def scores(names: Sequence[str], answers: Texts, references: Texts, labels: Texts | None) -> dict[str, float]:
    """Compute metrics of answers, each with one reference. `labels` are the distinct answers of the training rows.

    Raises DataError for accuracy or f1 without labels.
    """
    check(names)
    if labels is None and (needing := [name for name in names if name in ("accuracy", "f1")]):
        raise DataError(
            f"eval.metrics: {', '.join(needing)} needs labels, and the training rows have too many distinct answers "
            "for that: use exact_match, chrf, bleu or rouge_l"
        )
    stripped = [text.strip() for text in answers], [text.strip() for text in references]
    functions: dict[str, Callable[[Texts, Texts], float]] = {
        "exact_match": exact_match,
        "accuracy": partial(accuracy, labels=labels or ()),
        "f1": partial(macro_f1, labels=labels or ()),
        "chrf": chrf,
        "bleu": bleu,
        "rouge_l": rouge_l,
    }
    return {name: functions[name](*stripped) for name in names}


def exact_match(answers: Texts, references: Texts) -> float:
    """Return the fraction of answers that equal their references."""
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)


def accuracy(answers: Texts, references: Texts, labels: Texts) -> float:
    """Return the fraction of right answers. If a reference is not one of `labels`, its answer counts as wrong."""
    known = {label.strip() for label in labels}
    return sum(a == r and a in known for a, r in zip(answers, references, strict=True)) / len(references)


def macro_f1(answers: Texts, references: Texts, labels: Texts) -> float:
    """Return the mean F1 over the labels that occur as reference or answer; 0 if none does (scikit-learn)."""
    from sklearn.metrics import f1_score

    known = {label.strip() for label in labels}
    occurring = sorted(known & {*answers, *references})
    if not occurring:
        return 0.0
    # zero_division: F1 is 0 for a label that is never answered or never right.
    return float(f1_score(references, answers, labels=occurring, average="macro", zero_division=0.0))


def chrf(answers: Texts, references: Texts) -> float:
    """Return the character n-gram F-score of the corpus, chrF2 (sacrebleu)."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), [list(references)]).score)


def bleu(answers: Texts, references: Texts) -> float:
    """Return corpus BLEU with sacrebleu's default tokenizer, which does not segment Chinese or Japanese."""
    from sacrebleu import corpus_bleu

    # force=True suppresses a warning about references that end in a separate full stop, as short answers may.
    return float(corpus_bleu(list(answers), [list(references)], force=True).score)


def rouge_l(answers: Texts, references: Texts) -> float:
    """Return the mean F-score of the longest common subsequence of words (rouge_score without its stemmer)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    found: list[float] = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return sum(found) / len(found)


class _Words:
    """Tokenizer for rouge_score that finds words in any script."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
