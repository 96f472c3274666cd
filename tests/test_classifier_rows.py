"""Rows of a classifier: labels that are wrong, settings that a head cannot follow, many rows, several sources."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import LABELS, rows_file, words_of
from finished import call
from rich.console import Console
from tiny import tiny_tokenizer

from lora_ft import check, config, mixing, validation
from lora_ft.config import Data, TooLong, TrainOn
from lora_ft.data import columns, parsing, row_store
from lora_ft.data.dataset import Dataset
from lora_ft.data.read import read
from lora_ft.errors import ConfigError, DataError, LoraFtError
from lora_ft.evaluation import heads
from lora_ft.objectives import classes_of, find
from lora_ft.training.dry_run import PartialDryRun, read_rows
from lora_ft.training.ineffective_settings import ineffective
from lora_ft.training.state import choose_eval

PAIR = {"prompt": "{text}\n\nWhich label fits?", "answer": "{label}", "labels": "auto"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings(path: Path, objective: dict[str, Any] | None = None, **data: Any) -> config.TrainRun:
    cfg = config.TrainRun()
    cfg.data = Data(**{"path": str(path), "eval_fraction": 0.3} | PAIR | data)
    cfg.objective = config.Objective("classification", **objective or {})
    return cfg


def dataset_of(path: Path, objective: dict[str, Any] | None = None, **data: Any) -> Dataset:
    return read_rows(settings(path, objective, **data), tiny_tokenizer()).dataset


BAD_LABELS = [
    (lambda n: None if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: is missing or null"),
    (lambda n: " " if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: is empty"),
    (lambda n: {"a": 1} if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: must be text or a number, got dict"),
    (lambda n: "good", "a classifier needs two labels or more, and the training rows have only 'good'"),
]


@pytest.mark.parametrize("labels", ["auto", None])
@pytest.mark.parametrize(("label", "message"), BAD_LABELS, ids=range(4))
def test_bad_labels_are_named(labels: Any, label: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        dataset_of(rows_file(tmp_path / "rows.jsonl", label=label), labels=labels)


def test_a_command_ends_with_the_bad_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows_file(tmp_path / "rows.jsonl", label=BAD_LABELS[0][0])
    assert call("check", *words_of(tmp_path)) == 4
    assert BAD_LABELS[0][1] in " ".join(capfd.readouterr().err.split())


def test_a_label_that_is_not_in_the_map_is_named(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", label=lambda n: n % 3)
    with pytest.raises(DataError, match=r"rows.jsonl:3: label: 2 is not one of data.labels: 0, 1"):
        dataset_of(path, labels={0: "no", 1: "yes"})


def test_an_eval_label_that_no_training_row_has_is_named(tmp_path: Path) -> None:
    test = rows_file(tmp_path / "test.jsonl", 5, label=lambda n: "great" if n == 2 else "good", seed=1)
    message = r"test.jsonl:3: label: great is not a label of the training rows \(bad, good, so so\)"
    with pytest.raises(DataError, match=message):
        dataset_of(rows_file(tmp_path / "rows.jsonl"), eval_path=str(test))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["a", "a"], "holds 'a' twice"),
        (["a", " "], "holds an empty label"),
        ("[1", "must be a list in JSON"),
        ("[true]", "must be a list of texts or whole numbers"),
    ],
)
def test_bad_lists_of_labels_are_named(label: Any, message: str, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", label=lambda n: label if n == 4 else [LABELS[n % 3]])
    with pytest.raises(DataError, match=f"rows.jsonl:5: label: {message}"):
        dataset_of(path, {"multi_label": True})


CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"system": "Be short."}, "data.system: objective=classification reads the text alone"),
    ({}, {"too_long": TooLong.split}, "data.too_long=split: a part of a text has no label"),
    ({}, {"stream": True, "eval_fraction": 0.0}, "data.stream=true reads rows only once .* objective=classification"),
    ({"multi_label": True}, {"labels": {"a": "b", "c": "d"}}, "data.labels: a map is for rows of one label"),
    ({"class_weights": {"great": 2.0}}, {}, "objective.class_weights names 'great', which is none of bad, good"),
    ({"class_weights": {"good": -1.0}}, {}, "the weight of 'good' must be above 0, got -1"),
    ({"class_weights": {"good": 2.0}, "balanced": True}, {}, "give one of them"),
    ({"balanced": True}, {"labels": [*LABELS, "great"]}, "training rows of each class, and 'great' has none"),
]


@pytest.mark.parametrize(("objective", "data", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_settings_that_a_head_cannot_follow_are_refused(
    objective: dict[str, Any], data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset_of(rows_file(tmp_path / "rows.jsonl"), objective, **data)


def test_values_and_rows_that_a_head_cannot_follow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.label_smoothing must be below 1, got 1"):
        validation.validate(settings(rows_file(tmp_path / "rows.jsonl"), {"label_smoothing": 1.0}))
    chats = tmp_path / "chats.jsonl"
    made = [[{"role": role, "content": f"{role} {n}"} for role in ("system", "user", "assistant")] for n in range(3)]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in made))
    for labels in ("auto", None):
        with pytest.raises(LoraFtError, match=r"must be a text and its label \(data=classify: .* is a chat of 3"):
            dataset_of(chats, prompt=None, answer=None, labels=labels)


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    cfg = settings(rows_file(tmp_path / "rows.jsonl"), train_on=TrainOn.all)
    cfg.train.samples = 1
    found = ineffective(cfg, read_rows(cfg, tiny_tokenizer()).dataset, 9, 90)
    assert "train.samples has no effect: a classifier writes no answers" in found
    assert "data.train_on has no effect: a classifier learns the label" in found
    cfg.objective = config.Objective(balanced=True)
    assert "objective.balanced has no effect: it is for objective=classification" in ineffective(cfg, None, 9, 90)


def test_metrics_that_a_head_cannot_have_are_refused(tmp_path: Path) -> None:
    found = dataset_of(rows_file(tmp_path / "rows.jsonl"))
    assert found.classes is not None
    heads.check(["macro_f1", "brier"], found.eval, found.classes, "eval.metrics")
    with pytest.raises(DataError, match=r"eval.metrics: chrf needs generated answers, and a classifier writes none"):
        heads.check(["macro_f1", "chrf"], found.eval, found.classes, "eval.metrics")
    with pytest.raises(DataError, match=r"eval.metrics: auroc needs two classes, and this classifier has 3 classes"):
        heads.check(["auroc"], found.eval, found.classes, "eval.metrics")


def test_documents_of_many_rows_are_those_of_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(row_store, "_ROWS_AT_ONCE", 9)
    monkeypatch.setattr(columns, "_MOST_IN_MEMORY", 500)
    path, tokenizer = rows_file(tmp_path / "rows.jsonl", 40), tiny_tokenizer()
    tokenizer.pad_token = None
    cfg = settings(path)
    found = read(cfg.data)
    classes = classes_of(cfg.objective, {"": found}, cfg.data)
    assert classes is not None and classes.names == LABELS
    trained = Counter(row.answer for row in found.training_rows)
    assert (classes.counts, classes.rows) == (tuple(trained[name] for name in LABELS), len(found.training_rows))
    examples = find(cfg.objective, classes).examples(found, tokenizer, cfg.data)
    assert tokenizer.pad_token == tokenizer.eos_token
    for line, example in zip(path.read_text().splitlines(), examples, strict=True):
        row = json.loads(line)
        assert example.ids.tolist() == [*tokenizer(row["text"])["input_ids"], LABELS.index(row["label"])]
        assert example.supervised.tolist() == [False] * (len(example.ids) - 1) + [True]
        assert example.source == f"{path}:{example.row + 1}"


def test_a_classifier_is_evaluated_on_the_rows_of_a_language_model(tmp_path: Path) -> None:
    """Both objectives choose the same eval rows, so that a sweep may compare them."""
    cfg = settings(rows_file(tmp_path / "rows.jsonl"))
    chosen = []
    for name in ("sft", "classification"):
        cfg.objective = config.Objective(name)
        prompts = choose_eval(read_rows(cfg, tiny_tokenizer()).dataset, 5).prompts
        chosen.append([(prompt.row, prompt.answer) for prompt in prompts])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5


def test_check_shows_the_labels_and_compares_the_texts(tmp_path: Path) -> None:
    cfg, tokenizer = settings(rows_file(tmp_path / "rows.jsonl")), tiny_tokenizer()
    found = PartialDryRun(read_rows(cfg, tokenizer), None, None, None, [])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(check.page(cfg, found, tokenizer))
    shown = " ".join(console.export_text().split())
    assert "⟦so so⟧" in shown and "examined equal tokenizer(text) at inference" in shown and "stop token" not in shown


# --- several sources ---


def mixed(tmp_path: Path, **labels: Any) -> config.TrainRun:
    """Return the settings of two sources, whose labels are texts and numbers."""
    cfg = settings(Path())
    first = rows_file(tmp_path / "words.jsonl", 24)
    second = rows_file(tmp_path / "numbers.jsonl", 30, label=lambda n: n % 3, seed=1)
    maps: dict[str, Any] = {"words": list(LABELS), "numbers": dict(enumerate(LABELS))} | labels
    files = {"words": first, "numbers": second}
    cfg.data = Data(
        sources={name: {"path": str(files[name]), "labels": maps[name]} for name in files},
        mix={"words": 1, "numbers": 1}, eval_fraction=0.3, prompt=PAIR["prompt"], answer=PAIR["answer"],
    )  # fmt: skip
    return cfg


def test_classes_of_sources_are_counted_together(tmp_path: Path) -> None:
    cfg = mixed(tmp_path)
    found = read_rows(cfg, tiny_tokenizer()).dataset
    alone = {}
    for name, source in mixing.sources(cfg.data).items():
        own = config.TrainRun(data=source, objective=cfg.objective)
        alone[name] = read_rows(own, tiny_tokenizer()).dataset
    counts = [alone[name].classes.counts for name in alone]
    assert found.classes is not None and found.classes.names == LABELS
    assert found.classes.counts == tuple(np.sum(counts, axis=0).tolist())
    for side in ("train", "eval"):
        separate = [example.ids.tolist() for own in alone.values() for example in getattr(own, side)]
        assert [example.ids.tolist() for example in getattr(found, side)] == separate
    parts = {name: part.eval for name, part in found.parts.items()}
    yardstick = heads.majority(find(cfg.objective, found.classes).loss_of, found.classes, found.eval, parts).base
    weighted = sum(source.loss * source.rows for source in yardstick.sources.values())
    assert yardstick.rows == sum(source.rows for source in yardstick.sources.values()) == len(found.eval)
    assert yardstick.loss == pytest.approx(weighted / yardstick.rows)
    chosen = np.bincount(heads.references(found.eval, found.classes), minlength=3)
    smoothed = np.log((np.array(found.classes.counts) + 1) / (found.classes.rows + 3))
    assert yardstick.loss == pytest.approx(-(chosen * smoothed).sum() / chosen.sum())


def test_sources_that_name_different_labels_are_refused(tmp_path: Path) -> None:
    cfg = mixed(tmp_path, words=[*LABELS, "great"])
    message = "data.sources.words.labels are bad, good, so so, great, and data.sources.numbers.labels are bad, good"
    with pytest.raises(ConfigError, match=message):
        read_rows(cfg, tiny_tokenizer())
