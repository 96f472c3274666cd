"""Metrics during training: label scores and answers at each evaluation, the state that they choose, exact resume."""

import csv
import hashlib
import json
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import call
from states import detach, state_on
from sweep_folders import job, sweep_folder
from tiny import tiny_folder, tiny_model
from transformers import AutoModelForCausalLM

import lora_ft
from lora_ft import runs
from lora_ft.config import Train
from lora_ft.evaluation import classification
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.sweeps import leaderboard, report, results, tables
from lora_ft.sweeps.halving import Halving
from lora_ft.training import checkpoint
from lora_ft.training.state import Evaluation

LABELS = "data.labels={0: negative, 1: positive}"
QUICK = ("model=local", "data=classify", "data.eval_fraction=0.4", "train.max_steps=8", "train.tokens_per_step=300",
         "optim.lr=0.01", "adapter.r=4", "train.eval_every_steps=2", "train.save_every_steps=4", "train.samples=0",
         "train.eval_metrics=[macro_f1,exact_match]", "train.max_new_tokens=3",
         "train.best_metric=log_loss")  # fmt: skip


def labelled_rows(path: Path, rows: int = 30, seed: int = 0) -> Path:
    """Write a CSV whose label follows from the text."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(rows):
            positive = int(generator.integers(2))
            writer.writerow([f"{['lazy dog', 'good morning'][positive]} {number}", positive])
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, and `run`, a finished run; no test changes it."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_folder(folder, "llama")
    labelled_rows(folder / "rows.csv")
    assert call("train", *inputs(folder), f"hydra.run.dir={folder / 'run'}", "train.keep=best") == 0
    return folder


def inputs(folder: Path) -> tuple[str, ...]:
    return (*QUICK, f"model.path={folder / 'llama'}", f"data.path={folder / 'rows.csv'}", LABELS)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in runs.read_metrics(run) if "eval_loss" in line]


def test_each_evaluation_has_the_metrics_and_the_best_one_is_kept(whole: Path) -> None:
    lines, result = evaluations(whole / "run"), runs.read_result(whole / "run")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    for line in lines:
        assert line.keys() >= {"eval_macro_f1", "eval_exact_match", "eval_log_loss"}
    best = min(lines, key=lambda line: line["eval_log_loss"])
    assert result["best_metric"] == "log_loss"
    assert (result["best_step"], result["best_value"]) == (best["step"], best["eval_log_loss"])
    assert result["metrics"]["log_loss"] == pytest.approx(best["eval_log_loss"], rel=1e-9)
    assert result["base_metrics"]["log_loss"] == pytest.approx(lines[0]["eval_log_loss"], rel=1e-9)
    assert runs.objective(result) == result["metrics"]["log_loss"]
    assert best["eval_log_loss"] < lines[0]["eval_log_loss"]


def test_the_result_has_the_classification_of_the_eval_rows(whole: Path) -> None:
    found = runs.read_result(whole / "run")["classification"]
    assert found["metrics"].keys() == set(classification.METRICS) == found["intervals"].keys()
    assert [c["label"] for c in found["classes"]] == ["negative", "positive"]
    assert sum(map(sum, found["confusion"])) == found["rows"] == sum(c["support"] for c in found["classes"])
    assert (whole / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((whole / "run" / "adapter" / "lora_ft.json").read_text())
    assert record["labels"] == ["negative", "positive"]


def test_scores_of_the_saved_adapter_by_peft_alone_give_the_same_metrics(whole: Path) -> None:
    """A loop over rows and labels, with transformers and PEFT only."""
    import torch
    from peft import PeftModel

    from lora_ft.data import label_prompts
    from lora_ft.data.dataset import prepare
    from lora_ft.models.load import load_tokenizer
    from lora_ft.training.state import choose_eval

    cfg = lora_ft.compose("train", [*inputs(whole)])
    tokenizer = load_tokenizer(cfg.model)
    dataset = prepare(cfg.data, tokenizer)
    prompts = choose_eval(dataset, cfg.train.eval_rows).prompts
    labels = ["negative", "positive"]
    made = label_prompts.make([p.row for p in prompts], [p.prompt_ids for p in prompts], labels, tokenizer, cfg.data)
    base = AutoModelForCausalLM.from_pretrained(whole / "llama", dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):  # of PEFT, about names of transformers
        model = PeftModel.from_pretrained(base, str(whole / "run" / "adapter")).eval()
    scores = np.zeros((len(made), 2))
    for row, prompt in enumerate(made):
        for column, label in enumerate(prompt.label_ids):
            ids = torch.tensor([[*prompt.prompt_ids.tolist(), *label]])
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
            first = len(prompt.prompt_ids) - 1
            scores[row, column] = sum(log_probs[first + i, token].item() for i, token in enumerate(label))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    references = np.array([labels.index(prompt.answer) for prompt in prompts])
    expected = classification.metrics(classification.Predictions(labels, probabilities, references))
    found = runs.read_result(whole / "run")["metrics"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_a_run_that_is_stopped_and_resumed_has_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    append = runs.append_metrics

    def append_and_stop(folder: Path, metrics: dict[str, float]) -> None:
        append(folder, metrics)
        if metrics["step"] == 5:
            signal.raise_signal(signal.SIGTERM)

    words = (*inputs(whole), f"hydra.run.dir={tmp_path / 'run'}", "train.keep=best")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "append_metrics", append_and_stop)
        assert call("train", *words) == 128 + signal.SIGTERM
    assert call("train", *words, "resume=auto") == 0

    def timeless(run: Path) -> list[dict[str, Any]]:
        return [{name: v for name, v in line.items() if "second" not in name} for line in runs.read_metrics(run)]

    assert timeless(tmp_path / "run") == timeless(whole / "run")
    first, second = (
        hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        for run in (tmp_path / "run", whole / "run")
    )
    assert first == second
    newest = checkpoint.newest(tmp_path / "run")
    assert newest
    saved = json.loads((newest / "state.json").read_text())
    assert saved["evaluations"][-1]["result"]["metrics"].keys() >= {"macro_f1", "exact_match", "log_loss"}
    assert saved["cost"] == saved["evaluations"][-1]["result"]["metrics"]["log_loss"]


@pytest.fixture
def state(tmp_path: Path) -> Any:
    made = state_on(tiny_model("llama"), tmp_path, train=Train(max_steps=9, patience=2, best_metric="loss"))
    yield made
    detach(made)


def evaluated(*pairs: tuple[float, float]) -> list[Evaluation]:
    """Evaluations of these losses and macro F1s."""
    return [Evaluation(step, EvalLoss(loss, 1, 1, {"macro_f1": f1})) for step, (loss, f1) in enumerate(pairs)]


def test_best_and_patience_follow_the_metric_in_its_direction(state: Any) -> None:
    state.evaluations = evaluated((3.0, 0.2), (2.0, 0.9), (1.0, 0.8), (0.5, 0.7))
    assert state.best.step == 3 and state.evaluations_without_gain == 0
    state.cfg.train.best_metric = "macro_f1"
    assert state.best.step == 1 and state.evaluations_without_gain == 2 and state.is_done


def test_the_best_checkpoint_by_the_metric_stays(state: Any) -> None:
    state.cfg.train.best_metric, state.cfg.train.keep_checkpoints, state.cfg.train.patience = "macro_f1", 1, None
    for number, evaluation in enumerate(evaluated((3.0, 0.9), (2.0, 0.2), (1.0, 0.5)), 1):
        state.losses.append(1.0)
        state.evaluations.append(Evaluation(number, evaluation.result))
        checkpoint.save(state)
    assert sorted(path.name for path in (state.folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def test_halving_stops_the_jobs_with_the_worse_metric() -> None:
    values = {0: 0.5, 1: 0.9, 2: 0.7}
    stopped = Halving(3, 20).stopped(20, values, num_beyond=0, metric="macro_f1")
    assert stopped.keys() == {0, 2}
    assert stopped[2] == "halving at step 20: eval macro_f1 0.7000 ranks 2 of 3, 1 continue"
    assert Halving(3, 20).stopped(20, values, num_beyond=0).keys() == {1, 2}


def result(f1: float, rows: str = "a", base: float = 0.31) -> dict[str, Any]:
    return {"best_metric": "macro_f1", "metrics": {"macro_f1": f1}, "base_metrics": {"macro_f1": base},
            "eval_rows_sha256": rows}  # fmt: skip


def test_a_sweep_is_ranked_by_the_metric_of_its_jobs(tmp_path: Path) -> None:
    """Also where the losses say the opposite."""
    folder = sweep_folder(tmp_path, ["adapter.r=4,8,16", "train.best_metric=macro_f1"])
    for number, (r, loss, f1) in enumerate(((4, 2.0, 0.7), (8, 2.2, 0.9), (16, 2.1, 0.8))):
        settings = {"adapter.r": r, "train.best_metric": "macro_f1"}
        job(folder, number, [f"adapter.r={r}"], settings, loss=loss, result=result(f1))
    ranking = leaderboard.rank(results.read(folder))
    [board] = ranking.boards
    assert [one.name for one in board.ranked] == ["1", "2", "0"] and ranking.best == board.ranked[0]
    assert [board.place(one) for one in board.ranked] == [1, 2, 3] and board.base_value == 0.31
    [table] = tables.tables(ranking)
    assert "Ranked by macro_f1 over the same eval rows, higher is better." in table.note
    titles = [column.title for column in table.columns]
    assert [row.cells[titles.index("eval macro_f1")].text for row in table.rows] == [
        "0.3100",
        "0.9000",
        "0.8000",
        "0.7000",
    ]
    report.write(folder, pictures=False)
    written = json.loads((folder / "report.json").read_text())
    assert (written["metric"], written["best_job"]) == ("macro_f1", "1")
    assert "Eval macro_f1 against rank" in (folder / "report.html").read_text()


def test_jobs_of_two_objectives_are_ranked_together_by_a_metric_each_beside_its_own_base(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path, ["adapter.r=4,8", "objective=sft,classification", "train.best_metric=macro_f1"])
    for number, (head, r, f1) in enumerate(((False, 4, 0.7), (False, 8, 0.6), (True, 4, 0.9), (True, 8, 0.8))):
        settings = {"adapter.r": r, "train.best_metric": "macro_f1", "objective.name": ["sft", "classification"][head]}
        base_loss, base = (0.69, 0.02) if head else (3.5, 0.31)
        job(folder, number, [], settings, loss=0.5, base_loss=base_loss, result=result(f1, base=base))
    ranking = leaderboard.rank(results.read(folder))
    [board] = ranking.boards
    assert [one.name for one in board.ranked] == ["2", "3", "0", "1"]
    assert board.base_loss is None and board.base_value is None  # there are two
    [table] = tables.tables(ranking)
    assert "The base of a head is the class frequencies of the training rows." in table.note
    titles = [column.title for column in table.columns]
    shown = [[row.cells[titles.index(name)].text for name in ("job", "eval macro_f1", "eval loss", "perplexity")]
             for row in table.rows]  # fmt: skip
    assert shown[:3] == [["base of 2, 3", "0.0200", "0.6900", ""], ["base of 0, 1", "0.3100", "3.5000", "33.12"],
                         ["2", "0.9000", "0.5000", ""]]  # fmt: skip
    report.write(folder, pictures=False)
    written = json.loads((folder / "report.json").read_text())
    assert written["best_job"] == "2" and written["leaderboards"][0]["base_value"] is None
    page = (folder / "report.html").read_text()
    assert "base 0.0200" in page and "base 0.6900" in page  # of the best job
    assert page.count("Step 0 is the base; with a head, its random start.") == 1


def test_jobs_on_other_rows_are_not_compared_by_a_metric(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path, ["data.max_rows=10,20", "train.best_metric=macro_f1"])
    for number, rows in enumerate(("a", "b")):
        settings = {"data.max_rows": 10 * number + 10, "train.best_metric": "macro_f1"}
        job(folder, number, [], settings, loss=2.0, result=result(0.5, rows))
    assert len(leaderboard.rank(results.read(folder)).boards) == 2


def test_jobs_of_different_metrics_are_ranked_by_the_loss(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path, ["train.best_metric=macro_f1,loss"])
    job(folder, 0, [], {"train.best_metric": "macro_f1"}, loss=2.5, result=result(0.9))
    job(folder, 1, [], {"train.best_metric": "loss"}, loss=2.0, result={"best_metric": "loss"})
    ranking = leaderboard.rank(results.read(folder))
    assert ranking.metric == "loss" and [one.name for one in ranking.boards[0].ranked] == ["1", "0"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train.eval_metrics=[blue]"], 2, "train.eval_metrics: blue is not a metric; choose from accuracy"),
        (["train.best_metric=blue"], 2, "train.best_metric: blue is not a metric; choose from loss, accuracy"),
        (["data.eval_fraction=0"], 2, "train.eval_metrics and train.best_metric need eval rows"),
        (["data.format=text", "data.prompt=null", "data.answer=null", "data.labels=null"], 4, "are plain text"),
        (["data.labels=null", "data.answer='{label} {text}'"], 4, "log_loss needs labels, and the training rows have"),
        (["data.labels=[0,1,2]", "train.best_metric=auroc"], 4, "auroc needs rows of two labels, and there are 3"),
    ],
)
def test_metrics_that_the_rows_cannot_have_are_refused_before_the_base_is_loaded(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    labelled_rows(tmp_path / "rows.csv", rows=200)
    given = [word for word in inputs(whole) if not word.startswith(("data.labels", "data.path"))]
    words = [*given, LABELS, *words] if not any(w.startswith("data.labels") for w in words) else [*given, *words]
    assert call("check", *words, f"data.path={tmp_path / 'rows.csv'}") == code
    assert message in capsys.readouterr().err


def test_check_shows_the_labels_and_warns_of_those_without_rows(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in inputs(whole) if not word.startswith(("data.labels", "train.max_new_tokens"))]
    labels = "data.labels={0: negative, 1: positive, 2: mixed}"
    assert call("check", *words, "train.eval_metrics=[macro_f1]", "train.max_new_tokens=5", labels) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "mixed: 0" in output and "no training row has the label mixed, which data.labels names" in output
    assert "train.max_new_tokens has no effect: train.eval_metrics names no metric of generated answers" in output
