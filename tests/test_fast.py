"""LoRA layers as one function give the same numbers as PEFT's forward, and PEFT's switches keep working."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter, adapted, relative
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FAMILIES, VOCABULARY, tiny_folder, tiny_model
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models import accelerated_lora as lora_layers
from lora_ft.models.acceleration import accelerate, accelerated_lora
from lora_ft.models.load import load_base
from lora_ft.ops.batch import Batch
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.lora_linear import lora_linear, lora_linear_plain, merging_pays
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.ops.weights import FrozenWeight
from lora_ft.values import QuantKind

IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])


def learned(model: PeftModel, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradient of all adapter parameters."""
    parameters = list(attach.trainable(model, "first").values())
    logits = model(input_ids=ids).logits
    gradients = torch.autograd.grad(logits.square().sum(), parameters)
    return logits.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear_passes_gradcheck_and_equals_its_definition(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*shape, 6), (2, 6), (4, 2)))
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if with_bias else None
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], FrozenWeight(lambda: weight, False), bias, t[1], t[2], 1.7), (x, a, b)
    )
    found = lora_linear(x, FrozenWeight(lambda: weight, False), bias, a, b, 1.7)
    assert relative(found, lora_linear_plain(x, weight, bias, a, b, 1.7)) < 1e-15


def test_backward_skips_an_input_that_requires_no_gradient() -> None:
    """At the first adapted layer the backward does not need the weight, so it is not dequantized again."""
    x, a, b = torch.randn(3, 6), torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    calls: list[int] = []
    weight = torch.randn(4, 6)
    lora_linear(x, FrozenWeight(lambda: calls.append(1) or weight, False), None, a, b, 1.0).sum().backward()
    assert len(calls) == 1
    assert a.grad is not None and b.grad is not None


@pytest.mark.closes("A19")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_fast_lora_layers_give_the_same_logits_and_gradients(family: str, dtype: torch.dtype, bound: float) -> None:
    model = adapted(tiny_model(family, dtype=dtype))
    expected = learned(model)
    assert accelerate_adapter(model, "first") == []
    assert all(relative(f, e) < bound for f, e in zip(learned(model), expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("num_tokens", [6, 120])  # with many tokens, the merged form is used
def test_fast_lora_layers_on_quantized_bases_give_the_same_logits_and_gradients(
    family: str, kind: str, num_tokens: int, tmp_path: Path
) -> None:
    quant = config.Quant(kind=config.QuantKind[kind])
    model = adapted(load_base(config.Model(path=str(tiny_folder(tmp_path, family))), quant, "cpu").model).train()
    switch_off_dropout(model)
    ids = torch.randint(4, VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    expected = learned(model, ids)
    assert accelerate_adapter(model, "first") == []
    assert all(relative(f, e) < 2e-5 for f, e in zip(learned(model, ids), expected, strict=True))


@pytest.mark.parametrize("fresh", [False, True])
def test_merged_form_equals_the_definition_and_does_not_change_the_stored_weight(fresh: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b, w = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((40, 6), (2, 6), (4, 2), (4, 6)))
    for tensor in (x, a, b):
        tensor.requires_grad_()
    before = w.clone()
    weight = FrozenWeight((lambda: w.clone()) if fresh else (lambda: w), fresh)
    assert merging_pays(40, w) and not merging_pays(2, w)
    results = []
    for y in (lora_linear(x, weight, None, a, b, 1.7), lora_linear_plain(x, w, None, a, b, 1.7)):
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))))
    assert all(relative(f, e) < 1e-14 for f, e in zip(*results, strict=True))
    assert torch.equal(w, before)


def test_fast_form_runs_in_training_and_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(lora_layers, "lora_linear", lambda *a: calls.append(a[5]) or lora_linear(*a))
    model = adapted(tiny_model("llama"), lora_alpha=6)
    expected = model(input_ids=IDS).logits
    accelerate_adapter(model, "first")
    learned(model)
    assert calls == [2.0] * 14
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected.detach())
    assert len(calls) == 28


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_dora_and_dropout_give_the_same_logits_and_gradients(
    family: str, settings: dict[str, Any], dtype: torch.dtype, bound: float
) -> None:
    """Dropout draws the masks that PEFT draws."""
    model = adapted(tiny_model(family, dtype=dtype), **settings).train()
    switch_off_dropout_of_base(model)
    results = []
    for forward in ("plain", "fast"):
        if forward == "fast":
            assert accelerate_adapter(model, "first") == []
        torch.manual_seed(5)
        results.append(learned(model))
    assert all(relative(f, e) < bound for f, e in zip(*results, strict=True))


def switch_off_dropout_of_base(model: PeftModel) -> None:
    """Set the base's own dropout to zero, not the adapter's."""
    probabilities = [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    switch_off_dropout(model)
    for name, layer in model.named_modules():
        if "lora_dropout" in name and isinstance(layer, torch.nn.Dropout):
            layer.p = max(probabilities)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_on_quantized_bases_gives_the_same_logits_and_gradients(kind: str, tmp_path: Path) -> None:
    quant = config.Quant(kind=config.QuantKind[kind])
    base = load_base(config.Model(path=str(tiny_folder(tmp_path, "llama"))), quant, "cpu").model
    model = adapted(base, use_dora=True).train()
    expected = learned(model)
    assert accelerate_adapter(model, "first") == []
    assert all(relative(f, e) < 2e-5 for f, e in zip(learned(model), expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_with_biases_computes_as_peft_does() -> None:
    """lora_ft trains none, but loads adapters that have them."""
    settings = LoraConfig(r=3, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(tiny_model("gpt2"), settings, adapter_name="first").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = model(input_ids=IDS).logits
    with accelerated_lora(model, "first", config.Fast()) as reasons:
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert reasons == ["2 LoRA layers compute as PEFT does: lora_bias"]


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_few_rows_of_a_4_bit_layer_take_its_own_product_without_gradients(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(config.Model(path=str(tiny_folder(tmp_path, "llama"))), config.Quant(kind=QuantKind.nf4), "cpu")
    model, calls = adapted(base.model), []
    accelerate_adapter(model, "first")
    monkeypatch.setattr(lora_layers, "lora_linear", lambda *a: calls.append(1) or lora_linear(*a))
    ids = torch.randint(4, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)
    assert len(calls) == (0 if rows < 64 else 14)
    model(input_ids=ids)
    assert len(calls) == (14 if rows < 64 else 28)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_head_gives_the_same_loss_without_all_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model(family, dtype=torch.float64), target_modules=["lm_head"])
    batch = Batch(IDS[0], torch.arange(IDS.shape[1]), IDS[0].roll(-1), [0, IDS.shape[1]])
    parameters = list(attach.trainable(model, "first").values())
    base = model.get_base_model()
    paths = accelerate(base, config.Fast()).paths

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        loss = token_loss_sum(base, batch, paths)
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    expected = loss_and_gradient()
    assert accelerate_adapter(model, "first") == []
    monkeypatch.setattr(model.get_base_model().get_output_embeddings(), "forward", None)
    assert all(relative(f, e) < 1e-12 for f, e in zip(loss_and_gradient(), expected, strict=True))
    with torch.no_grad():
        model.eval()
        assert relative(token_loss_sum(base, batch, paths), expected[0]) < 1e-12


def test_peft_switches_work_on_fast_layers() -> None:
    bare = tiny_model("llama")
    plain, model = adapted(tiny_model("llama")), adapted(tiny_model("llama"))
    for m in (plain, model):
        m.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for (_, p), (_, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            q.copy_(p)
    with accelerated_lora(model, "first", config.Fast()), accelerated_lora(model, "second", config.Fast()):
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, bare(input_ids=IDS).logits)
        for active in ("second", "first"):
            for m in (plain, model):
                m.set_adapter(active)
            torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
        for m in (plain, model):
            m.merge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("dtype", "settings", "reason"),
    [
        (
            torch.float32,
            {"use_dora": True, "lora_dropout": 0.1},
            "14 LoRA layers compute as PEFT does: DoRA with adapter.lora_dropout",
        ),
        (torch.float32, {"target_modules": ["embed_tokens"]}, "1 LoRA layers compute as PEFT does: embeddings"),
    ],
)
def test_layers_without_fast_form_are_logged_and_use_pefts_forward(
    dtype: torch.dtype, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model("llama", dtype=dtype), **settings).train()
    results = []
    for step in range(2):
        torch.manual_seed(5)
        results.append(learned(model))
        if step == 0:
            (line,) = accelerate_adapter(model, "first")
            assert line.startswith(reason)
            monkeypatch.setattr(lora_layers, "lora_linear", None)
    assert all(torch.equal(f, e) for f, e in zip(*results, strict=True))
