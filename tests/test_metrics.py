"""Metrics of generated answers against hand-computed values, and the table of metrics: directions, packages."""

import importlib.util
from typing import Any

import pytest

from lora_ft import metric_table
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.evaluation import classification, metrics
from lora_ft.metric_table import METRICS, Source

ALL = metric_table.of(Source.answers, list(METRICS))


def test_right_answers_have_the_best_score_whatever_whitespace_surrounds_them() -> None:
    references = ["Paris is the capital of France.", "An insect has six legs in all."]
    found = metrics.scores(ALL, [f" {r}\n" for r in references], references)
    assert found == pytest.approx({"exact_match": 1, "chrf": 100, "bleu": 100, "rouge_l": 1}, abs=1e-9)


def test_answers_with_nothing_in_common_score_zero() -> None:
    found = metrics.scores(ALL, ["zzz", "qqq"], ["alpha beta", "gamma delta"])
    assert found == pytest.approx(dict.fromkeys(ALL, 0.0))


def test_exact_match_counts_right_answers() -> None:
    answers, references = ["yes", "no", "Yes", "maybe"], ["yes", "yes", "yes", "maybe"]
    assert metrics.exact_match(answers, references) == 2 / 4


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
    found = metrics.scores(["bleu", "chrf"], answers, references)
    assert found["bleu"] == BLEU().corpus_score(answers, [references]).score
    assert found["chrf"] == CHRF().corpus_score(answers, [references]).score


def test_an_unknown_metric_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"eval.metrics: blue is not a metric; choose from accuracy, .*rouge_l"):
        metric_table.check("eval.metrics", ["chrf", "blue"])
    with pytest.raises(ConfigError, match=r"eval.metrics: f1 is not a metric; f1 is now macro_f1"):
        metric_table.check("eval.metrics", ["f1"])


def test_the_loss_is_a_metric_only_to_rank_by() -> None:
    metric_table.check("train.best_metric", ["loss"])
    with pytest.raises(ConfigError, match=r"train.best_metric: eval_loss is not a metric; eval_loss is now loss"):
        metric_table.check("train.best_metric", ["eval_loss"])
    with pytest.raises(ConfigError, match=r"train.eval_metrics: loss is not a metric"):
        metric_table.check("train.eval_metrics", ["loss"])


def test_every_metric_has_a_source_that_computes_it() -> None:
    assert metric_table.of(Source.classes, list(METRICS)) == list(classification.METRICS)
    assert metrics.scores(ALL, ["a b"], ["a b"]).keys() == set(ALL)
    assert metric_table.of(Source.loss, list(METRICS)) == ["loss"]


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [("loss", 1.0, 2.0), ("brier", 0.1, 0.2), ("ece", 0.1, 0.2), ("log_loss", 0.1, 0.2), ("macro_f1", 0.9, 0.8)]
    + [(name, 0.9, 0.8) for name in ("accuracy", "micro_f1", "auroc", *ALL)]
    + [("an objective's own", 1.0, 2.0)],
)
def test_cost_is_lower_for_the_better_value(name: str, better: float, worse: float) -> None:
    assert metric_table.cost(name, better) < metric_table.cost(name, worse)


def test_a_missing_package_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without_sacrebleu(name: str, *args: Any) -> Any:
        return None if name == "sacrebleu" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_sacrebleu)
    metric_table.check("eval.metrics", ["exact_match", "macro_f1"])
    with pytest.raises(ResourceError, match=r"eval.metrics needs sacrebleu: pip install 'lora_ft\[metrics\]'"):
        metric_table.check("eval.metrics", ["exact_match", "bleu", "chrf"])
