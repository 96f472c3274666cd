"""Task metrics against hand-computed values; unseen labels, other scripts, missing packages."""

import importlib.util
from typing import Any

import pytest

from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation import metrics

ALL = list(metrics.PACKAGES)


def test_right_answers_have_the_best_score_whatever_whitespace_surrounds_them() -> None:
    references = ["Paris is the capital of France.", "An insect has six legs in all."]
    found = metrics.scores(ALL, [f" {r}\n" for r in references], references, references)
    assert found == pytest.approx(
        {"exact_match": 1, "accuracy": 1, "f1": 1, "chrf": 100, "bleu": 100, "rouge_l": 1}, abs=1e-9
    )


def test_answers_with_nothing_in_common_score_zero() -> None:
    found = metrics.scores(ALL, ["zzz", "qqq"], ["alpha beta", "gamma delta"], ["alpha beta", "gamma delta"])
    assert found == pytest.approx(dict.fromkeys(ALL, 0.0))


def test_exact_match_and_accuracy_count_right_answers() -> None:
    answers, references = ["yes", "no", "Yes", "maybe"], ["yes", "yes", "yes", "maybe"]
    assert metrics.exact_match(answers, references) == 2 / 4
    # "maybe" is not a label of the training rows, so it counts as wrong.
    assert metrics.accuracy(answers, references, ["yes", "no"]) == 1 / 4


def test_macro_f1_is_the_mean_over_occurring_labels() -> None:
    references = ["a", "a", "a", "b"]
    answers = ["a", "a", "b", "nonsense"]
    # a: precision 1, recall 2/3 -> 0.8; b: never right -> 0; c occurs nowhere and does not count
    assert metrics.macro_f1(answers, references, ["a", "b", "c"]) == pytest.approx((0.8 + 0) / 2)
    assert metrics.macro_f1(references, references, ["a", "b", "c"]) == 1
    assert metrics.macro_f1(["x"], ["y"], ["a"]) == 0


def test_rouge_l_is_the_f_score_of_the_longest_common_subsequence() -> None:
    # the cat sat / the cat slept well: subsequence 2, precision 2/3, recall 2/4
    assert metrics.rouge_l(["The cat sat"], ["the cat slept well"]) == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )


@pytest.mark.parametrize("text", ["доброе утро всем", "καλημέρα σε όλους", "你好世界", "naïve café"])
def test_rouge_l_finds_words_in_every_script(text: str) -> None:
    assert metrics.rouge_l([text], [text]) == 1
    assert 0 < metrics.rouge_l([text[: len(text) // 2 + 1]], [text]) < 1


def test_bleu_and_chrf_equal_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    answers, references = ["the cat is on the mat", "hello there"], ["the cat sat on the mat", "hello there you"]
    found = metrics.scores(["bleu", "chrf"], answers, references, None)
    assert found["bleu"] == BLEU().corpus_score(answers, [references]).score
    assert found["chrf"] == CHRF().corpus_score(answers, [references]).score


def test_an_unknown_metric_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"eval.metrics: blue is not a metric; choose from exact_match, .*rouge_l"):
        metrics.check(["chrf", "blue"])


def test_metrics_over_labels_need_labels() -> None:
    with pytest.raises(DataError, match="accuracy, f1 needs labels"):
        metrics.scores(["exact_match", "accuracy", "f1"], ["a"], ["a"], None)


def test_a_missing_package_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without_sacrebleu(name: str, *args: Any) -> Any:
        return None if name == "sacrebleu" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_sacrebleu)
    metrics.check(["exact_match", "f1"])
    with pytest.raises(ResourceError, match=r"needs sacrebleu: pip install 'lora_ft\[metrics\]'"):
        metrics.check(["exact_match", "bleu", "chrf"])
