"""Base weights of a quantized run's merge: both are measured, and the better model is written."""

import json
from pathlib import Path

import pytest
import torch
from finished import call, finished_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_ft import config, runs
from lora_ft.adapters import loading
from lora_ft.data.dataset import prepare
from lora_ft.evaluation.loss import eval_loss
from lora_ft.export import merge_base
from lora_ft.models.acceleration import accelerate
from lora_ft.models.quantize import dequantize_reference
from lora_ft.objectives.sft import Sft
from lora_ft.training.state import choose_eval
from lora_ft.values import BaseWeights

OFF = config.Fast(attention=False, loss=False)


def eval_rows(run: Path, tokenizer):
    data = config.Data(**{name: runs.read_config(run)["data"][name] for name in ("path", "eval_fraction")})
    return choose_eval(prepare(data, tokenizer), 64)[0]


@pytest.mark.closes("B01", "B02")
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_both_base_weights_are_measured_and_the_better_is_written(
    tmp_path: Path, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama", quant=quant)
    assert call("merge", f"run={run}", f"out={tmp_path / 'auto'}") == 0
    shown, measured = capsys.readouterr().out, json.loads((run / "merge.json").read_text())
    assert json.loads((tmp_path / "auto" / "merge.json").read_text()) == measured
    tokenizer = loading.adapter_tokenizer(run / "adapter", config.Model())
    rows = eval_rows(run, tokenizer)
    for name in ("dequantized", "original"):
        assert call("merge", f"run={run}", f"out={tmp_path / name}", f"base_weights={name}") == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        alone = eval_loss(model, Sft().loss, rows, accelerate(model, OFF).paths, 1024)
        assert measured[name]["loss"] == pytest.approx(alone.loss, rel=1e-5)
        assert f"{measured[name]['loss']:.4f}" in shown
        assert measured["tokens"] == alone.tokens
    assert measured["dequantized"]["loss"] == pytest.approx(measured["attached_loss"], rel=1e-5)
    assert 0 <= measured["dequantized"]["kl"] < measured["original"]["kl"]
    written, taken = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", measured["base_weights"]))
    assert written.keys() == taken.keys() and all(torch.equal(written[key], taken[key]) for key in written)


@pytest.mark.closes("B03")
def test_merged_models_differ_by_the_quantization_error(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama", quant="nf4")
    for name in ("dequantized", "original"):
        assert call("merge", f"run={run}", f"out={tmp_path / name}", f"base_weights={name}") == 0
    base, _ = loading.open_adapter(
        run / "adapter", config.Model(path=str(tmp_path / "llama"), dtype=config.Dtype.float32),
        config.Quant(kind=config.QuantKind.nf4), "cpu", loading.adapter_tokenizer(run / "adapter", config.Model()),
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    on_dequantized, on_original = (load_file(tmp_path / n / "model.safetensors") for n in ("dequantized", "original"))
    quantized = {name.replace(".base_layer", ""): module for name, module in base.model.named_modules()
                 if type(getattr(module, "weight", None)).__name__ == "Params4bit" and "lora" not in name}  # fmt: skip
    assert len(quantized) == 14
    for name, module in quantized.items():
        lost = plain[f"{name}.weight"] - dequantize_reference(module)
        difference = on_original[f"{name}.weight"] - on_dequantized[f"{name}.weight"]
        torch.testing.assert_close(difference, lost, rtol=0, atol=1e-6)
    others = [key for key in plain if key.removesuffix(".weight") not in quantized]
    assert others and all(torch.equal(on_dequantized[key], on_original[key]) for key in others if key in on_dequantized)


def test_merge_without_eval_rows_uses_the_dequantized_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path, "llama", quant="nf4")
    assert call("merge", f"run={run}", f"out={tmp_path / 'auto'}", "data.eval_fraction=0") == 0
    assert "no eval rows to compare the base weights on" in caplog.text
    assert call("merge", f"run={run}", f"out={tmp_path / 'explicit'}", "base_weights=dequantized") == 0
    written, explicit = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "explicit"))
    assert all(torch.equal(written[key], explicit[key]) for key in explicit)
    assert not (run / "merge.json").exists() and not (tmp_path / "auto" / "merge.json").exists()


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_lower_loss_wins_and_lower_kl_within_noise(a, b, kl_a, kl_b, noise) -> None:
    taken = merge_base.better(
        {BaseWeights.dequantized: merge_base.Target(a, kl_a), BaseWeights.original: merge_base.Target(b, kl_b)}, noise
    )
    first = a <= b if abs(a - b) > noise else kl_a <= kl_b
    assert taken is (BaseWeights.dequantized if first else BaseWeights.original)


@pytest.mark.nightly
def test_merged_smollm2_has_the_loss_of_its_quantized_run(tmp_path: Path) -> None:
    short = ("train.max_steps=4", "train.tokens_per_step=256", "train.eval_rows=8", "train.samples=0")
    run = tmp_path / "run"
    assert call("train", "model=smollm2_135m", "quant=nf4", "data=chatterbot", *short, f"hydra.run.dir={run}") == 0
    assert call("merge", f"run={run}", f"out={tmp_path / 'out'}", "eval_rows=8") == 0
    measured = json.loads((run / "merge.json").read_text())
    assert measured["attached_loss"] == pytest.approx(runs.read_result(run)["eval_loss"], rel=1e-4)
    assert measured["dequantized"]["loss"] == pytest.approx(measured["attached_loss"], rel=0.005)
    taken = measured[measured["base_weights"]]["loss"]
    assert taken <= measured["attached_loss"] * 1.005
    tokenizer = loading.adapter_tokenizer(run / "adapter", config.Model())
    rows = choose_eval(
        prepare(config.Data(path="package:chatterbot_corpus/data/english", deduplicate=True), tokenizer), 8
    )[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert eval_loss(model, Sft().loss, rows, accelerate(model, OFF).paths, 1024).loss == pytest.approx(taken, rel=1e-4)
