"""The objective `classification`: the numbers of a plain PEFT loop, files for PEFT and transformers, clear errors."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import call, saved_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from states import state_on, trained
from tiny import MIXTURES, SENTENCES, VOCABULARY, tiny_classifier, tiny_folder, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_ft
from lora_ft import config, runs
from lora_ft.classes import Classes
from lora_ft.data.packing import micro_batches
from lora_ft.data.read import read
from lora_ft.data.rows import Example
from lora_ft.export import verify
from lora_ft.models.acceleration import accelerate
from lora_ft.objectives.classification import Classification
from lora_ft.ops.class_logits import class_logits
from lora_ft.ops.token_loss import PLAIN_PATHS
from lora_ft.training import checkpoint
from lora_ft.training.state import TrainingState

PAD = 3
HEADED_MIXTURES = [name for name in MIXTURES if "granite" not in name]  # transformers has no classifier of these
ONE = Classes(("bad", "good", "so so"), counts=(4, 2, 6), rows=12)
SEVERAL = Classes(("a", "b", "c", "d"), is_multi=True, counts=(6, 3, 2, 1), rows=12)
WORDS = [word for sentence in SENTENCES for word in sentence.split()]
LABELS = ("bad", "good", "so so")


def documents(classes: Classes, number: int = 12, seed: int = 0) -> list[Example]:
    """Return texts of random ids with their classes: one each, or for multi-label from none to all."""
    generator = np.random.default_rng(seed)
    made = []
    for row in range(number):
        text = generator.integers(4, VOCABULARY, int(generator.integers(2, 30)))
        found = np.flatnonzero(generator.random(len(classes.names)) < 0.4) if classes.is_multi else [row % 3]
        labels = list(found) or [len(classes.names)]
        ids = np.array([*text, *labels], dtype=np.int32)
        made.append(Example(ids, np.arange(len(ids)) >= len(text), f"rows:{row + 1}", row, prompt_end=len(text)))
    return made


def state_of(
    folder: Path, family: str, classes: Classes, *, fast: bool = True, steps: int = 50, **objective: Any
) -> TrainingState:
    train = {name: objective.pop(name) for name in ("tokens_per_microbatch", "packing") if name in objective}
    return state_on(
        tiny_classifier(family, classes, dtype=torch.float64),
        folder,
        examples=documents(classes),
        eval_examples=documents(classes, 5, seed=1),
        fast=fast,
        classes=classes,
        objective=config.Objective("classification", multi_label=classes.is_multi, **objective),
        train=config.Train(max_steps=steps, tokens_per_step=90, **train),
    )


def plain_loop(state: TrainingState, family: str, classes: Classes) -> Tensor:
    """Train the same texts with PEFT, torch and transformers' own class: a padded batch a step, the mean over it."""
    settings = state.cfg.adapter
    model = get_peft_model(
        tiny_classifier(family, classes, dtype=torch.float64),
        LoraConfig(
            r=settings.r, lora_alpha=settings.lora_alpha, task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2",
            target_modules=sorted(state.model.peft_config["default"].target_modules),
        ),
    ).eval()  # fmt: skip
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == state.start.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.start[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=state.cfg.optim.lr, weight_decay=0.0)
    objective = state.cfg.objective
    weights = classes.weights(objective.class_weights, balanced=objective.balanced)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    for step in state.steps:
        batch = [state.examples[i] for i in step]
        texts = [torch.from_numpy(e.ids[: e.prompt_end].astype(np.int64)) for e in batch]
        ids = pad_sequence(texts, batch_first=True, padding_value=PAD)
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        if classes.is_multi:
            targets = torch.zeros(len(batch), len(classes.names) + 1, dtype=torch.float64)
            for row, example in enumerate(batch):
                targets[row, example.ids[example.prompt_end :]] = 1.0
            smooth = targets[:, :-1] * (1 - objective.label_smoothing) + objective.label_smoothing / 2
            loss = (
                binary_cross_entropy_with_logits(logits, smooth, pos_weight=weight, reduction="sum") / smooth.shape[1]
            )
        else:
            targets = torch.tensor([int(e.ids[-1]) for e in batch])
            smoothing = objective.label_smoothing
            loss = cross_entropy(logits, targets, weight, label_smoothing=smoothing, reduction="sum")
        optimizer.zero_grad()
        loss.backward()  # divided afterwards: llama's norms round gradients to float32
        for parameter in parameters.values():
            parameter.grad /= len(batch)
        optimizer.step()
    return torch.cat([p.detach().flatten() for _, p in sorted(parameters.items())])


STEADY = config.Optim(lr=1e-3, schedule=config.Schedule.constant, max_grad_norm=0.0)
CASES = [
    ("llama", ONE, {"tokens_per_microbatch": 40, "label_smoothing": 0.1}),
    ("qwen3", ONE, {"class_weights": {"good": 3.0}}),
    ("gpt2", SEVERAL, {"balanced": True, "label_smoothing": 0.2, "tokens_per_microbatch": 50}),
    pytest.param("llama", ONE, {}, marks=pytest.mark.nightly),
    pytest.param("gpt2", ONE, {"balanced": True}, marks=pytest.mark.nightly),
    pytest.param("qwen3", SEVERAL, {"packing": False, "steps": 10}, marks=pytest.mark.nightly),
    ("llama", SEVERAL, {"fast": False, "steps": 5}),
]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("family", "classes", "options"), CASES, ids=str)
def test_a_classifier_matches_a_plain_peft_loop(
    family: str, classes: Classes, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(state_on.__globals__["SETTINGS"], "optim", STEADY)
    state = state_of(tmp_path, family, classes, **options)
    assert state.paths.packs and state.paths.supervised_rows_only == options.get("fast", True)
    found = trained(state)
    expected = plain_loop(state, family, classes)
    start = torch.cat([p.flatten() for _, p in sorted(state.start.items())])
    assert (found - expected).norm() < 1e-6 * (expected - start).norm()
    lines = runs.read_metrics(tmp_path)
    assert {0, options.get("steps", 50)} == {line["step"] for line in lines if "eval_accuracy" in line}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", *HEADED_MIXTURES])
def test_packed_documents_have_the_logits_of_the_plain_class(family: str) -> None:
    dtype = torch.float32 if family in MIXTURES else torch.float64  # torch has no grouped products in float64
    model = tiny_classifier(family, ONE, dtype=dtype)
    examples = documents(ONE, 6)
    made = accelerate(model, config.Fast())
    batches = micro_batches(examples, None, made.paths.share_a_pass)
    with torch.no_grad():
        found = torch.cat([class_logits(model, batch, made.paths) for batch in batches])
        made.restore()
        plain = torch.cat([class_logits(model, batch, PLAIN_PATHS) for batch in batches])
        own = [model(input_ids=batch.ids[None, s : e - 1]).logits for batch in batches
               for s, e in zip(batch.starts, batch.starts[1:], strict=False)]  # fmt: skip
    torch.testing.assert_close(plain, torch.cat(own), rtol=0, atol=0)
    rounding = 1e-4 if family in MIXTURES else 1e-6
    assert (found - plain).norm() <= rounding * plain.norm()


def test_a_resumed_classifier_has_the_same_bytes(tmp_path: Path) -> None:
    whole = trained(state_of(tmp_path / "whole", "llama", ONE, steps=8))
    first = state_of(tmp_path / "parts", "llama", ONE, steps=8)
    trained(first, until=3)
    checkpoint.save(first)
    again = state_of(tmp_path / "parts", "llama", ONE, steps=8)
    checkpoint.resume(again)
    assert again.step == 3
    assert torch.equal(trained(again), whole)


def rows_file(path: Path, number: int = 36, label: Any = lambda n: LABELS[n % 3], seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(generator.choice(WORDS, 3 + n % 9)) + f" {LABELS[n % 3]} {n}", "label": label(n)}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def words_of(tmp_path: Path, family: str = "llama", **options: Any) -> list[str]:
    """Return the overrides of a short run on a tiny base and labelled rows."""
    base = tmp_path / family if (tmp_path / family).is_dir() else tiny_folder(tmp_path, family)
    rows = tmp_path / "rows.jsonl" if (tmp_path / "rows.jsonl").is_file() else rows_file(tmp_path / "rows.jsonl")
    given = {
        "model": "local", "model.path": base, "data": "classify", "data.path": rows, "data.eval_fraction": 0.3,
        "objective": "classification", "adapter.r": 4, "adapter.lora_alpha": 8, "optim.lr": 3e-3,
        "train.max_steps": 6, "train.tokens_per_step": 150, "hydra.run.dir": tmp_path / "run",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (given | options).items()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows and `run`, a trained classifier; no test changes it."""
    folder = tmp_path_factory.mktemp("prepared")
    assert call("train", *words_of(folder, **{"train.max_steps": 15})) == 0
    return folder


TEXTS = ["The fox is good", "a tree", "What is close to pi? so so"]


def logits_of(model: Any, tokenizer: Any, device: str = "cpu") -> Tensor:
    """Return the logits of a padded batch and of each text alone, which are the same rows."""
    found = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
        alone = [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits for text in TEXTS]
    return torch.cat([together, *alone]).double()


IMPORTS = (
    "import torch\nfrom peft import PeftModel\n"
    "from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig\n"
)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"model.dtype": "bfloat16"}),
        ("qwen3", {"quant": "nf4"}),
        pytest.param("llama", {}, marks=pytest.mark.nightly),
        pytest.param("llama", {"quant": "int8", "model.dtype": "bfloat16"}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_peft_and_transformers_alone_load_a_trained_classifier(
    family: str, options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("train", *words_of(tmp_path, family, **options)) == 0
    printed = capfd.readouterr().out
    ours, tokenizer = lora_ft.load(tmp_path / "run", device="cpu")
    lines = printed[printed.index("base = AutoModelForSequenceClassification") :]
    names: dict[str, Any] = {}
    exec(IMPORTS + lines, names)  # noqa: S102  (the lines that train prints)
    alone = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    with verify.exact_products(verify.linear_layers(ours.get_base_model())[0]):
        expected = logits_of(ours, tokenizer)
    plain = names["model"].eval()
    with verify.exact_products(verify.linear_layers(plain.get_base_model())[0]):  # bitsandbytes' own kernels round
        found = logits_of(plain, alone)
    assert isinstance(ours, PeftModel) and ours.peft_config["default"].task_type == "SEQ_CLS"
    rounding = 2e-2 if "model.dtype" in options else 1e-5
    assert (found - expected).norm() <= rounding * expected.norm()
    assert ours.get_base_model().config.id2label == dict(enumerate(LABELS))
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    head = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    record = json.loads((tmp_path / "run" / "adapter" / "lora_ft.json").read_text())["classifier"]
    assert record["id2label"] == {"0": "bad", "1": "good", "2": "so so"}
    assert record["input"] == "tokenizer(text)" and sum(record["counts"]) == record["rows"]

    assert call("merge", f"run={tmp_path / 'run'}", f"out={tmp_path / 'merged'}", "base_weights=dequantized") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.architectures == [type(merged).__name__]
    assert merged.config.id2label == dict(enumerate(LABELS))
    distance = (logits_of(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")) - expected).norm()
    assert distance <= (5e-2 if options else 1e-5) * expected.norm()


def test_eval_compares_a_classifier_with_the_class_frequencies(
    prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", f"run={prepared / 'run'}") == 0
    shown = capfd.readouterr().out
    assert "majority" in shown and "nats per row" in shown and "perplexity" not in shown
    found = json.loads((prepared / "run" / "eval.json").read_text())
    result = json.loads((prepared / "run" / "result.json").read_text())
    last = runs.read_metrics(prepared / "run")[-1]
    assert found["adapter"]["loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert found["adapter"]["accuracy"] == pytest.approx(last["eval_accuracy"])
    assert found["classification"]["adapter"] == result["classification"]
    counts = np.array(json.loads((prepared / "run/adapter/lora_ft.json").read_text())["classifier"]["counts"]) + 1
    support = [each["support"] for each in found["classification"]["adapter"]["classes"]]
    expected = -np.average(np.log(counts / counts.sum()), weights=support)
    assert found["base"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert call("eval", f"run={prepared / 'run'}", "eval.metrics=[chrf]") == 4
    # Without the run, the adapter's own record names the classes.
    by_path = [f"adapter_path={prepared / 'run' / 'adapter'}", "data=classify", f"data.path={prepared / 'rows.jsonl'}",
               "data.eval_fraction=0.3"]  # fmt: skip
    result = lora_ft.evaluate(prepared / "run" / "adapter", overrides=[*by_path[1:], "device=cpu"])
    assert result.comparison.adapter.loss == pytest.approx(found["adapter"]["loss"], rel=1e-6)


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
    found = predicted("plain.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2]
    for row, expected in zip(found, logits.softmax(1).tolist(), strict=True):
        assert [row[f"p_{name}"] for name in LABELS] == pytest.approx(expected, abs=1e-5)
        assert row["prediction"] == LABELS[int(np.argmax(expected))]
    assert call("eval", f"run={run}", "eval.calibrate=true", "eval.rows=12") == 0
    record = json.loads((run / "adapter" / "lora_ft.json").read_text())
    assert record["labels"] == list(LABELS)
    warm = (logits / record["calibration"]["temperature"]).softmax(1).tolist()
    for row, expected in zip(predicted("warm.jsonl"), warm, strict=True):
        assert [row[f"p_{name}"] for name in LABELS] == pytest.approx(expected, abs=1e-5)


def test_a_classifier_is_evaluated_on_the_rows_of_a_language_model(prepared: Path, tmp_path: Path) -> None:
    """Both objectives choose the same eval rows, so that a sweep may compare them."""
    words = words_of(prepared, **{"objective": "sft", "train.max_steps": 1, "hydra.run.dir": tmp_path / "words"})
    assert call("train", *words, "train.samples=0") == 0
    ours, theirs = (
        json.loads((folder / "result.json").read_text()) for folder in (prepared / "run", tmp_path / "words")
    )
    assert ours["eval_rows_sha256"] == theirs["eval_rows_sha256"]
    support = [[each["support"] for each in result["classification"]["classes"]] for result in (ours, theirs)]
    assert support[0] == support[1]


def test_a_metric_of_the_head_chooses_the_best_state(prepared: Path, tmp_path: Path) -> None:
    words = words_of(prepared, **{"train.max_steps": 8, "hydra.run.dir": tmp_path / "run", "train.keep": "best"})
    assert call("train", *words, "train.eval_every_steps=2", "train.best_metric=macro_f1") == 0
    lines = [line for line in runs.read_metrics(tmp_path / "run") if "eval_macro_f1" in line]
    best = max(lines, key=lambda line: line["eval_macro_f1"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_step"], result["best_value"]) == (best["step"], best["eval_macro_f1"])
    assert result["metrics"]["macro_f1"] == pytest.approx(best["eval_macro_f1"])
    assert call("check", *words, "train.eval_metrics=[auroc]") == 4  # three classes


def test_multi_label_rows_are_read_as_lists_or_json_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def as_list(n: int) -> list[str]:
        return [name for i, name in enumerate(LABELS) if n % (i + 2) == 0]

    rows_file(tmp_path / "lists.jsonl", label=as_list)
    rows_file(tmp_path / "texts.jsonl", label=lambda n: json.dumps(as_list(n)) if n % 5 else "good")
    for name in ("lists", "texts"):
        words = words_of(tmp_path, **{
            "data.path": tmp_path / f"{name}.jsonl", "hydra.run.dir": tmp_path / name, "objective.multi_label": "true",
        })  # fmt: skip
        assert call("train", *words) == 0
        record = json.loads((tmp_path / name / "adapter" / "lora_ft.json").read_text())["classifier"]
        assert record["problem_type"] == "multi_label_classification" and list(record["label2id"]) == sorted(LABELS)
        assert call("eval", f"run={tmp_path / name}") == 0
        found = json.loads((tmp_path / name / "eval.json").read_text())["classification"]["adapter"]
        assert found["confusion"] is None and 0 <= found["metrics"]["micro_f1"] <= 1
    new = f"predict={tmp_path / 'texts.jsonl'}"
    assert call("eval", f"run={tmp_path / 'lists'}", new, f"out={tmp_path / 'p.jsonl'}") == 0
    for row in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()):
        assert row["prediction"] == [name for name in sorted(LABELS) if row[f"p_{name}"] >= 0.5]
    check = json.loads((tmp_path / "lists" / "check.json").read_text())
    assert check["rows"]["converted"] == {"lists in the answer, written as JSON text": 36}
    model, _ = lora_ft.load(tmp_path / "lists", device="cpu")
    assert model.get_base_model().config.problem_type == "multi_label_classification"
    assert call("merge", f"run={tmp_path / 'lists'}", f"out={tmp_path / 'merged'}") == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.problem_type == "multi_label_classification"


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


BAD_LABELS = [
    (lambda n: None if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: is missing or null"),
    (lambda n: " " if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: is empty"),
    (lambda n: {"a": 1} if n == 4 else LABELS[n % 3], "rows.jsonl:5: label: must be text or a number, got dict"),
    (lambda n: "good", "a classifier needs two labels or more, and the training rows have only 'good'"),
]


@pytest.mark.parametrize(("label", "message"), BAD_LABELS, ids=range(4))
def test_bad_labels_are_named(label: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows_file(tmp_path / "rows.jsonl", label=label)
    assert call("check", *words_of(tmp_path)) == 4
    assert message in " ".join(capfd.readouterr().err.split())


def test_an_eval_label_that_no_training_row_has_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows_file(tmp_path / "test.jsonl", 5, label=lambda n: "great" if n == 2 else "good", seed=1)
    words = words_of(tmp_path, **{"data.eval_path": tmp_path / "test.jsonl"})
    assert call("check", *words) == 4
    error = " ".join(capfd.readouterr().err.split())
    assert "test.jsonl:3: label: great is not a label of the training rows (bad, good, so so)" in error


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


def test_settings_without_effect_are_named(prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("check", *words_of(prepared), "train.samples=1", "data.train_on=all") == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "train.samples has no effect: a classifier writes no answers" in shown
    assert "data.train_on has no effect: a classifier learns the label" in shown
    assert call("check", *words_of(prepared, **{"objective": "sft"}), "objective.balanced=true") == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "objective.balanced has no effect: it is for objective=classification" in shown


def test_settings_that_a_head_cannot_follow_are_refused(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("data.system=Be short.",): "data.system: objective=classification reads the text alone",
        ("data.too_long=split",): "data.too_long=split: a part of a text has no label",
        ("objective.class_weights={great: 2}",): "objective.class_weights names 'great', which is none of bad, good",
        ("objective.class_weights={good: -1}",): "the weight of 'good' must be above 0, got -1",
        ("objective.class_weights={good: 2}", "objective.balanced=true"): "give one of them",
        ("objective.label_smoothing=1",): "objective.label_smoothing must be below 1, got 1",
    }
    for words, message in cases.items():
        assert call("check", *words_of(prepared), *words) == 2
        assert message in " ".join(capfd.readouterr().err.split())
    chats = tmp_path / "chats.jsonl"
    made = [[{"role": role, "content": f"{role} {n}"} for role in ("system", "user", "assistant")] for n in range(3)]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in made))
    assert call("check", *words_of(prepared, **{"data": "chat", "data.path": chats})) == 4
    assert (
        "must be a text and its label (data=classify: columns text and label), and is a chat of 3"
        in capfd.readouterr().err
    )


def test_the_ids_are_those_of_the_tokenizer_alone_and_check_shows_the_labels(
    prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("check", *words_of(prepared)) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "⟦so so⟧" in shown and "examined equal tokenizer(text) at inference" in shown and "stop token" not in shown
    data = config.Data(path=str(prepared / "rows.jsonl"), prompt="Judge: {text}\n\nWhich label?", answer="{label}")
    rows, tokenizer = read(data), tiny_tokenizer()
    tokenizer.pad_token = None
    examples = Classification(config.Objective("classification")).examples(rows, tokenizer, data)
    assert tokenizer.pad_token == tokenizer.eos_token
    for line, example in zip((prepared / "rows.jsonl").read_text().splitlines(), examples, strict=True):
        row = json.loads(line)
        assert example.ids.tolist() == [*tokenizer(row["text"])["input_ids"], LABELS.index(row["label"])]
        assert example.supervised.tolist() == [False] * (len(example.ids) - 1) + [True]


def test_plan_and_check_know_the_size_of_the_head(prepared: Path) -> None:
    words = words_of(prepared, **{"train.max_steps": 15})
    result = json.loads((prepared / "run" / "result.json").read_text())
    checked = json.loads((prepared / "run" / "check.json").read_text())
    assert checked["layers"]["trainable"] == result["trainable_parameters"]
    planned = lora_ft.plan(lora_ft.compose("train", [*words[:-1], "device=cpu"]))
    assert planned.prediction.trace.num_trainable == result["trainable_parameters"]
    adapter = prepared / "run" / "adapter" / "adapter_model.safetensors"
    assert planned.storage.adapter_file_bytes == adapter.stat().st_size
    without = lora_ft.plan(lora_ft.compose("plan", ["model=local", f"model.path={prepared / 'llama'}",
                                                    "objective=classification", "device=cpu"]))  # fmt: skip
    assert without.prediction.workload.assumed.endswith("and 2 classes")


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
