"""Task metrics over generated answers, by the libraries whose figures papers report.

    exact_match  accuracy  f1  rouge_l     0 to 1
    chrf  bleu                             0 to 100, as sacrebleu gives them

accuracy and f1 (macro) are over the labels seen in training: an answer outside them is wrong. Answers and
references are compared without the blanks around them, and are otherwise left as they are.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence

from lora_ft.errors import ConfigError, DataError, ResourceError

Texts = Sequence[str]

# Of each metric, the package behind it. (exact_match and accuracy need none.)
PACKAGES = {
    "exact_match": None,
    "accuracy": None,
    "f1": "sklearn",
    "chrf": "sacrebleu",
    "bleu": "sacrebleu",
    "rouge_l": "rouge_score",
}

# rouge_score's own rule, [a-z0-9]+, finds no word at all in most of the world's scripts, and so scores 0. Scripts
# without blanks between words (kana and Han) count character by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def check(names: Sequence[str]) -> None:
    """Fail before a model is loaded: ConfigError for an unknown metric, ResourceError for a missing package."""
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"eval.metrics: {name} is not a metric; choose from {', '.join(PACKAGES)}")
    missing = sorted({p for n in names if (p := PACKAGES[n]) and importlib.util.find_spec(p) is None})
    if missing:
        raise ResourceError(f"eval.metrics needs {', '.join(missing)}: pip install 'lora_ft[metrics]'")


def scores(names: Sequence[str], answers: Texts, references: Texts, labels: Texts | None) -> dict[str, float]:
    """Compute metrics of answers against references, one each; `labels` are the training rows' distinct answers.

    Raises DataError for accuracy or f1 without labels.
    """
    check(names)
    if labels is None and (needing := [name for name in names if name in ("accuracy", "f1")]):
        raise DataError(
            f"eval.metrics: {', '.join(needing)} needs labels, but the training rows have too many distinct answers "
            "to be labels: use exact_match, chrf, bleu or rouge_l"
        )
    stripped = [text.strip() for text in answers], [text.strip() for text in references]
    of_name: dict[str, Callable[[], float]] = {
        "exact_match": lambda: exact_match(*stripped),
        "accuracy": lambda: accuracy(*stripped, labels or ()),
        "f1": lambda: macro_f1(*stripped, labels or ()),
        "chrf": lambda: chrf(*stripped),
        "bleu": lambda: bleu(*stripped),
        "rouge_l": lambda: rouge_l(*stripped),
    }
    return {name: of_name[name]() for name in names}


def exact_match(answers: Texts, references: Texts) -> float:
    """Share of answers equal to their references, character by character."""
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)


def accuracy(answers: Texts, references: Texts, labels: Texts) -> float:
    """Share of right answers among `labels`; a reference outside them always counts as wrong."""
    known = {label.strip() for label in labels}
    return sum(a == r and a in known for a, r in zip(answers, references, strict=True)) / len(references)


def macro_f1(answers: Texts, references: Texts, labels: Texts) -> float:
    """Mean F1 over the labels that occur, as reference or as answer; 0 if no label occurs (scikit-learn)."""
    from sklearn.metrics import f1_score

    known = {label.strip() for label in labels}
    occurring = sorted(known & {*answers, *references})
    if not occurring:
        return 0.0
    # zero_division: a label that is never answered, or never right, has F1 0.
    return float(f1_score(references, answers, labels=occurring, average="macro", zero_division=0.0))


def chrf(answers: Texts, references: Texts) -> float:
    """Character n-gram F-score over the corpus, chrF2 (sacrebleu)."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), [list(references)]).score)


def bleu(answers: Texts, references: Texts) -> float:
    """Corpus BLEU with sacrebleu's default tokenization, which knows no words in Chinese or Japanese."""
    from sacrebleu import corpus_bleu

    # force: no warning about references that end in a separated full stop, as short answers may.
    return float(corpus_bleu(list(answers), [list(references)], force=True).score)


def rouge_l(answers: Texts, references: Texts) -> float:
    """Mean F of the longest common subsequence of words, in any script (rouge_score, without its stemmer)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    found: list[float] = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return sum(found) / len(found)


class _Words:
    """The tokenizer that rouge_score calls."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
