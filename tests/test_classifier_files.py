"""PEFT and transformers alone load what a classifier writes: its adapter, and its merged model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import LABELS, logits_of, rows_file, words_of
from finished import call
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_ft
from lora_ft.export import verify

IMPORTS = (
    "import torch\nfrom peft import PeftModel\n"
    "from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig\n"
)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"quant": "nf4"}),
        pytest.param("gpt2", {"model.dtype": "bfloat16"}, marks=pytest.mark.nightly),
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


def test_multi_label_rows_are_read_as_lists_or_json_text(tmp_path: Path) -> None:
    def as_list(n: int) -> list[str]:
        return [name for i, name in enumerate(LABELS) if n % (i + 2) == 0]

    rows_file(
        tmp_path / "rows.jsonl", label=lambda n: as_list(n) if n % 2 else json.dumps(as_list(n)) if n % 5 else "good"
    )
    run = tmp_path / "run"
    assert call("train", *words_of(tmp_path, **{"objective.multi_label": "true", "train.max_steps": 3})) == 0
    record = json.loads((run / "adapter" / "lora_ft.json").read_text())["classifier"]
    assert record["problem_type"] == "multi_label_classification" and list(record["label2id"]) == sorted(LABELS)
    check = json.loads((run / "check.json").read_text())
    assert check["rows"]["converted"] == {"lists in the answer, written as JSON text": 18}
    found = json.loads((run / "result.json").read_text())["classification"]
    assert found["confusion"] is None and 0 <= found["metrics"]["micro_f1"] <= 1
    assert call("eval", f"run={run}", f"predict={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'p.jsonl'}") == 0
    for row in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()):
        assert row["prediction"] == [name for name in sorted(LABELS) if row[f"p_{name}"] >= 0.5]
    assert call("merge", f"run={run}", f"out={tmp_path / 'merged'}") == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.problem_type == "multi_label_classification"
    assert plain.config.id2label == dict(enumerate(sorted(LABELS)))
    ours, tokenizer = lora_ft.load(run, device="cpu")
    expected = logits_of(ours, tokenizer)
    found = logits_of(plain, AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.nightly
@pytest.mark.parametrize("options", [{"model.dtype": "bfloat16"}, {"quant": "nf4"}, {}], ids=str)
def test_a_merged_classifier_has_the_logits_of_the_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    assert call("train", *words_of(tmp_path, "gpt2", **options)) == 0
    ours, tokenizer = lora_ft.load(tmp_path / "run", device="cpu")
    with verify.exact_products(verify.linear_layers(ours.get_base_model())[0]):
        expected = logits_of(ours, tokenizer)
    assert call("merge", f"run={tmp_path / 'run'}", f"out={tmp_path / 'merged'}", "base_weights=dequantized") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.architectures == [type(merged).__name__]
    assert merged.config.id2label == dict(enumerate(LABELS))
    distance = (logits_of(merged, AutoTokenizer.from_pretrained(tmp_path / "merged")) - expected).norm()
    assert distance <= (5e-2 if options else 1e-5) * expected.norm()
