"""The model card: valid front matter, the facts of the adapter, and no markup from names."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished import finished_run
from huggingface_hub import ModelCard, ModelCardData

from lora_ft import config
from lora_ft.adapters import peft_folder, provenance
from lora_ft.errors import ConfigError
from lora_ft.io import durable
from lora_ft.publishing import card, compatibility, curve, training_summary
from lora_ft.publishing.adapter_facts import Level
from lora_ft.publishing.training_summary import TrainingSummary
from lora_ft.publishing.verification import Verification

VERIFICATION = Verification(
    keys=28, outputs=14, zero_outputs=0, files=None, distance=3.4e-7, allowed=1e-5, effect=0.25, kernels=None,
    versions={"peft": "0.21.2", "torch": "2.13.0"},
)  # fmt: skip
LOADING = provenance.Loading("org/base", "a" * 40, "float32", {}, None, "cpu")
HOSTILE = "# Heading\n---\nlicense: evil\n---\n| a | b |\n</script>`code` ``` ![x](http://evil) <img src=x>\t\x1b[31m"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run"), "llama", use_rslora=True) / "adapter"


def subject(adapter: Path, facts: TrainingSummary | None = None, **values: Any) -> card.CardContents:
    config, record = (json.loads((adapter / name).read_text()) for name in (peft_folder.CONFIG, provenance.RECORD))
    found = card.CardContents(
        name="me/mine", config=config, record=record, loading=LOADING, license="mit", summary=facts,
        verdicts=compatibility.verdicts(adapter, None), files=frozenset(), verification=VERIFICATION,
    )  # fmt: skip
    return replace(found, **values)


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def summary(**values: Any) -> TrainingSummary:
    scores = training_summary.Scores(
        "by lora-ft eval", {"loss": 3.25, "perplexity": 25.8}, {"loss": 2.4, "perplexity": 11.02}, 99, 7
    )
    found = TrainingSummary(
        settings={"optim.lr": 0.001}, data="org/rows on the Hugging Face hub", dataset="org/rows", dataset_config=None,
        dataset_split="train", dataset_revision=None, rows=(90, 10), steps=40, tokens=4000, evaluations=[scores],
        merge=None, curves=([], []),
    )  # fmt: skip
    return replace(found, **values)


def test_front_matter_is_read_by_the_hubs_library(adapter: Path) -> None:
    text = card.render(subject(adapter, summary()))
    found = front(text)
    assert found["base_model"] == "org/base"
    assert found["base_model_relation"] == "adapter"
    assert (found["library_name"], found["pipeline_tag"], found["license"]) == ("peft", "text-generation", "mit")
    assert found["tags"] == ["base_model:adapter:org/base", "lora", "rslora", "transformers"]
    assert found["datasets"] == ["org/rows"]
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    assert data.eval_results is not None
    figures = {(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split) for r in data.eval_results}
    assert figures == {("loss", 2.4, "org/rows", "train"), ("perplexity", 11.02, "org/rows", "train")}
    assert yaml.safe_load(data.to_yaml()) == found, "written again, it is the same"


def test_curve_is_shown_if_there_is_one(adapter: Path) -> None:
    without = summary(evaluations=[])
    assert "## Results" not in card.render(subject(adapter, without))
    assert "![loss by step](loss.png)" in card.render(subject(adapter, without, files=frozenset({card.CURVE})))


def test_unknown_facts_are_omitted(adapter: Path) -> None:
    found = front(card.render(subject(adapter, summary(dataset=None, data="a local file (.jsonl)"), license=None)))
    assert found.keys().isdisjoint({"license", "datasets", "language"})
    assert "model-index" in found
    without = card.render(subject(adapter))
    assert front(without).keys().isdisjoint({"model-index", "datasets"})
    assert "## Results" not in without and "not trained with lora-ft" in without


def test_card_shows_results_settings_and_rows(adapter: Path) -> None:
    text = card.render(subject(adapter, summary(merge={"base_weights": "original", "original": {"loss": 2.41}})))
    assert "| `loss` | 3.2500 | 2.4000 |" in text
    assert "| `optim.lr` | `0.001` |" in text
    assert "90 for training and 10 for evaluation" in text
    assert "| `original.loss` | `2.41` |" in text
    assert "99 tokens of 7 rows" in text


@pytest.mark.parametrize("place", ["settings", "data", "metric", "base", "merge"])
def test_hostile_text_is_not_markup(adapter: Path, place: str) -> None:
    clean = subject(adapter, summary())
    scores = training_summary.Scores(HOSTILE, {HOSTILE: 1.0}, {HOSTILE: 2.0}, 9, None)
    hostile = {
        "settings": subject(adapter, summary(settings={"data.system": HOSTILE, HOSTILE: HOSTILE})),
        "data": subject(adapter, summary(data=HOSTILE)),
        "metric": subject(adapter, summary(evaluations=[replace(scores, when="by lora-ft eval")])),
        "base": subject(adapter, summary(), config=clean.config | {"target_modules": [HOSTILE]}),
        "merge": subject(adapter, summary(merge={HOSTILE: HOSTILE})),
    }[place]
    text = card.render(hostile)
    assert front(text).get("license") == "mit"
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in text
    assert not re.search(r"^# Heading", body, re.MULTILINE)
    # the hostile text is in code spans only: the run of backticks that opens a span closes it
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"```\w*\n.*?\n```", "", body, flags=re.DOTALL))
    for part in ("evil", "<img", "</script>", "Heading"):
        assert part not in outside, outside
    rows = [line for line in body.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(widths) <= {3, 4, 5}


def test_only_programs_that_can_load_it_have_code(adapter: Path) -> None:
    plain = subject(adapter, files=frozenset({"adapter.gguf", "mlx/adapters.safetensors"}))
    text = card.render(plain)
    assert all(f"With {name}:" in text for name in ("PEFT", "transformers", "vLLM", "llama.cpp", "MLX"))
    verdicts = [
        replace(v, level=Level.REFUSED) if v.program == "vLLM"
        else replace(v, level=Level.WARN) if v.program == "llama.cpp" else v
        for v in plain.verdicts
    ]  # fmt: skip
    other = card.render(replace(plain, verdicts=verdicts, files=frozenset()))
    assert "With vLLM:" not in other and "With MLX:" not in other


def test_vllm_command_has_the_rank_flag(adapter: Path) -> None:
    wide = [replace(v, level=Level.WARN, reason="rank 64 ...: start it with --max-lora-rank 64")
            if v.program == "vLLM" else v for v in compatibility.verdicts(adapter, None)]  # fmt: skip
    assert "--enable-lora --max-lora-rank 64 --lora-modules" in card.render(subject(adapter, verdicts=wide))


def test_python_code_compiles_and_loads_the_trained_base(adapter: Path) -> None:
    quantized = replace(LOADING, quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}, rows=514)
    text = card.render(subject(adapter, loading=quantized, record={"quant": {"kind": "nf4", "double": True}}))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        compile(block, "card", "exec")
    assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)" in blocks[0]
    assert "base.resize_token_embeddings(514" in blocks[0]
    assert "quantized to nf4 during training" in text


def test_card_is_reproducible(adapter: Path) -> None:
    one = card.render(subject(adapter, summary()))
    two = card.render(subject(adapter, summary(), verification=replace(VERIFICATION, distance=3.9e-7)))
    assert one == two
    assert "within 1e-06" in one


@pytest.mark.parametrize("value", ["`", "``", "a`b", "`a", "a`", "|", "\n", "", "x" * 9999, "\u202eevil", "a\x00b"])
def test_code_is_one_span(value: str) -> None:
    shown = card.code(value)
    fence = re.match(r"`+", shown)
    assert fence and shown.endswith(fence[0]) and "\n" not in shown and len(shown) < 400
    inside = shown[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall(r"`+", inside)
    assert "\u202e" not in shown and "\x00" not in shown


def scored(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss)}


def run_folder(tmp_path: Path, data: str) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    stored = {"data": {"path": data, "name": None, "split": "train", "prompt": "{a}"}, "seed": 7,
              "model": {"path": "/home/me/tiny"},
              "adapter": {"r": 8, "lora_dropout": 0.0}, "track": {"project": "secret plans"}}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    durable.write_json(run / "result.json", {"base_eval_loss": 3.0, "eval_loss": 2.0, "eval_tokens": 9, "steps": 4})
    durable.write_json(run / "check.json", {"rows": {"train_documents": 5, "eval_documents": 2}})
    lines = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "eval_loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    return run


def test_summary_of_a_run_has_no_paths(tmp_path: Path) -> None:
    found = training_summary.read(run_folder(tmp_path, "/home/me/private/rows.jsonl"))
    assert (found.data, found.dataset) == ("a local file (.jsonl)", None)
    assert found.settings == {"adapter.r": 8, "data.prompt": "{a}", "seed": 7}
    assert "private" not in repr(found) and "secret" not in repr(found)
    assert found.rows == (5, 2)
    assert found.evaluations == [training_summary.Scores("at the end of training", scored(3.0), scored(2.0), 9, None)]
    assert found.curves == ([(1, 2.5), (2, 2.25)], [(0, 3.0), (2, 2.0)])


@pytest.mark.parametrize(
    ("path", "description", "dataset"),
    [
        ("org/rows", "org/rows on the Hugging Face hub", "org/rows"),
        ("package:chatterbot_corpus/data/english", "files of the package chatterbot_corpus", None),
        ("cache:tasks/topic", "rows made by a script (tasks/topic)", None),
        ("/home/me/rows", "a local folder", None),
        ("rows.csv", "a local file (.csv)", None),
        ("../org", "a local folder", None),
    ],
)
def test_source_of_rows_is_described_without_paths(
    tmp_path: Path, path: str, description: str, dataset: str | None
) -> None:
    found = training_summary.read(run_folder(tmp_path, path))
    assert (found.data, found.dataset) == (description, dataset)


def test_eval_results_are_last_and_a_broken_file_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "org/rows")
    scored = {"loss": 2.0, "perplexity": None, "chrf": 40.0}
    durable.write_json(run / "eval.json", {"base": scored, "adapter": scored, "tokens": 9, "rows": 3})
    assert training_summary.read(run).evaluations[-1] == training_summary.Scores(
        "by lora-ft eval", *[{"loss": 2.0, "chrf": 40.0}] * 2, 9, 3
    )  # fmt: skip
    durable.write_json(run / "eval.json", {"base": [], "adapter": scored})
    with pytest.raises(ConfigError, match=r"eval\.json was not written by lora-ft"):
        training_summary.read(run)


def test_curve_is_reproducible_and_ignores_nan() -> None:
    drawn = curve.draw([(1, 3.0), (2, 2.0), (3, float("nan"))], [(0, 3.5), (3, 1.5)])
    assert drawn and drawn.startswith(b"\x89PNG")
    assert drawn == curve.draw([(1, 3.0), (2, 2.0)], [(0, 3.5), (3, 1.5)])
    assert drawn != curve.draw([(1, 3.0), (2, 2.0)], [(0, 3.5), (3, 1.25)])
    assert curve.draw([(1, 2.0), (2, 2.0)], []) and curve.draw([], [(0, 2.0), (1, 3.0)])
    assert curve.draw([], []) is None and curve.draw([(1, 2.0)], []) is None


def test_license_is_read_from_the_bases_card(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for content, expected in (
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"), ("# no front matter", None), ("---\n: : [\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None), ("---\nlicense: &a [*a]\n---\n", None),
        ("---\r\nlicense: mit\r\n---", "mit"),
        ("---\nlicense: !!python/object:os.system {}\n---\n", None),
    ):  # fmt: skip
        readme.write_text(content)
        assert training_summary.license_of(config.Model(path=str(tmp_path)), str(tmp_path)) == expected
