"""lora-ft eval: the choice of rows, base against adapter, and the files it writes."""

import json
import math
from pathlib import Path

import pytest
from finished import QUESTIONS, adapted, call, finished_run, rows_file, saved_run, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TURN, tiny_folder, tiny_model

from lora_ft import config, runs, validation
from lora_ft.adapters import loading
from lora_ft.data.dataset import prepare
from lora_ft.evaluation import classification
from lora_ft.evaluation.loss import eval_loss
from lora_ft.models.acceleration import accelerate
from lora_ft.models.load import load_base
from lora_ft.objectives.sft import Sft

LABELS = [(f"Is {n} even?", "yes" if n % 2 == 0 else "no") for n in range(24)]


def test_eval_reports_the_losses_of_base_and_adapter_on_the_runs_eval_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path, "llama")
    run = saved_run(tmp_path / "run", cfg)
    assert call("eval", f"run={run}") == 0
    found = json.loads((run / "eval.json").read_text())

    base, _ = adapted(cfg)
    bare = load_base(cfg.model, cfg.quant, "cpu")
    dataset = prepare(cfg.data, bare.tokenizer)
    for name, network in (("base", bare.model), ("adapter", base.model)):
        expected = eval_loss(network, Sft().loss, dataset.eval, accelerate(network, config.Fast()).paths, 1024)
        assert found[name]["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert found[name]["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-5)
    assert found["base"]["loss"] != found["adapter"]["loss"]
    assert found["tokens"] == sum(int(row.supervised.sum()) for row in dataset.eval)
    assert found["rows"] == len(dataset.eval)
    assert found["data_sha256"] == dataset.report.sha256
    assert {s["question"] for s in found["samples"]} <= {q for q, _ in QUESTIONS}
    output = capsys.readouterr().out
    assert f"{found['adapter']['loss']:.4f}" in output and found["samples"][0]["question"] in output


def test_metrics_use_all_rows_and_samples_some(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "gpt2")
    rows_file(tmp_path, LABELS)
    run = saved_run(tmp_path / "run", cfg)
    words = ["eval.metrics=[exact_match,accuracy,rouge_l]", "eval.samples=1", "eval.max_new_tokens=4", "eval.rows=6"]
    assert call("eval", f"run={run}", *words) == 0
    found = json.loads((run / "eval.json").read_text())
    assert (found["rows"], len(found["samples"])) == (6, 1)
    for side in ("base", "adapter"):
        assert found[side].keys() == {"loss", "perplexity", "exact_match", "rouge_l", *classification.METRICS}
        assert 0 <= found[side]["accuracy"] <= 1


def test_other_rows_than_the_runs_own_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("eval", f"run={run}", "eval.samples=0") == 0
    assert caplog.text == ""
    assert call("eval", f"run={run}", "eval.samples=0", "data.eval_fraction=0.9") == 0
    assert "are not the run's own" in caplog.text


OTHERS = [(f"How many legs do {n} spiders have?", f"{8 * n}.") for n in range(2, 9)]


def file_of(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    return rows_file(path.parent, pairs).rename(path)


@pytest.mark.parametrize(
    "words",
    [["data.path={}"], ["data=completion", "data.eval_path={}"]],
)
def test_a_given_file_is_evaluated_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, words: list[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    test = file_of(tmp_path / "other" / "test.jsonl", OTHERS)
    assert call("eval", f"run={run}", "eval.samples=0", *(word.format(test) for word in words)) == 0
    assert json.loads((run / "eval.json").read_text())["rows"] == len(OTHERS)
    assert "all rows of" in capsys.readouterr().out
    assert caplog.text == "", "no row is a training row, so there is no warning"


def test_a_folder_with_splits_is_evaluated_on_validation_files_or_a_chosen_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.data.path = str(tmp_path / "splits")
    for name, pairs in (("train", LABELS), ("val", OTHERS[:3]), ("test", OTHERS[3:5])):
        file_of(tmp_path / "splits" / f"{name}.jsonl", pairs)
    run = saved_run(tmp_path / "run", cfg)
    eval_path = f"data.eval_path={tmp_path / 'splits'}"
    for words, rows, text in (
        ([], 3, "all rows of validation"),
        (["data.split=test"], 2, "all rows of"),
        (["data=completion", eval_path, "data.eval_split=test"], 2, "all rows of"),
    ):
        assert call("eval", f"run={run}", "eval.samples=0", *words) == 0
        assert json.loads((run / "eval.json").read_text())["rows"] == rows
        assert text in " ".join(capsys.readouterr().out.split())


def test_limits_of_the_runs_rows_do_not_apply_to_other_rows(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    extra = file_of(tmp_path / "extra" / "eval_rows.jsonl", LABELS[:2])
    cfg.data.max_rows, cfg.data.eval_path = 3, str(extra)
    run = saved_run(tmp_path / "run", cfg)
    test = file_of(tmp_path / "other" / "test.jsonl", OTHERS)
    for words, rows in (([], 2), ([f"data.path={test}"], len(OTHERS)), ([f"data.path={test}", "data.max_rows=4"], 4)):
        assert call("eval", f"run={run}", "eval.samples=0", *words) == 0
        assert json.loads((run / "eval.json").read_text())["rows"] == rows


def trained_and_eval(tmp_path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    cfg = settings(tmp_path, "llama")
    dataset = prepare(cfg.data, load_base(cfg.model, cfg.quant, "cpu").tokenizer)
    lines = [[int(row.source.rpartition(":")[2]) - 1 for row in side] for side in (dataset.train, dataset.eval)]
    return [QUESTIONS[i] for i in lines[0]], [QUESTIONS[i] for i in lines[1]]


def test_training_rows_of_the_run_are_refused_and_its_eval_rows_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    trained, eval_rows = trained_and_eval(tmp_path)
    question, answer = trained[0]
    test = file_of(tmp_path / "other" / "test.jsonl", [*OTHERS, (question.upper(), answer)])
    assert call("eval", f"run={run}", "data=completion", f"data.path={test}") == 4
    error = capsys.readouterr().err
    assert f"{test}:{len(OTHERS) + 1} is also {tmp_path}/rows.jsonl:" in error
    file_of(test, [*OTHERS, *eval_rows])
    assert call("eval", f"run={run}", "eval.samples=0", "data=completion", f"data.path={test}") == 0


def test_a_given_eval_fraction_applies_to_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    test = file_of(tmp_path / "other" / "test.jsonl", OTHERS)
    words = ["eval.samples=0", "data=completion", f"data.path={test}", "data.eval_fraction=0.1"]
    assert call("eval", f"run={run}", *words) == 0
    assert json.loads((run / "eval.json").read_text())["rows"] < len(OTHERS)
    assert "data.eval_fraction=0.1" in " ".join(capsys.readouterr().out.split())


def test_other_rows_are_evaluated_with_a_warning_if_the_runs_rows_are_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(tmp_path, "llama")
    test = file_of(tmp_path / "other" / "test.jsonl", OTHERS)
    (tmp_path / "rows.jsonl").unlink()
    assert call("eval", f"run={run}", "eval.samples=0", "data=completion", f"data.path={test}") == 0
    assert "cannot read the run's own rows" in caplog.text and "are not the run's own" in caplog.text


def test_labels_come_from_the_runs_training_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "gpt2")
    rows_file(tmp_path, LABELS)
    run = saved_run(tmp_path / "run", cfg)
    test = file_of(tmp_path / "other" / "test.jsonl", [(f"Is {n} even?", "perhaps") for n in range(24, 30)])
    words = ["eval.metrics=[accuracy]", "eval.samples=0", "data=completion", f"data.path={test}"]
    assert call("eval", f"run={run}", *words) == 4
    assert " has the answer perhaps, which no training row has: data.labels can name" in capsys.readouterr().err
    file_of(test, [(f"Is {n} even?", "yes") for n in range(24, 30)])
    assert call("eval", f"run={run}", *words) == 0
    found = json.loads((run / "eval.json").read_text())
    assert [c["label"] for c in found["classification"]["adapter"]["classes"]] == ["no", "yes"]
    assert found["classification"]["adapter"]["classes"][1]["support"] == 6


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["eval.metrics=[blue]"], 2, "eval.metrics: blue is not a metric; choose from accuracy"),
        (["data.eval_fraction=0"], 4, "there are no eval rows"),
        (["quant.kind=nf4"], 5, "quantization: trained on"),
        (["run=nowhere"], 2, "nowhere"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    run = finished_run(tmp_path, "llama")
    assert call("eval", *([] if "run" in words[0] else [f"run={run}"]), *words) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (run / "eval.json").exists()


def test_a_metric_over_labels_is_refused_for_free_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "llama")
    rows_file(tmp_path, [(f"Say {n}.", f"I say {n}.") for n in range(90)])
    run = saved_run(tmp_path / "run", cfg)
    assert call("eval", f"run={run}", "eval.metrics=[macro_f1]", "eval.rows=1", "eval.samples=0") == 4
    assert "macro_f1 needs labels, and the training rows have too many distinct answers" in capsys.readouterr().err


def test_an_infinite_perplexity_is_null_in_json(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    weights = Path(cfg.model.path) / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, weights, metadata={"format": "pt"})
    run = saved_run(tmp_path / "run", cfg)
    assert call("eval", f"run={run}", "eval.samples=0") == 0
    found = json.loads((run / "eval.json").read_text())
    assert found["base"]["loss"] > 710 and found["base"]["perplexity"] is None


def test_eval_uses_the_adapters_own_tokenizer_and_template(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    template = tmp_path / "llama" / "chat_template.jinja"
    template.write_text(template.read_text().replace(TURN, f"{TURN}{TURN}"))
    tokenizer = loading.adapter_tokenizer(run / "adapter", config.Model(path=str(tmp_path / "llama")))
    assert TURN * 2 not in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert call("eval", f"run={run}", "eval.samples=0") == 0


def foreign_adapter(tmp_path: Path, **options: object) -> Path:
    """Save an adapter with PEFT only: no lora_ft.json, no tokenizer."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], **options))
    model.peft_config["default"].base_model_name_or_path = "somebody/elses-llama"
    model.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)  # else PEFT asks the hub
    return tmp_path / "foreign"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_foreign_adapter_is_evaluated_with_a_warning_about_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    adapter, base = foreign_adapter(tmp_path), tiny_folder(tmp_path, "llama")
    words = [
        f"adapter_path={adapter}",
        f"model.path={base}",
        f"data.path={rows_file(tmp_path)}",
        "data.eval_fraction=0.5",
    ]
    assert call("eval", *words) == 0
    assert "eval loss" in capsys.readouterr().out
    assert "the adapter names the base somebody/elses-llama" in caplog.text
    assert not list(tmp_path.rglob("eval.json"))


@pytest.mark.closes("D08")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    ("options", "message"),
    [({"bias": "all"}, "bias=all"), ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa")],
)
def test_an_adapter_that_changes_its_base_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str], message: str
) -> None:
    adapter, base = foreign_adapter(tmp_path, **options), tiny_folder(tmp_path, "llama")
    rows = rows_file(tmp_path)
    assert (
        call("eval", f"adapter_path={adapter}", f"model.path={base}", f"data.path={rows}", "data.eval_fraction=0.5")
        == 5
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "code", "message"),
    [
        ("./nowhere", 2, "there is no such folder, and it is not a hub id"),
        ("a/b/c", 2, "there is no such folder, and it is not a hub id"),
        ("owner/name", 7, "adapter_path=owner/name is not on this machine and the hub cannot be reached"),
    ],
)
def test_a_missing_adapter_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = tiny_folder(tmp_path, "llama")
    assert call("eval", f"adapter_path={adapter}", f"model.path={base}", f"data.path={rows_file(tmp_path)}") == code
    assert message in capsys.readouterr().err


def test_an_unfinished_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.create(tmp_path / "run", validation.to_plain(settings(tmp_path, "llama")), [])
    assert call("eval", f"run={tmp_path / 'run'}") == 2
    assert "has no adapter: the run did not finish" in capsys.readouterr().err
