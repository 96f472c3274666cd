"""Quantized experts: the codes are bitsandbytes' own, they are read as dequantized, and use changes nothing."""

import copy
import weakref

import pytest
import torch
from tiny import tiny_folder, tiny_model
from torch import nn

from lora_ft import config
from lora_ft.models import load, quantize, quantize_experts
from lora_ft.models.fingerprint import fingerprint
from lora_ft.ops import expert_codes
from lora_ft.ops.experts import parameter_names

bnb = quantize.import_bitsandbytes()
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
KINDS = ("nf4", "fp4", "int8")
IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])


def base_of(folder, kind: str, double: bool = True, **settings) -> load.Base:
    quant = config.Quant(kind=config.QuantKind(kind), double=double)
    return load.load_base(config.Model(path=str(folder), **settings), quant, "cpu")


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith("Experts")}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_in_4_bits_are_those_of_bitsandbytes(tmp_path, family, kind, double):
    base, source = base_of(tiny_folder(tmp_path, family), kind, double), tiny_model(family)
    assert expert_modules(base.model)
    for prefix, module in expert_modules(base.model).items():
        for name in parameter_names(module):
            assert f"{prefix}.{name}" in base.quantized
            weight, codes = source.get_parameter(f"{prefix}.{name}").detach(), module._parameters[name]
            theirs, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
            assert torch.equal(codes, theirs) and codes.quant_state.nested is double
            whole = bnb.functional.dequantize_4bit(theirs, state)
            assert torch.equal(getattr(module, name), whole)
            assert torch.equal(expert_codes.dequantize_experts(codes, 1, 4), whole[1:])
            for expert, matrix in enumerate(weight):
                assert torch.equal(expert_codes.dequantize_experts(codes, expert, expert + 1)[0], whole[expert])
                alone = bnb.functional.quantize_4bit(matrix.contiguous(), quant_type=kind)
                if not double:
                    assert torch.equal(bnb.functional.dequantize_4bit(*alone), whole[expert])


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_in_8_bits_are_those_of_a_linear_layer_for_each_expert(tmp_path, family):
    base, source = base_of(tiny_folder(tmp_path, family), "int8"), tiny_model(family)
    for prefix, module in expert_modules(base.model).items():
        for name in parameter_names(module):
            weight = source.get_parameter(f"{prefix}.{name}").detach()
            for expert, matrix in enumerate(weight.transpose(1, 2) if module.is_transposed else weight):
                layer = bnb.nn.Linear8bitLt(*reversed(matrix.shape), bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(matrix.contiguous(), requires_grad=False, has_fp16_weights=False)
                expected = quantize.dequantize_reference(layer.to("cpu"))
                found = expert_codes.dequantize_experts(module._parameters[name], expert, expert + 1)[0]
                assert torch.equal(found, getattr(module, name)[expert])
                found = found.T if module.is_transposed else found
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_parameters_and_modules_are_those_of_the_plain_model(tmp_path, kind):
    folder = tiny_folder(tmp_path, "mixtral")
    quantized, plain = base_of(folder, kind).model, base_of(folder, "none").model
    assert [n for n, _ in quantized.named_parameters()] == [n for n, _ in plain.named_parameters()]
    names = [
        [(n, type(m).__name__) for n, m in model.named_modules() if "experts" in n] for model in (quantized, plain)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_using_quantized_experts_changes_no_byte(tmp_path, family, kind):
    base = base_of(tiny_folder(tmp_path, family), kind)
    before = fingerprint(base.model)
    with torch.no_grad():
        first = base.model(IDS).logits
    base.model(inputs_embeds=torch.randn(1, 4, 64, requires_grad=True)).logits.sum().backward()
    assert fingerprint(base.model) == before
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, first)
        assert torch.equal(copy.deepcopy(base.model)(IDS).logits, first)
    codes = next(p for n, p in base.model.named_parameters() if n.endswith("experts.down_proj"))
    scales = codes.SCB if kind == "int8" else codes.quant_state.state2.absmax
    scales.view(-1)[0] *= 1.5
    assert fingerprint(base.model) != before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_logits_are_those_of_a_plain_model_with_the_dequantized_weights(tmp_path, kind):
    base = base_of(tiny_folder(tmp_path, "gpt_oss"), kind)
    plain = tiny_model("gpt_oss")
    for name in base.quantized:
        owner, _, leaf = name.rpartition(".")
        if "experts" in name:
            plain.get_parameter(name).data = getattr(base.model.get_submodule(owner), leaf)
        else:
            plain.get_submodule(name).weight.data = quantize.dequantize_reference(base.model.get_submodule(name))
    with torch.no_grad():
        torch.testing.assert_close(base.model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_parameter_is_dropped_before_the_next_one_is_read(tmp_path, monkeypatch):
    folder, alive, whole = tiny_folder(tmp_path, "qwen3_moe"), [], []
    right = quantize_experts.quantized

    def counted(value, *arguments):
        alive.append(sum(each() is not None for each in whole))
        whole.append(weakref.ref(value))
        return right(value, *arguments)

    monkeypatch.setattr(quantize_experts, "quantized", counted)
    base_of(folder, "nf4")
    assert alive == [0] * 4


def test_missing_experts_are_an_error_that_names_them(tmp_path):
    from safetensors.torch import load_file, save_file

    from lora_ft.errors import ConfigError

    folder = tiny_folder(tmp_path, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "experts" not in n or "layers.1" not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"the weights lack model\.layers\.1\.mlp\.experts\.down_proj"):
        base_of(folder, "nf4")


def test_expert_left_unquantized_is_an_error_that_names_it(tmp_path, monkeypatch):
    from lora_ft.errors import ConfigError

    base = base_of(tiny_folder(tmp_path, "mixtral"), "nf4")
    module = base.model.get_submodule("model.layers.1.mlp.experts")
    whole = nn.Parameter(module.down_proj, requires_grad=False)
    del module._parameters["down_proj"]
    module._parameters["down_proj"] = whole
    with pytest.raises(ConfigError, match=r"missing \['model\.layers\.1\.mlp\.experts\.down_proj'\]"):
        quantize.check_plan(base.model)
