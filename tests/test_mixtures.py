"""Mixtures of experts: check and train warn about weights that are not adapted or that stay unquantized."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from finished import call, settings
from safetensors.torch import load_file
from tiny import MIXTURES, tiny_folder, tiny_tokenizer
from zoo import zoo_folder

from lora_ft import config
from lora_ft.adapters import summary
from lora_ft.adapters.accounting import Part
from lora_ft.adapters.targets import EXCLUDED, QUANTIZED, SWITCHED_OFF
from lora_ft.errors import ConfigError
from lora_ft.models.load import load_base
from lora_ft.models.meta_model import load_meta_model

# Names, in the files on disk, of the tensors of these families that do not belong to a linear layer.
EXPERTS = re.compile(
    r"\.experts\.|block_sparse_moe\.(in|out)put_linear\.|\.(gate|router|router\.layer|conv1d)\.weight$"
)

# Weights of experts, in the model's parameters.
MATRICES = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in (*MIXTURES, "llama", "gpt2"):
        tiny_folder(folder, family)
    return folder


def seen(bases, family, quant="none", **adapter):
    """Return the layers of a run, and the warnings about them."""
    cfg = config.TrainRun(device="cpu", adapter=config.Adapter(r=4, lora_alpha=8.0, **adapter))
    cfg.model.path, cfg.quant.kind = str(bases / family), config.QuantKind[quant]
    layers = summary.layers(load_meta_model(cfg.model, cfg.quant, "cpu", tiny_tokenizer()), cfg)
    return layers, list(summary.warnings(layers, cfg))


def expert_weights(bases, family):
    """Return the number of expert, router and convolution weights in the model's file, and that of all weights."""
    sizes = {name: tensor.numel() for name, tensor in load_file(bases / family / "model.safetensors").items()}
    sizes.pop("model.layers.1.mlp.gate.e_score_correction_bias", None)  # a buffer
    found = {name: size for name, size in sizes.items() if EXPERTS.search(name) and "shared" not in name}
    return sum(size for name, size in found.items() if "bias" not in name), sum(sizes.values())


def routers(layers):
    """Return the number of weights of routers and convolutions."""
    return sum(size for name, size in layers.not_adapted.items() if name not in MATRICES)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_adapted_and_their_share_equals_a_count_over_the_file(bases, family):
    count, whole = expert_weights(bases, family)
    assert count > 90_000
    layers, warnings = seen(bases, family)
    frozen, frozen_warnings = seen(bases, family, experts=False)
    (warning,) = (w for w in frozen_warnings if "are not adapted" in w)
    assert [w for w in warnings if "are not adapted" in w] == []
    assert sum(frozen.not_adapted.values()) == count
    assert (layers.not_quantized, layers.not_quantized_bytes, layers.base) == ({}, 0, whole)
    assert sum(layers.not_adapted.values()) == routers(layers) < 0.01 * whole
    assert layers.adapted - frozen.adapted == count - routers(layers)
    assert layers.count - frozen.count == layers.targets["gate_up_proj"] + layers.targets["gate_up_proj"]
    assert layers.trainable - frozen.trainable == layers.experts > 0 == frozen.experts
    assert warning.startswith(
        f"{count / whole:.1%} of the base's weights ({count:,}) are not adapted and stay frozen ("
    )
    assert warning.endswith("): adapter.experts=false leaves the experts out")
    for name in MATRICES:
        assert f"{name} {frozen.not_adapted[name] / layers.base:.1%}" in warning


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"target_modules": ["o_proj"]}, "adapter.target_modules does not name the experts; adapter.experts=true adds"),
        ({"exclude": ["experts"]}, "adapter.exclude names the experts"),
        ({"lora_dropout": 0.1}, "adapter.lora_dropout=0.1 has no place where PEFT adds the update to the weights; set"),
        ({"use_dora": True}, r"DoRA for parameters (adapter.use_dora=true); set adapter.use_dora=false to train them"),
    ],
)
def test_warning_names_the_setting_that_leaves_the_experts_out(bases, adapter, reason):
    layers, (warning, *_) = seen(bases, "qwen3_moe", **adapter)
    assert reason in warning
    assert layers.experts == 0 and set(MATRICES) < layers.not_adapted.keys()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("family", MIXTURES)
def test_share_reported_as_quantized_is_that_of_the_loaded_base(bases, family, quant):
    layers, warnings = seen(bases, family, quant)
    plain = dict(load_base(config.Model(path=str(bases / family)), config.Quant(), "cpu").model.named_parameters())
    base = load_base(config.Model(path=str(bases / family)), config.Quant(kind=config.QuantKind[quant]), "cpu")
    codes = [name for name, p in base.model.named_parameters() if p.dtype in (torch.uint8, torch.int8)]
    assert sum(plain[name].numel() for name in codes) == layers.quantized
    assert sum(".experts." in name for name in codes) == (2 if family == "deepseek_v3" else 4)
    assert all(p.dim() < 3 for n, p in base.model.named_parameters() if p.is_floating_point() and "conv" not in n)
    kept = [n for n in codes if ".experts." in n]
    unquantized = sum(layers.not_quantized.values())
    frozen, _ = seen(bases, family, quant, experts=False)
    assert unquantized == sum(frozen.not_adapted.values()) - sum(plain[name].numel() for name in kept)
    assert layers.not_quantized_bytes == 4 * unquantized
    assert unquantized < 0.01 * layers.base and not any("quantizes" in warning for warning in warnings)


def test_experts_of_another_form_stay_as_they_are_which_a_warning_says(tmp_path):
    """Those of Llama 4 get the rows of all experts at once."""
    folder = zoo_folder(tmp_path, "llama4_text", dtype=torch.bfloat16)
    cfg = config.TrainRun(device="cpu", adapter=config.Adapter(r=4, lora_alpha=8.0))
    cfg.model.path, cfg.quant.kind, cfg.model.dtype = str(folder), config.QuantKind.nf4, config.Dtype.bfloat16
    layers = summary.layers(load_meta_model(cfg.model, cfg.quant, "cpu", tiny_tokenizer()), cfg)
    base = load_base(cfg.model, cfg.quant, "cpu")
    left = [p for n, p in base.model.named_parameters() if ".experts." in n]
    assert {p.dtype for p in left} == {torch.bfloat16}
    assert sum(layers.not_quantized.values()) == sum(p.numel() for p in left)
    assert layers.not_quantized_bytes == sum(p.nbytes for p in left)
    size = f"{layers.not_quantized_bytes / 1e6:.1f} MB"
    assert list(summary.warnings(layers, cfg))[-1] == (
        "quant=nf4 quantizes linear layers and experts of transformers' usual form only: "
        f"{sum(layers.not_quantized.values()) / layers.base:.1%} of the base's weights stay at 16 bits each, {size}"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", "named"])
def test_dense_base_has_only_linear_layers_and_embeddings(bases, family, targets):
    named = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    layers, warnings = seen(bases, family, "nf4", target_modules=[named if targets == "named" else targets])
    assert (layers.not_adapted, layers.not_quantized_bytes, layers.experts, warnings) == ({}, 0, 0, [])


def test_linear_layers_that_peft_takes_for_experts_are_adapted_as_parameters_unless_they_are_quantized(bases):
    layers, _ = seen(bases, "deepseek_v3")
    assert layers.left_out == {}
    assert layers.targets == {
        "q_a_proj": 2, "q_b_proj": 2, "kv_a_proj_with_mqa": 2, "kv_b_proj": 2, "o_proj": 2,
        "gate_proj": 2, "up_proj": 2, "down_proj": 3, "gate_up_proj": 1,
    }  # fmt: skip
    quantized, warnings = seen(bases, "deepseek_v3", "nf4")
    assert quantized.left_out == {QUANTIZED: {"gate_proj": 2, "up_proj": 2, "down_proj": 2}}
    count = quantized.parts[Part.LEFT_OUT.value]
    assert count == 6 * 64 * 128
    assert warnings[0].startswith(f"{count / layers.base:.1%} of the base's weights ({count:,}) are in linear layers")
    with pytest.raises(ConfigError, match=r"mlp\.gate_proj matches only layers that an adapter cannot train"):
        seen(bases, "deepseek_v3", target_modules=["o_proj", "mlp.gate_proj"], lora_dropout=0.1)


def test_modules_to_save_are_adapted(bases):
    whole, _ = seen(bases, "mixtral")
    layers, _ = seen(bases, "mixtral", modules_to_save=["mlp.gate"])
    assert layers.trainable == whole.trainable + whole.not_adapted["gate.weight"]
    assert layers.not_adapted == {}


def test_share_below_one_percent_is_counted_without_a_warning(bases):
    layers, warnings = seen(bases, "granitemoehybrid", modules_to_save=["experts"], exclude=["out_proj"])
    assert layers.not_adapted == {"conv1d.weight": 640, "router.weight": 512}
    assert warnings == []
    assert layers.left_out == {EXCLUDED: {"out_proj": 1}}


@pytest.mark.parametrize(("family", "quant"), [("mixtral", "nf4"), ("qwen3_moe", "none")])
def test_check_and_train_warn(bases, tmp_path, capfd, monkeypatch, family, quant):
    monkeypatch.chdir(tmp_path)
    cfg = settings(bases, family)
    overrides = ["model=local", f"model.path={bases / family}", f"data.path={cfg.data.path}", f"quant={quant}",
             "train.max_steps=2", "train.samples=0", "adapter.r=4", "adapter.lora_alpha=8",
             "adapter.experts=false"]  # fmt: skip
    layers, expected = seen(bases, family, quant, experts=False)
    assert call("check", *overrides) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert call("train", *overrides, "hydra.run.dir=run") == 0
    shown = " ".join(capfd.readouterr().err.split())
    log = Path("run/log.txt").read_text()
    kept = json.loads(Path("run/check.json").read_text())
    assert len(expected) == 1
    for warning in expected:
        assert f"! {warning}" in page
        assert warning in shown and warning in log
        assert warning in kept["warnings"]
    assert kept["layers"] == dataclasses.asdict(layers)
    assert f"left out {', '.join(f'{n} {name}' for name, n in layers.left_out[SWITCHED_OFF].items())}" in page
