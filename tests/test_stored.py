"""Bases that come quantized: trained as stored, or refused with the id of the model in 16 bits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import call, rows_file
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import lora_ft
from lora_ft import config
from lora_ft.adapters import provenance
from lora_ft.config import QuantKind
from lora_ft.errors import ConfigError
from lora_ft.memory import planning
from lora_ft.models import load, meta_quantize, quantize, resolve, stored
from lora_ft.models.meta_model import load_meta_model, read_config

quantize.import_bitsandbytes()
IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])
WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "nf4", {"bnb_4bit_use_double_quant": True}),
    ("llama", "fp4", {"bnb_4bit_quant_storage": torch.bfloat16}),
    ("llama", "int8", {}),
    ("gpt2", "nf4", {}),
    ("gpt2", "int8", {}),
]
"""Family, kind and other settings of quantized files."""


def quantized_folder(folder: Path, family: str, kind: str, dtype: torch.dtype = torch.float32, **other: Any) -> Path:
    """Save a tiny model that transformers quantized, as its users do, beside the model that it comes from."""
    if kind != "int8":
        other |= {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings = BitsAndBytesConfig(load_in_8bit=kind == "int8", **other)
    source = folder / family if (folder / family).is_dir() else tiny_folder(folder, family)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    made = folder / f"{family}-{kind}"
    model.save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def base_of(folder: Path, kind: str = "none", **quant: Any) -> load.Base:
    return load.load_base(config.Model(path=str(folder)), config.Quant(QuantKind(kind), **quant), "cpu")


def rewrite(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | fields))


@pytest.mark.parametrize(("family", "kind", "other"), WAYS)
def test_quantized_files_train_as_they_are_stored(tmp_path: Path, family: str, kind: str, other: Any) -> None:
    folder = quantized_folder(tmp_path, family, kind, **other)
    double = other.get("bnb_4bit_use_double_quant", False)
    base, fresh = base_of(folder), base_of(tmp_path / family, kind, double=double)
    assert base.quantized == fresh.quantized
    assert base.identity.stored.record() == {
        "method": "bitsandbytes", "kind": kind, **({} if kind == "int8" else {"double": double})
    }  # fmt: skip
    files = load_file(folder / "model.safetensors")
    for name in base.quantized:
        layer, twin = base.model.get_submodule(name), fresh.model.get_submodule(name)
        codes = files[f"{name}.weight"]
        assert torch.equal(layer.weight.data.flatten().view(torch.uint8), codes.flatten().view(torch.uint8))
        assert torch.equal(quantize.dequantize_reference(layer), quantize.dequantize_reference(twin))
        assert layer.compute_dtype == twin.compute_dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {p.dtype for p in fresh.model.parameters()}
    assert torch.equal(base.model(IDS).logits, fresh.model(IDS).logits)


def test_the_dtype_of_a_run_is_not_that_of_the_files(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", torch.bfloat16)
    base, plain = base_of(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32, torch.uint8}
    for name in base.quantized:
        plain.get_submodule(name).weight.data = quantize.dequantize_reference(base.model.get_submodule(name))
    for name, parameter in base.model.named_parameters():
        if parameter.is_floating_point():
            plain.get_parameter(name).data = parameter
    expected = plain(IDS).logits
    assert (base.model(IDS).logits - expected).norm() < 1e-5 * expected.norm()
    half = load.load_base(config.Model(path=str(folder), dtype=config.Dtype.bfloat16), config.Quant(), "cpu")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16, torch.uint8}


def test_layers_that_the_files_leave_out_stay_as_they_are(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", llm_int8_skip_modules=["model.layers.0", "lm_head"])
    base = base_of(folder)
    assert len(base.quantized) == 7
    assert all(name.startswith("model.layers.1.") for name in base.quantized)
    meta = load_meta_model(config.Model(path=str(folder)), config.Quant(), "cpu", tiny_tokenizer())
    assert tuple(quantize.planned_layers(meta.model, meta.identity.stored)) == base.quantized


@pytest.mark.parametrize(("family", "kind", "other"), WAYS)
def test_the_model_without_weights_has_the_layers_and_bytes_of_the_files(
    tmp_path: Path, family: str, kind: str, other: Any
) -> None:
    folder = quantized_folder(tmp_path, family, kind, **other)
    base = base_of(folder)
    meta = load_meta_model(config.Model(path=str(folder)), config.Quant(), "cpu", tiny_tokenizer())
    assert meta_quantize.quantize_meta(meta.model, config.Quant(), torch.float32) == base.quantized
    expected = {name: (p.dtype, p.shape) for name, p in base.model.named_parameters()}
    assert {name: (p.dtype, p.shape) for name, p in meta.model.named_parameters()} == expected


def test_experts_of_quantized_files_stay_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "qwen3_moe", "nf4", torch.bfloat16)
    base, plain = base_of(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3_moe", dtype=torch.float32)
    assert {name.rpartition(".")[2] for name in base.quantized} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, expected in plain.named_parameters():
        if "experts" in name:
            found = base.model.get_parameter(name)
            assert torch.equal(found, expected.bfloat16().float()), name
    meta = load_meta_model(config.Model(path=str(folder)), config.Quant(), "cpu", tiny_tokenizer())
    assert meta_quantize.quantize_meta(meta.model, config.Quant(), torch.float32) == base.quantized


def test_files_with_a_quantized_head_are_refused(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", llm_int8_skip_modules=["model.layers.0"])
    with pytest.raises(ConfigError, match=r"unexpected \['lm_head'\]: set model\.path to the model in 16 bits"):
        base_of(folder)


def test_quant_must_agree_with_the_files(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4")
    assert base_of(folder, "nf4", double=True).model.model.layers[0].mlp.up_proj.weight.quant_state.nested is False
    message = r"quant=int8: the weights of this base are stored in nf4 \(bitsandbytes\).*leave out quant"
    with pytest.raises(ConfigError, match=message):
        base_of(folder, "int8")
    with pytest.raises(ConfigError, match=message):
        load_meta_model(config.Model(path=str(folder)), config.Quant(QuantKind.int8), "cpu", tiny_tokenizer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, r"not stored in fp4, as config\.json says"),
        ({"bnb_4bit_use_double_quant": True}, "not stored in nf4 with quantized scales"),
        ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type must be nf4 or fp4, got nf3"),
        ({"bnb_4bit_use_double_quant": 1}, "must be true or false, got 1"),
        ({"bnb_4bit_quant_storage": "int3"}, "must be one of uint8.*got int3"),
        ({"llm_int8_skip_modules": "lm_head"}, "must be a list of names"),
        ({"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit is true"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "do not belong together"),
    ],
)
def test_files_that_are_not_what_their_config_says_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder, quantization_config=settings | change)
    with pytest.raises(ConfigError, match=message):
        base_of(folder)


def test_files_without_scales_are_refused(tmp_path: Path) -> None:
    for kind, part in (("nf4", "up_proj.weight."), ("int8", "up_proj.SCB")):
        folder = quantized_folder(tmp_path, "llama", kind)
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=r"(up_proj are not stored in nf4|cannot be read), as config\.json says"):
            base_of(folder)


def test_a_run_on_quantized_files_from_check_to_merge(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", torch.bfloat16, bnb_4bit_use_double_quant=True)
    rows = rows_file(tmp_path)
    words = ["model=local", f"model.path={folder}", f"data.path={rows}", "data.eval_fraction=0", "adapter.r=4",
             "train.max_steps=2", "device=cpu"]  # fmt: skip
    cfg = lora_ft.compose("train", words)
    run = lora_ft.train(cfg, folder=tmp_path / "run")
    record = provenance.read_record(tmp_path / "run" / "adapter")
    assert record["quant"] == {"kind": "nf4", "double": True}
    assert record["base"]["stored"] == {"method": "bitsandbytes", "kind": "nf4", "double": True}
    checked = json.loads((tmp_path / "run" / "check.json").read_text())
    assert checked["layers"]["quantization"] == "nf4"
    assert run.result.steps == 2
    model, _ = lora_ft.load(tmp_path / "run")
    merged = lora_ft.merge(tmp_path / "run", tmp_path / "merged").out
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        found, expected = plain(IDS).logits, model(IDS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert call("merge", f"run={tmp_path / 'run'}", f"out={tmp_path / 'no'}", "base_weights=original") == 2
    # The same weights in another quantization are another base.
    other = quantized_folder(tmp_path, "llama", "fp4")
    assert call("merge", f"adapter_path={tmp_path / 'run' / 'adapter'}", f"out={tmp_path / 'no'}", "model=local",
                f"model.path={other}", "quant=fp4") == 5  # fmt: skip


@pytest.mark.parametrize(("dtype", "cast"), [("float32", True), ("bfloat16", False)])
def test_quantized_files_are_loaded_elsewhere_by_their_own_config(tmp_path: Path, dtype: str, cast: bool) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", torch.bfloat16)
    model = config.Model(path=str(folder), dtype=config.Dtype[dtype])
    base = load.load_base(model, config.Quant(), "cpu")
    loading = provenance.loading(base, config.Quant(), model)
    assert (loading.quantization, loading.cast, loading.dtype) == ({}, cast, dtype)
    assert ("parameter.data.to(torch.float32)" in "\n".join(loading.lines("adapter"))) is cast
    fields = json.loads(json.dumps(provenance.base_fields(base.identity)))
    assert fields["stored"] == {"method": "bitsandbytes", "kind": "nf4", "double": False}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_of_quantized_files_is_published_with_their_id(tmp_path: Path, kind: str) -> None:
    # The files name bfloat16; training and its check by transformers and PEFT alone compute in float32.
    folder = quantized_folder(tmp_path, "llama", kind, torch.bfloat16)
    words = ["model=local", f"model.path={folder}", f"data.path={rows_file(tmp_path)}", "data.eval_fraction=0",
             "adapter.r=4", "train.max_steps=1", "device=cpu"]  # fmt: skip
    lora_ft.train(lora_ft.compose("train", words), folder=tmp_path / "run")
    lora_ft.publish(tmp_path / "run", f"dir:{tmp_path / 'package'}", ["model.hub_id=me/base-bnb", "license=mit"])
    card = (tmp_path / "package" / "README.md").read_text()
    assert "base_model: me/base-bnb\n" in card
    assert f"whose files hold its weights in `bitsandbytes {kind}`" in card
    assert "AutoModelForCausalLM.from_pretrained('me/base-bnb', dtype=torch.float32)" in card
    assert "parameter.data = parameter.data.to(torch.float32)" in card
    record = json.loads((tmp_path / "package" / "lora_ft.json").read_text())
    assert record["base"]["stored"]["kind"] == record["quant"]["kind"] == kind
    assert (
        json.loads((tmp_path / "package" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "me/base-bnb"
    )


def test_a_plan_counts_what_is_stored(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path, "llama", "nf4", bnb_4bit_use_double_quant=True)
    cfg = lora_ft.compose(
        "plan", ["model=local", f"model.path={folder}", "hardware=rtx_4090", "data.max_length=64", "model.dtype=fp32"]
    )
    fresh = lora_ft.compose("plan", ["model=local", f"model.path={tmp_path / 'llama'}", "quant=nf4",
                                     "hardware=rtx_4090", "data.max_length=64", "model.dtype=fp32"])  # fmt: skip
    found, expected = (planning.make(each, each.hardware) for each in (cfg, fresh))
    assert found.prediction.trace.base_bytes == expected.prediction.trace.base_bytes
    assert "nf4" in found.prediction.trace.base_bytes
    assert found.prediction.trace.peak_bytes == expected.prediction.trace.peak_bytes
    assert found.storage.mapped_bytes < expected.storage.mapped_bytes
    assert found.storage.loading_device_bytes <= expected.storage.loading_device_bytes
    assert read_config(cfg.model).quantization_config["load_in_4bit"]


TRAINED = {"bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "gptq", "awq"}
UNSUPPORTED = sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "exl2", "unknown", 3} - TRAINED, key=str)


@pytest.mark.parametrize("method", UNSUPPORTED)
def test_other_methods_are_refused_before_a_download(tmp_path: Path, method: str) -> None:
    folder = tiny_folder(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    rewrite(folder, quantization_config={"quant_method": method})
    with pytest.raises(
        ConfigError, match=rf"is already quantized \({method}\).*set model\.path to the model in 16 bits"
    ):
        resolve.check_config(folder)


def test_a_refused_quantization_is_a_usage_error(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    rewrite(folder, quantization_config={"quant_method": "hqq"})
    for command in ("check", "plan"):
        assert call(command, "model=local", f"model.path={folder}", f"data.path={rows_file(tmp_path)}") == 2


@pytest.mark.parametrize(
    ("hub_id", "fields", "named"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", {}, "by its name probably Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen3-8B-AWQ", {}, "by its name probably Qwen/Qwen3-8B"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", {}, "by its name probably TheBloke/Mistral-7B-v0.1"),
        ("RedHatAI/Llama-3.1-8B-FP8-dynamic", {}, "by its name probably RedHatAI/Llama-3.1-8B"),
        ("me/model-w4a16", {"_name_or_path": "org/model"}, "config.json names org/model as its source"),
        ("me/model-4bit", {"_name_or_path": "me/model-4bit"}, "by its name probably me/model"),
        ("me/model", {"_name_or_path": "/home/me/model"}, None),
        (None, {}, None),
    ],
)
def test_the_message_names_the_model_in_16_bits(hub_id: str | None, fields: Any, named: str | None) -> None:
    settings = {"quantization_config": {"quant_method": "hqq"}, **fields}
    with pytest.raises(ConfigError) as raised:
        stored.of(settings, "folder", hub_id)
    message = str(raised.value)
    if named:
        assert f"set model.path to the model in 16 bits ({named}), and choose quant=..." in message
    else:
        assert re.search(r"set model\.path to the model in 16 bits, and choose quant=\.\.\.", message)
