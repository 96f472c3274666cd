"""A run of the objective `classification`: evaluation, predictions, and what a classifier is refused for."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import LABELS, ONE, TEXTS, logits_of, rows_file, tiny_classifier, words_of
from finished import call, saved_adapter
from tiny import tiny_folder, tiny_tokenizer

import lora_ft
from lora_ft import runs

STEPS = {"train.max_steps": 6, "train.eval_every_steps": 3, "train.keep": "best", "train.best_metric": "macro_f1"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and `run`, a trained classifier; no test changes it."""
    folder = tmp_path_factory.mktemp("prepared")
    assert call("train", *words_of(folder, **STEPS)) == 0
    return folder


def test_eval_compares_a_classifier_with_the_class_frequencies(
    prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", f"run={prepared / 'run'}") == 0
    shown = capfd.readouterr().out
    assert "majority" in shown and "nats per row" in shown and "perplexity" not in shown
    found = json.loads((prepared / "run" / "eval.json").read_text())
    result = json.loads((prepared / "run" / "result.json").read_text())
    best = next(line for line in runs.read_metrics(prepared / "run") if line["step"] == result["best_step"])
    assert found["adapter"]["loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert found["adapter"]["accuracy"] == pytest.approx(best["eval_accuracy"])
    assert found["classification"]["adapter"] == result["classification"]
    counts = np.array(json.loads((prepared / "run/adapter/lora_ft.json").read_text())["classifier"]["counts"]) + 1
    support = [each["support"] for each in found["classification"]["adapter"]["classes"]]
    expected = -np.average(np.log(counts / counts.sum()), weights=support)
    assert found["base"]["loss"] == pytest.approx(expected, rel=1e-6)
    checked = json.loads((prepared / "run" / "check.json").read_text())
    assert checked["layers"]["trainable"] == result["trainable_parameters"]


@pytest.mark.nightly
def test_the_record_of_an_adapter_names_the_classes_without_its_run(prepared: Path) -> None:
    given = ["data=classify", f"data.path={prepared / 'rows.jsonl'}", "data.eval_fraction=0.3", "device=cpu"]
    found = lora_ft.evaluate(prepared / "run" / "adapter", overrides=given)
    result = json.loads((prepared / "run" / "result.json").read_text())
    assert found.comparison.adapter.loss == pytest.approx(result["eval_loss"], rel=1e-6)


def test_predictions_are_the_probabilities_of_the_head_at_the_stored_temperature(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared / "run", run)
    rows = tmp_path / "new.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)))

    def predicted(name: str) -> list[dict[str, Any]]:
        assert call("eval", f"run={run}", f"predict={rows}", f"out={tmp_path / name}") == 0
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    model, tokenizer = lora_ft.load(run, device="cpu")
    logits = logits_of(model, tokenizer)[: len(TEXTS)]
    assert call("eval", f"run={run}", "eval.calibrate=true", "eval.rows=12") == 0
    record = json.loads((run / "adapter" / "lora_ft.json").read_text())
    assert record["labels"] == list(LABELS)
    warm = (logits / record["calibration"]["temperature"]).softmax(1).tolist()
    found = predicted("predictions.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2]
    for row, expected in zip(found, warm, strict=True):
        assert [row[f"p_{name}"] for name in LABELS] == pytest.approx(expected, abs=1e-5)
        assert row["prediction"] == LABELS[int(np.argmax(expected))]


def test_a_metric_of_the_head_chooses_the_best_state(prepared: Path) -> None:
    lines = [line for line in runs.read_metrics(prepared / "run") if "eval_macro_f1" in line]
    best = max(lines, key=lambda line: line["eval_macro_f1"])
    result = json.loads((prepared / "run" / "result.json").read_text())
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert (result["best_step"], result["best_value"]) == (best["step"], best["eval_macro_f1"])
    assert result["metrics"]["macro_f1"] == pytest.approx(best["eval_macro_f1"])


def test_what_writes_text_refuses_a_classifier(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = f"run={prepared / 'run'}"
    for words in (["chat", run, "prompt=x"], ["merge", run, f"out={tmp_path / 'm.gguf'}", "gguf=f16"],
                  ["publish", run, f"to=dir:{tmp_path / 'p'}", "model.hub_id=me/tiny", "formats=[mlx]"]):  # fmt: skip
        assert call(*words) == 2
        assert "is a classifier: its head gives a probability to each class" in capfd.readouterr().err
    assert call("publish", run, "lint_only=true", "model.hub_id=me/tiny") == 0
    verdicts = capfd.readouterr().out
    assert "vLLM" in verdicts and "this is a classifier" in " ".join(verdicts.split())


@pytest.mark.nightly
def test_a_published_classifier_names_its_classes_and_is_verified(prepared: Path, tmp_path: Path) -> None:
    made = lora_ft.publish(prepared / "run", f"dir:{tmp_path / 'package'}", ["model.hub_id=me/tiny", "device=cpu"])
    assert made.verification.distance is not None and made.verification.distance <= made.verification.allowed
    card = (tmp_path / "package" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "2. `so so`" in card
    assert "AutoModelForSequenceClassification.from_pretrained('me/tiny'" in card and "perplexity" not in card
    record = json.loads((tmp_path / "package" / "lora_ft.json").read_text())
    assert record["classifier"]["label2id"] == {"bad": 0, "good": 1, "so so": 2}
    assert record["loading"]["classifier"]["id2label"]["1"] == "good"


def test_a_head_of_another_number_of_classes_is_refused_with_both_numbers(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared / "run", run)
    two = rows_file(tmp_path / "two.jsonl", label=lambda n: LABELS[n % 2])
    words = words_of(prepared, **{
        "data.path": two, "adapter.init_from": run / "adapter", "hydra.run.dir": tmp_path / "again",
    })  # fmt: skip
    assert call("train", *words) == 5
    assert "has a head of 3 classes, and this model has 2" in capfd.readouterr().err
    # The record of the adapter and its head do not agree.
    path = run / "adapter" / "lora_ft.json"
    record = json.loads(path.read_text())
    record["classifier"] |= {"id2label": {"0": "bad", "1": "good"}, "counts": []}
    path.write_text(json.dumps(record))
    assert call("eval", f"run={run}") == 5
    assert "has a head of 3 classes, but its record names 2: bad, good" in capfd.readouterr().err
    # A base that is a classifier already.
    merged = tmp_path / "two_classes"
    tiny_classifier("llama", dataclasses.replace(ONE, names=("no", "yes"))).save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    assert call("train", *words_of(prepared, **{"model.path": merged, "hydra.run.dir": tmp_path / "other"})) == 2
    assert "the base is a classifier of 2 classes (no, yes), and this run has 3 (bad, good, so so)" in " ".join(
        capfd.readouterr().err.split()
    )


def test_a_classifier_does_not_start_from_the_adapter_of_a_language_model(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = {"objective": "sft", "adapter.init_from": prepared / "run/adapter", "hydra.run.dir": tmp_path / "run"}
    assert call("train", *words_of(prepared, **words)) == 5
    assert "was trained for the task SEQ_CLS, and this run trains CAUSAL_LM" in capfd.readouterr().err
    _, folder = saved_adapter(tmp_path, "llama")
    rows = f"data.path={prepared / 'rows.jsonl'}"
    assert call("eval", f"adapter_path={folder}", "objective=classification", "data=classify", rows) == 2
    assert "objective=classification is for classifiers, and this adapter is none" in capfd.readouterr().err


def test_a_family_without_a_classifier_in_transformers_is_refused(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tiny_folder(tmp_path, "granitemoe")
    assert call("check", *words_of(prepared, **{"model.path": base})) == 2
    assert "transformers has no classifier for granitemoe" in capfd.readouterr().err


@pytest.mark.nightly
def test_a_classifier_of_several_sources_has_the_losses_of_each(prepared: Path, tmp_path: Path) -> None:
    numbers = rows_file(tmp_path / "numbers.jsonl", 30, label=lambda n: n % 3, seed=1)
    words = [word for word in words_of(prepared, **STEPS, **{"hydra.run.dir": tmp_path / "run"}) if "data" not in word]
    sources = ["data@data.sources.words=classify", f"data.sources.words.path={prepared / 'rows.jsonl'}",
               "data@data.sources.numbers=classify", f"data.sources.numbers.path={numbers}",
               "data.sources.numbers.labels={0: bad, 1: good, 2: so so}", "data.mix={words: 1, numbers: 1}",
               "data.eval_fraction=0.3"]  # fmt: skip
    assert call("train", *words, *sources) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval_losses"].keys() == result["base_eval_losses"].keys() == {"numbers", "words"}
    record = json.loads((tmp_path / "run" / "adapter" / "lora_ft.json").read_text())
    assert record["labels"] == list(LABELS) == list(record["classifier"]["label2id"])
    assert call("eval", f"run={tmp_path / 'run'}") == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    for name, loss in result["eval_losses"].items():
        assert found["adapter"]["sources"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["base"]["sources"][name]["loss"] == pytest.approx(result["base_eval_losses"][name], rel=1e-6)


@pytest.mark.nightly
def test_a_plan_knows_the_size_of_the_head(prepared: Path) -> None:
    words = words_of(prepared, **STEPS)
    result = json.loads((prepared / "run" / "result.json").read_text())
    planned = lora_ft.plan(
        lora_ft.compose("train", [*(word for word in words if not word.startswith("hydra")), "device=cpu"])
    )
    assert planned.prediction.trace.num_trainable == result["trainable_parameters"]
    adapter = prepared / "run" / "adapter" / "adapter_model.safetensors"
    assert planned.storage.adapter_file_bytes == adapter.stat().st_size


@pytest.mark.nightly
def test_a_plan_without_rows_assumes_two_classes(prepared: Path) -> None:
    words = ["model=local", f"model.path={prepared / 'llama'}", "objective=classification", "device=cpu"]
    assert lora_ft.plan(lora_ft.compose("plan", words)).prediction.workload.assumed.endswith("and 2 classes")


@pytest.mark.nightly
def test_jobs_of_a_sweep_share_a_classifier_and_halving_compares_them(tmp_path: Path) -> None:
    words = [word for word in words_of(tmp_path) if not word.startswith(("hydra", "adapter.r=", "train.max_steps"))]
    found = lora_ft.sweep(
        [*words, "adapter.r=2,4", "train.max_steps=8", "sweep.halving=true", "sweep.min_steps=4", "sweep.eta=2",
         "device=cpu"],
        tmp_path / "sweep",
    )  # fmt: skip
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert sorted(result["steps"] for result in results) == [4, 8]
    assert all(result["base_eval_loss"] == results[0]["base_eval_loss"] for result in results)
    assert found is not None
