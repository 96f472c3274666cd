"""Experts one at a time: values and gradients are those of transformers' own experts, in any dtype and routing."""

import copy
import functools
from dataclasses import fields

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lora_ft import config
from lora_ft.models import accelerated_experts, quantize_experts
from lora_ft.models.acceleration import accelerated
from lora_ft.models.quantize import bitsandbytes_config
from lora_ft.ops import experts as ops_experts
from lora_ft.ops.device import CPU, GPU, Target, standing_for
from lora_ft.ops.experts import expert_lora, module_experts, parameter_names

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
TOKENS, CHOSEN, EXPERTS, RANK, SCALING = 11, 2, 4, 3, 0.7


def module_of(family: str, dtype: torch.dtype, implementation: str = "grouped_mm") -> nn.Module:
    """Return a module of four experts, whose biases are not zero."""
    model = tiny_model(family)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Experts")).to(dtype).requires_grad_(False)
    module.config = copy.deepcopy(module.config)
    module.config._experts_implementation_internal = implementation
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return module


def routing(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the experts of each token, and their scores."""
    draws = torch.Generator().manual_seed(2)
    tokens = 1 if kind == "one token" else TOKENS
    index = torch.stack([torch.randperm(EXPERTS, generator=draws)[:CHOSEN] for _ in range(tokens)])
    if kind == "unused expert":
        index = torch.where(index == 2, 3 - 2 * torch.arange(CHOSEN), index)  # 3 or 1
    if kind == "one expert":
        index = torch.ones_like(index)
    if kind == "no expert for some":
        index[::3, 1] = EXPERTS
    return index, torch.rand(tokens, CHOSEN, generator=draws).to(dtype)


def lora_of(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return random matrices as PEFT lays them out: A [E r, in], B [out, r E]."""
    draws = torch.Generator().manual_seed(len(name))
    rows, columns = getattr(module, name).shape[1:]
    rows, columns = (columns, rows) if module.is_transposed else (rows, columns)
    a = torch.randn(EXPERTS * RANK, columns, generator=draws) * 0.2
    return a.requires_grad_(), (torch.randn(rows, RANK * EXPERTS, generator=draws) * 0.2).requires_grad_()


def fast(module, x, index, scores, loras=(None, None)):
    named = zip(parameter_names(module), loras, strict=True)
    made = {name: expert_lora(*lora, SCALING, EXPERTS, x.dtype) for name, lora in named if lora}
    return module_experts(module, x, index, scores, made)


def plain(module, x, index, scores, loras=(None, None)):
    """Call the module's own forward with W + s B A in place of its weights."""
    merged = {}
    for name, lora in zip(("gate_up_proj", "down_proj"), loras, strict=True):
        weight = getattr(module, name)
        if lora:
            a = lora[0].view(EXPERTS, RANK, -1)
            b = lora[1].view(len(lora[1]), RANK, EXPERTS).permute(2, 0, 1)
            update = SCALING * (b @ a)
            weight = weight + (update.transpose(1, 2) if module.is_transposed else update).to(weight.dtype)
        merged[name] = weight
    return torch.func.functional_call(module, merged, (x, index, scores))


def results(function, module, index, scores, dtype, with_lora):
    """Return the output and all gradients."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(len(index), 64, generator=draws).to(dtype).requires_grad_()
    scores = scores.clone().requires_grad_()
    loras = [lora_of(module, name) for name in ("gate_up_proj", "down_proj")] if with_lora else (None, None)
    if dtype is torch.float64 and with_lora:
        loras = [tuple(m.detach().double().requires_grad_() for m in lora) for lora in loras]
    y = function(module, x, index, scores, loras)
    leaves = [x, scores, *(m for lora in loras if lora for m in lora)]
    dy = torch.randn(y.shape, generator=draws).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


ROUTINGS = ("balanced", "one token", "unused expert", "one expert", "no expert for some")
# deepseek_v3 and qwen3_moe have mixtral's code.
BY_TIME = [pytest.param(f, marks=() if f in ("mixtral", "gpt_oss") else pytest.mark.nightly) for f in FAMILIES]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("family", BY_TIME)
def test_values_and_gradients_equal_the_modules_own_forward_in_float64(family, kind, with_lora):
    module = module_of(family, torch.float64, "eager")
    index, scores = routing(kind, torch.float64)
    if kind == "no expert for some":  # transformers' eager gpt_oss has no such index: a score of zero is the same
        expected = results(plain, module, index.clamp(max=3), scores.where(index < 4, 0.0), torch.float64, with_lora)
        expected[2].masked_fill_(index == EXPERTS, 0.0)
    else:
        expected = results(plain, module, index, scores, torch.float64, with_lora)
    found = results(fast, module, index, scores, torch.float64, with_lora)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["balanced", "one expert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_larger_than_that_of_the_grouped_products(family, kind, dtype):
    index, scores = routing(kind, torch.float32)
    scores = scores.to(dtype)
    rounded = module_of(family, dtype)
    exact = copy.deepcopy(rounded).to(torch.float64)
    exact.config._experts_implementation_internal = "eager"
    for with_lora in (False, True):
        truth = [each.detach() for each in results(plain, exact, index, scores.double(), torch.float64, with_lora)]
        theirs = results(plain, rounded, index, scores, dtype, with_lora)
        ours = results(fast, rounded, index, scores, dtype, with_lora)
        for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
            assert a.dtype == b.dtype, i
            distances = [float((each.double() - c).norm() / c.norm()) for each in (a.detach(), b.detach())]
            assert distances[0] <= max(2 * distances[1], 3 * torch.finfo(dtype).eps), (i, with_lora, distances)


def test_half_precision_value_without_lora_is_that_of_the_grouped_products_to_the_bit():
    for family in FAMILIES:
        module = module_of(family, torch.bfloat16)
        index, scores = routing("balanced", torch.bfloat16)
        x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
        assert torch.equal(fast(module, x, index, scores), plain(module, x, index, scores)), family


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_groups_of_experts_give_the_values_and_gradients_of_single_ones(family, kind, with_lora, monkeypatch):
    index, scores = routing(kind, torch.float32)
    module = module_of(family, torch.float32)
    monkeypatch.setattr(ops_experts, "_group_of", lambda *_: 1)
    single = results(fast, module, index, scores, torch.float32, with_lora)
    right, grouped = ops_experts.grouped_mm, []
    monkeypatch.setattr(ops_experts, "grouped_mm", lambda *given, **more: grouped.append(1) or right(*given, **more))
    for size in (3, 4, 9):
        monkeypatch.setattr(ops_experts, "_group_of", lambda *_, size=size: size)
        for a, b in zip(results(fast, module, index, scores, torch.float32, with_lora), single, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert grouped.pop()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_without_a_gate_compute_as_transformers_does(dtype):
    shape = AutoConfig.for_model("nemotron_h", n_routed_experts=EXPERTS, hidden_size=64, moe_intermediate_size=32,
                                 moe_latent_size=None, layers_block_type=["moe"])  # fmt: skip
    shape._experts_implementation_internal = "eager" if dtype is torch.float64 else "grouped_mm"
    module = NemotronHExperts(shape).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert parameter_names(module) == ("up_proj", "down_proj")
    index, scores = routing("balanced", dtype)
    found = []
    for function in (module, functools.partial(module_experts, module)):
        x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        leaf = scores.clone().requires_grad_()
        y = function(x, index, leaf)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, leaf))])
    tolerance = 1e-6 if dtype is torch.float64 else 0.02
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(*found, strict=True))


def test_groups_are_limited_by_their_bytes_and_by_the_kernel():
    x, one = torch.empty(3, 64, dtype=torch.bfloat16, device="meta"), 2 * 64 * 256
    plain, quantized = module_of("gpt_oss", torch.bfloat16), module_of("gpt_oss", torch.bfloat16)
    quantize_experts.quantize(quantized, bitsandbytes_config(config.Quant(kind=config.QuantKind.nf4), torch.bfloat16))
    devices = (GPU, Target("cuda", (7, 5)), CPU)
    for module, expected in ((quantized, (ops_experts._GROUP_BYTES // one, 1, 1)), (plain, (EXPERTS, 1, EXPERTS))):
        for device, size in zip(devices, expected, strict=True):
            with standing_for(device):
                assert ops_experts._group_of(module, x) == size
                assert ops_experts._group_of(module, x.double()) == 1


def test_backward_keeps_the_input_once_and_no_weight():
    module = module_of("mixtral", torch.float32)
    index, scores = routing("balanced", torch.float32)
    x = torch.randn(TOKENS, 64).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(module, x, index, scores)
    gate_inputs = TOKENS * CHOSEN * 2 * 128
    assert sum(kept.values()) == 4 * (x.numel() + scores.numel() + gate_inputs)


def test_nothing_is_kept_without_gradients():
    module = module_of("mixtral", torch.float32)
    index, scores = routing("balanced", torch.float32)
    made = fast(module, torch.randn(TOKENS, 64), index, scores)
    assert made.grad_fn is None
    with torch.no_grad():
        x = torch.randn(TOKENS, 64, requires_grad=True)
        assert torch.equal(fast(module, x, index, scores), fast(module, x.detach(), index, scores))


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated_experts_train_as_transformers_do_and_are_restored(family, monkeypatch):
    model = tiny_model(family).requires_grad_(False)
    modules = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    ids, called = torch.arange(4, 20)[None], []
    off = config.Fast(**{field.name: False for field in fields(config.Fast) if field.type is bool} | {"mlp": True})

    def result() -> list[Tensor]:
        called.clear()
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), embedded)]

    def counted(module: nn.Module, *given: Tensor) -> Tensor:
        called.append(module)
        return module_experts(module, *given)

    monkeypatch.setattr(accelerated_experts, "module_experts", counted)
    before = result()
    with accelerated(model, off) as made:
        assert f"accelerated experts: {len(modules)}" in made.reasons
        for a, b in zip(result(), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        assert called == modules
        with torch.no_grad():
            called.clear()
            model(ids)
        assert called == []
        modules[-1].requires_grad_()  # adapter.modules_to_save=[experts]
        result()
        assert called == modules[:-1]
    assert all(torch.equal(a, b) for a, b in zip(result(), before, strict=True)) and called == []


def test_class_that_computes_something_else_keeps_its_forward():
    model = tiny_model("mixtral")
    changed = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")
    changed.__class__ = type("Halved", (type(changed),), {"forward": halved})
    forwards, lines = accelerated_experts.fast_forwards(model)
    assert changed not in forwards and len(forwards) == 1
    assert lines == ["accelerated experts: 1", "experts compute as transformers does: Halved"]


def halved(self: nn.Module, *given: Tensor) -> Tensor:
    return super(type(self), self).forward(*given) / 2
