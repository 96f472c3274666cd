"""Compute task metrics of generated answers, with the libraries whose numbers papers report.

    exact_match  rouge_l     0 to 1
    chrf  bleu               0 to 100, as in sacrebleu

Whitespace around answers and references is removed, and nothing else is changed. Metrics of labels are those of
classification.py: they need no answers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_ft.data import thoughts
from lora_ft.data.dataset import EvalPrompt

Texts = Sequence[str]

_PROMPT_END = 16  # tokens

# The tokenizer of rouge_score, [a-z0-9]+, finds no words in most scripts, so every score would be 0. In scripts without
# spaces between words (kana and Han), each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def scores_of(names: Sequence[str], tokenizer: Any, prompts: Sequence[EvalPrompt], answers: Texts) -> dict[str, float]:
    """Compute metrics of the answers to prompts of an eval set, without the thoughts of answers and references."""
    if not names:
        return {}
    end = tokenizer.decode(prompts[0].prompt_ids[-_PROMPT_END:])  # which may open a thought
    references = [thoughts.after(prompt.answer) for prompt in prompts]
    return scores(names, [thoughts.after(answer, end) for answer in answers], references)


def scores(names: Sequence[str], answers: Texts, references: Texts) -> dict[str, float]:
    """Compute metrics of answers, each with one reference."""
    stripped = [text.strip() for text in answers], [text.strip() for text in references]
    functions: dict[str, Callable[[Texts, Texts], float]] = {
        "exact_match": exact_match,
        "chrf": chrf,
        "bleu": bleu,
        "rouge_l": rouge_l,
    }
    return {name: functions[name](*stripped) for name in names}


def exact_match(answers: Texts, references: Texts) -> float:
    """Return the fraction of answers that equal their references."""
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)


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
