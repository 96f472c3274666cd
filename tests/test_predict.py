"""Predictions with probabilities: labels and temperature of the adapter, rows with and without labels, formats."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from finished import adapted, call, settings
from test_task_metrics import labelled_rows
from tiny import tiny_tokenizer

from lora_ft import config, runs, validation
from lora_ft import eval as evaluate
from lora_ft.adapters import files, provenance
from lora_ft.data import unlabelled
from lora_ft.data.dataset import prepare
from lora_ft.errors import DataError
from lora_ft.evaluation import classification

LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, labelled rows, and `run`, a run with a random adapter."""
    folder = tmp_path_factory.mktemp("kept")
    cfg = settings(folder, "llama")
    cfg.data = config.Data(
        path=str(labelled_rows(folder / "rows.csv", 60)), format=config.Format.table, prompt="{text}?",
        answer="{label}", labels={0: "negative", 1: "positive"}, eval_fraction=0.5,
    )  # fmt: skip
    runs.create(folder / "run", validation.to_plain(cfg), [])
    base, model = adapted(cfg)
    dataset = prepare(cfg.data, base.tokenizer)
    source = provenance.Provenance(base.identity, cfg.quant, dataset.report.sha256, labels=dataset.answers)
    files.save(model, "first", folder / "run" / "adapter", base.tokenizer, source)
    return folder


@pytest.fixture
def run(kept: Path, tmp_path: Path) -> Path:
    """A copy of the run, which a test may change."""
    shutil.copytree(kept / "run", tmp_path / "run")
    return tmp_path / "run"


def own_data(run: Path) -> config.Data:
    return validation.from_plain(config.Data, runs.read_config(run)["data"])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predicted(run: Path, rows: Path, out: Path, *words: str) -> int:
    return call("eval", f"run={run}", f"predict={rows}", f"out={out}", *words)


def test_eval_reports_labels_of_base_and_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", f"run={run}", "eval.samples=0") == 0
    found = json.loads((run / "eval.json").read_text())
    for side in ("base", "adapter"):
        assert found[side].keys() == {"loss", "perplexity", *classification.METRICS}
        assert found["classification"][side]["metrics"] == {n: found[side][n] for n in classification.METRICS}
    assert found["base"]["log_loss"] != found["adapter"]["log_loss"]
    assert (run / "eval_confusion.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "macro_f1" in output and "right \\ predicted" in output and "95% of resamples" in output


def test_a_fitted_temperature_is_stored_and_applied(run: Path, kept: Path, tmp_path: Path) -> None:
    words = ("eval.samples=0",)
    assert predicted(run, kept / "rows.csv", tmp_path / "plain.jsonl") == 0
    assert call("eval", f"run={run}", *words, "eval.calibrate=true") == 0
    fitted = json.loads((run / "eval.json").read_text())
    calibration = json.loads((run / "adapter" / "lora_ft.json").read_text())["calibration"]
    assert calibration["rows"] == fitted["rows"] and calibration["data_sha256"] == fitted["data_sha256"]
    temperature = calibration["temperature"]
    assert fitted["classification"]["adapter"]["temperature"] == temperature
    assert fitted["classification"]["base"]["temperature"] is None
    # Without calibrate the stored temperature is applied, by eval and to predictions.
    assert call("eval", f"run={run}", *words) == 0
    assert json.loads((run / "eval.json").read_text()) == fitted
    assert predicted(run, kept / "rows.csv", tmp_path / "calibrated.jsonl") == 0
    plain, calibrated = (
        np.array([[row[f"p_{label}"] for label in LABELS] for row in lines(tmp_path / name)])
        for name in ("plain.jsonl", "calibrated.jsonl")
    )
    assert calibrated == pytest.approx(classification.with_temperature(plain, temperature), abs=1e-9)
    # The temperature is that of the eval rows, and lowers their log loss.
    texts = {prompt.prompt.removesuffix("?") for prompt in prepare(own_data(run), tiny_tokenizer()).eval_prompts}
    rows = [row for row in lines(tmp_path / "plain.jsonl") if row["text"] in texts]
    found = classification.Predictions(
        LABELS,
        np.array([[row[f"p_{label}"] for label in LABELS] for row in rows]),
        np.array([int(row["label"]) for row in rows]),
    )
    assert len(rows) == fitted["rows"] and classification.fit_temperature(found) == pytest.approx(temperature, rel=1e-3)
    assert fitted["adapter"]["log_loss"] < classification.metrics(found)["log_loss"]


def test_rows_that_are_all_right_have_no_temperature() -> None:
    """Each lower temperature would fit better, and make every prediction look certain."""
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6]])
    with pytest.raises(
        DataError, match=r"eval.calibrate: no temperature fits 2 rows of which 100% are predicted right"
    ):
        evaluate._fitted(classification.Predictions(LABELS, probabilities, np.array([0, 1])))
    assert evaluate._fitted(classification.Predictions(LABELS, probabilities, np.array([1, 0]))) > 10


def test_predictions_in_all_formats_are_the_same(run: Path, tmp_path: Path) -> None:
    """With labels, which are not used, and without."""
    labelled = labelled_rows(tmp_path / "labelled.csv", 9, seed=5)
    texts = [row["text"] for row in csv.DictReader(labelled.read_text().splitlines())]
    bare = tmp_path / "bare.csv"
    bare.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    for rows, suffix in ((labelled, "csv"), (bare, "jsonl"), (bare, "parquet")):
        assert predicted(run, rows, tmp_path / "made" / f"out.{suffix}") == 0
    tables = {
        "csv": list(csv.DictReader((tmp_path / "made" / "out.csv").read_text().splitlines())),
        "jsonl": lines(tmp_path / "made" / "out.jsonl"),
        "parquet": pyarrow.parquet.read_table(tmp_path / "made" / "out.parquet").to_pylist(),
    }
    names = ["prediction", "probability", "p_negative", "p_positive"]
    expected = np.array([[row[name] for name in names[1:]] for row in tables["jsonl"]])
    assert expected[:, 1:].sum(1) == pytest.approx(np.ones(9))
    assert np.array_equal(expected[:, 0], expected[:, 1:].max(1))
    for suffix, table in tables.items():
        assert [list(row) for row in table] == [["text", *(["label"] if suffix == "csv" else []), *names]] * 9
        assert [row["text"] for row in table] == texts
        assert [row["prediction"] for row in table] == [LABELS[i] for i in expected[:, 1:].argmax(1)]
        numbers = np.array([[float(row[name]) for name in names[1:]] for row in table])
        assert numbers == pytest.approx(expected, abs=1e-12)


def test_predictions_of_labelled_rows_are_those_that_eval_measures(run: Path, kept: Path, tmp_path: Path) -> None:
    """Every row of other rows, given as eval rows and as rows to predict."""
    others = labelled_rows(tmp_path / "others.csv", 12, seed=9)
    changed = others.read_text().replace("lazy", "very lazy").replace("good", "very good")
    others.write_text(changed)
    assert call("eval", f"run={run}", f"data.path={others}", "eval.samples=0") == 0
    measured = json.loads((run / "eval.json").read_text())["adapter"]
    assert predicted(run, others, tmp_path / "out.jsonl") == 0
    rows = lines(tmp_path / "out.jsonl")
    probabilities = np.array([[row[f"p_{label}"] for label in LABELS] for row in rows])
    references = np.array([int(row["label"]) for row in rows])
    found = classification.metrics(classification.Predictions(LABELS, probabilities, references))
    assert found == pytest.approx({name: measured[name] for name in found}, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"messages": [{"role": "user", "content": "Is it good?"}]}, {}),
        ({"messages": [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "?"}]}, {}),
        ({"conversations": [{"from": "human", "value": "Is it good?"}]}, {}),
        ({"messages": '[{"role": "user", "content": "Is it good?"}]'}, {}),
        ({"conversation": [{"role": "user", "content": "Is it good?"}, {"role": "bot", "content": "?"}]}, {}),
        ({"question": "Is it good?"}, {}),
        ({"question": "Is it good?", "response": None}, {}),
        ({"prompt": "Is it good?"}, {}),
        ({"instruction": "Is it good?"}, {}),
        ({"words": "Is it good?"}, {"prompt": "{words}", "answer": "{label}"}),
        ({"words": "Is it good?"}, {"prompt": "{text}", "answer": "{label}", "columns": {"text": "words"}}),
    ],
)
def test_rows_of_every_format_need_no_answer(tmp_path: Path, row: dict, options: dict) -> None:
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    data = config.Data(path=str(tmp_path / "new.jsonl"), **options)
    found, columns = unlabelled.read(data, "predict", "yes")
    [read] = found.rows
    assert [message["content"] for message in read.messages] == ["Is it good?", "yes"] and read.answer == "yes"
    assert columns == {read.source: row} and found.is_eval == [True]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "out is empty: give the file of the predictions"),
        (["out=p.xlsx"], 2, "out=p.xlsx: predictions are written as .csv, .jsonl, .parquet"),
        (["out={run}/config.yaml"], 2, "predictions are written as"),
        (["out={rows}"], 2, "exists: choose another file"),
        (["out={new}", "predict=nowhere.csv"], 4, "predict: there is no file or folder nowhere.csv"),
        (["out={new}", "data.labels=[a,a]"], 2, "data.labels has a twice"),
    ],
)
def test_errors_of_predict_name_the_setting(
    run: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    paths = {"run": run, "rows": kept / "rows.csv", "new": tmp_path / "new.csv"}
    given = [word.format(**paths) for word in words]
    if not any(word.startswith("predict=") for word in given):
        given.append(f"predict={kept / 'rows.csv'}")
    assert call("eval", f"run={run}", *given) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.csv").exists()


def test_a_row_that_has_a_column_of_the_predictions_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "good", "prediction": "x"}\n')
    assert predicted(run, tmp_path / "new.jsonl", tmp_path / "out.csv") == 4
    assert "the rows have a column prediction already" in capsys.readouterr().err


def test_an_adapter_without_labels_needs_them_named(
    run: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "adapter" / "lora_ft.json"
    record = json.loads(path.read_text())
    del record["labels"]
    path.write_text(json.dumps(record))
    words = (f"adapter_path={run / 'adapter'}", "data=classify", f"predict={kept / 'rows.csv'}")
    assert call("eval", *words, f"out={tmp_path / 'a.csv'}") == 2
    assert "predict needs labels, and the adapter has no record of any" in capsys.readouterr().err
    assert call("eval", *words, f"out={tmp_path / 'a.csv'}", "data.labels=[no,yes]") == 0


@pytest.mark.parametrize("labels", ["yes", ["yes"], [1, 2]])
def test_damaged_labels_of_an_adapter_are_refused(
    run: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: object
) -> None:
    path = run / "adapter" / "lora_ft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    words = (f"adapter_path={run / 'adapter'}", "data=classify", f"predict={kept / 'rows.csv'}")
    assert call("eval", *words, f"out={tmp_path / 'a.csv'}") == 5
    assert "lora_ft.json: labels must be a list of texts" in capsys.readouterr().err
