"""A mixture on quantized experts: attached, merged, published, generated with, and shared by the jobs of a sweep."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from finished import call, finished_run, settings
from memory_cases import Case, model_files
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from tiny import tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_ft
from lora_ft import config
from lora_ft.adapters import attach, loading, provenance
from lora_ft.memory.trace import trace_step
from lora_ft.memory.weight_bytes import _quantized_tensors
from lora_ft.models import storage
from lora_ft.models.acceleration import dequantized_weights
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import load_base
from lora_ft.ops import expert_codes, weights
from lora_ft.ops.device import Target
from lora_ft.ops.experts import is_experts, parameter_names
from lora_ft.publishing import verify_worker

EXPERTS = {"qwen3_moe": 16, "gpt_oss": 8}  # of tests/memory_cases.py
IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])
OTHERS = [("mixtral", "int8"), ("gpt_oss", "nf4"), ("deepseek_v3", "nf4"), ("qwen2_moe", "fp4")]
CASES = [
    ("qwen3_moe", "nf4"),
    ("gpt_oss", "int8"),
    *(pytest.param(*case, marks=pytest.mark.nightly) for case in OTHERS),
]


def base_of(folder: Path, quant: str) -> torch.nn.Module:
    return load_base(config.Model(path=str(folder)), config.Quant(kind=config.QuantKind(quant)), "cpu").model


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_attaching_and_detaching_restores_quantized_experts(tmp_path, family, quant):
    base = base_of(tiny_folder(tmp_path, family), quant)
    before, first = fingerprint(base), logits_of(base)
    classes = [type(m) for m in base.modules() if is_experts(m)]
    names = []
    for seed in (0, 1):  # as two jobs of a sweep
        model = attach.attach(base, config.Adapter(r=2), "first", seed, [])
        names.append(sorted(attach.trainable(model, "first")))
        for parameter in attach.trainable(model, "first").values():
            parameter.data.normal_(std=0.1)
        assert not torch.equal(logits_of(model), first)
        assert fingerprint(model) == before
        attach.detach(base)
    assert names[0] == names[1]
    assert fingerprint(base) == before and torch.equal(logits_of(base), first)
    assert [type(m) for m in base.modules() if is_experts(m)] == classes


def test_adapter_names_its_layers_as_on_an_unquantized_base(tmp_path):
    """Shared experts have linear layers of the names of the parameters of experts."""
    folder = tiny_folder(tmp_path, "qwen2_moe")
    found = [attach.attach(base_of(folder, kind), config.Adapter(), "first", 0, []) for kind in ("none", "nf4")]
    names = [model.peft_config["first"].target_modules for model in found]
    assert names[0] == names[1] and "down_proj" in names[0]
    config_of_others = LoraConfig(r=2, target_modules=["down_proj"])
    assert inject_adapter_in_model(config_of_others, base_of(folder, "nf4"))


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_merged_model_has_the_dequantized_experts(tmp_path, family, quant):
    run = finished_run(tmp_path, family, quant=quant, experts=False)
    assert call("merge", f"run={run}", f"out={tmp_path / 'merged'}", "base_weights=dequantized") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = base_of(tmp_path / family, quant)
    count = 0
    for prefix, module in base.named_modules():
        for name in parameter_names(module) if is_experts(module) else ():
            assert torch.equal(merged.get_parameter(f"{prefix}.{name}"), getattr(module, name))
            count += 1
    assert count == (2 if family == "deepseek_v3" else 4)
    attached = loading.open_adapter(
        run / "adapter", config.Model(path=str(tmp_path / family)), config.Quant(kind=config.QuantKind(quant)), "cpu",
        loading.adapter_tokenizer(run / "adapter", config.Model()),
    )[1]  # fmt: skip
    torch.testing.assert_close(logits_of(merged), logits_of(attached), rtol=1e-3, atol=1e-3)


def test_base_weights_are_compared_over_quantized_experts(tmp_path):
    run = finished_run(tmp_path, "mixtral", quant="nf4")
    assert call("merge", f"run={run}", f"out={tmp_path / 'auto'}") == 0
    measured = json.loads((run / "merge.json").read_text())
    assert measured["dequantized"]["loss"] == pytest.approx(measured["attached_loss"], rel=1e-4)
    assert measured["dequantized"]["kl"] < 1e-4 < measured["original"]["kl"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT
@pytest.mark.parametrize(("family", "quant"), CASES)
def test_printed_code_loads_the_base_with_the_experts_of_training(tmp_path, family, quant):
    run = finished_run(tmp_path, family, quant=quant, experts=False)
    cfg = settings(tmp_path, family, quant=quant)
    base, plain = load_base(cfg.model, cfg.quant, "cpu"), base_of(tmp_path / family, "none")
    lines = provenance.loading_lines(run / "adapter", base, cfg)
    names = {"torch": torch, "PeftModel": PeftModel} | {
        name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "BitsAndBytesConfig")
    }
    exec("\n".join(lines), names)  # noqa: S102
    loaded = names["model"].get_base_model()
    for prefix, module in base.model.named_modules():
        for name in parameter_names(module) if is_experts(module) else ():
            found = loaded.get_parameter(f"{prefix}.{name}")
            torch.testing.assert_close(found.data, getattr(module, name), rtol=1e-6, atol=1e-8)
            assert not torch.equal(found, plain.get_parameter(f"{prefix}.{name}"))


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_process_that_verifies_rounds_experts_as_training_does(tmp_path, family, quant):
    cfg = settings(tmp_path, family, quant=quant)
    base, plain = load_base(cfg.model, cfg.quant, "cpu"), base_of(tmp_path / family, "none")
    alone = provenance.loading(base, cfg.quant, cfg.model)
    attach.attach(base.model, config.Adapter(experts=True), "first", 0, [])
    assert provenance.loading(base, cfg.quant, cfg.model) == alone
    attach.detach(base.model)
    verify_worker.round_experts(plain, dataclasses.asdict(alone))
    count = 0
    for prefix, module in base.model.named_modules():
        for name in parameter_names(module) if is_experts(module) else ():
            found = plain.get_parameter(f"{prefix}.{name}")
            torch.testing.assert_close(found.data, getattr(module, name), rtol=1e-6, atol=1e-8)
            count += 1
    assert count == (2 if family == "deepseek_v3" else 4)


@pytest.mark.nightly
@pytest.mark.parametrize(("family", "quant"), [("qwen3_moe", "nf4"), ("gpt_oss", "int8")])
def test_published_adapter_is_verified_by_a_process_without_lora_ft(tmp_path, family, quant):
    run = finished_run(tmp_path, family, quant=quant)
    out = tmp_path / "package"
    assert call("publish", f"run={run}", f"to=dir:{out}", "license=mit", "model.hub_id=me/base") == 0
    card = (out / "README.md").read_text()
    assert re.search(r"for name, parameter in base\.named_parameters\(\)", card)
    assert load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_generation_dequantizes_experts_once_and_gives_the_same_tokens(tmp_path, family, quant, monkeypatch):
    base = base_of(tiny_folder(tmp_path, family), quant)
    expected = base.generate(IDS, max_new_tokens=8, do_sample=False)
    with monkeypatch.context() as patched, dequantized_weights(base):
        patched.setattr(weights, "dequantize_experts", None)
        assert torch.equal(base.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, base(IDS).logits)


def test_experts_beyond_the_limit_stay_quantized_in_generation(tmp_path, monkeypatch):
    base = base_of(tiny_folder(tmp_path, "mixtral"), "nf4")
    count = len(storage.dequantized_forwards(base))
    layers = sum(p.quant_state.shape.numel() for n, p in base.named_parameters() if hasattr(p, "quant_state")
                 and "experts" not in n)  # fmt: skip
    monkeypatch.setattr(storage, "_MOST_DEQUANTIZED_BYTES", 4 * layers)
    found = storage.dequantized_forwards(base)
    assert len(found) == count - 2 == 8 and not any(map(is_experts, found))


@pytest.mark.parametrize(
    ("family", "quant", "dtype"), [("qwen3_moe", "nf4", "float32"), ("gpt_oss", "int8", "bfloat16")]
)
def test_training_on_quantized_experts_learns(tmp_path, family, quant, dtype):
    cfg = settings(tmp_path, family, quant=quant)
    words = [f"model.path={tmp_path / family}", "model=local", f"model.dtype={dtype}", f"quant={quant}", "device=cpu",
             f"data.path={cfg.data.path}", "data.eval_fraction=0", "train.samples=0", "train.max_steps=6",
             "adapter.r=4", "optim.lr=0.01", "optim.schedule=constant"]  # fmt: skip
    run = lora_ft.train(lora_ft.compose("train", words), folder=str(tmp_path / "run"))
    losses = [metrics["loss"] for metrics in run.history if "loss" in metrics]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("family", "quant"), [("qwen3_moe", "nf4"), ("gpt_oss", "int8")])
def test_traced_step_counts_the_codes_and_the_weight_of_one_expert(tmp_path, family, quant):
    case = Case(family, (600,), quant)
    found = trace_step(case.settings, case.config, case.lengths, Target("cuda", (7, 5)))  # no groups
    base = base_of(model_files(case, tmp_path), quant)
    stored = sum(each.nbytes for p in base.parameters() for each in _quantized_tensors(p))
    assert found.base_bytes[quant] == pytest.approx(stored, rel=0.05)  # each is rounded up to 512 bytes on a GPU
    experts = [p for p in base.parameters() if isinstance(p, expert_codes.ExpertCodes)]
    assert sum(p.nbytes for p in experts) > 0.6 * found.base_bytes[quant]
    one = max(expert_codes.dequantized_bytes(p) // 2 // EXPERTS[family] for p in experts)  # in half precision
    largest = max(module.weight.numel() for module in model_of(case).modules() if isinstance(module, torch.nn.Linear)
                  and module.out_features < 4096) * 2  # fmt: skip
    assert max(one, largest) <= max(found.timeline.terms["dequantization"]) < 1.6 * max(one, largest)
    assert max(found.timeline.terms["dequantization"]) < max(expert_codes.dequantized_bytes(p) // 4 for p in experts)


def model_of(case: Case) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(case.config)
