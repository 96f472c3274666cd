"""Attaching an adapter: the layers it is attached to, the parameters that train, and the settings that are refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES, tiny_folder, tiny_model

from lora_ft import config
from lora_ft.adapters import attach, audit, targets
from lora_ft.adapters.text_path import adaptable_layers
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.models.load import load_base

IDS = torch.tensor([[5, 99, 42, 7, 300]])


def attached(
    family: str = "llama",
    *,
    tie: bool = False,
    tokens: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    **settings: object,
) -> PeftModel:
    model = tiny_model(family, tie=tie, dtype=dtype).requires_grad_(False)
    return attach.attach(model, config.Adapter(**{"r": 4, **settings}), "first", seed, list(tokens))


@pytest.mark.closes("A15", "A21")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_only_the_adapter_trains_with_the_size_given_by_its_ranks(family: str, settings: dict) -> None:
    model = attached(family, **settings)
    parameters = attach.trainable(model, "first")
    assert audit.check_trainable(model, "first", parameters) == sum(p.numel() for p in parameters.values())
    assert all(p.dtype == torch.float32 for p in parameters.values())


def test_ranks_that_differ_by_layer_are_counted() -> None:
    model = attached(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 8})
    found = audit.check_trainable(model, "first", attach.trainable(model, "first"))
    assert found == 2 * (4 * (64 + 64) + 2 * (64 + 32))


@pytest.mark.closes("A21")
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_selects_every_linear_layer_except_the_head(family: str) -> None:
    model = tiny_model(family)
    found = targets.select(model, config.Adapter())
    assert set(found.layers) == {n for n in adaptable_layers(model) if ".0." in n or ".1." in n}
    assert all("." not in name for name in found.modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapter_computes_the_same_as_the_base(family: str) -> None:
    expected = tiny_model(family)(input_ids=IDS).logits
    model = attached(family).eval()
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.closes("A23")
def test_initial_matrices_depend_only_on_the_seed() -> None:
    torch.manual_seed(5)
    first = attach.trainable(attached(seed=3), "first")
    torch.manual_seed(6)
    second, other = attach.trainable(attached(seed=3), "first"), attach.trainable(attached(seed=4), "first")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.closes("A17")
def test_adapter_is_float32_over_a_bfloat16_base() -> None:
    model = attached(dtype=torch.bfloat16)
    assert {p.dtype for p in attach.trainable(model, "first").values()} == {torch.float32}


@pytest.mark.closes("A21")
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj", "qq_proj"]}, r"adapter\.target_modules: qq_proj matches no layer.*q_proj"),
        (
            {"target_modules": ["v_proj"], "rank_pattern": {"k_proj": 2}},
            r"adapter\.rank_pattern: k_proj matches no adapted layer",
        ),
        ({"rank_pattern": {"k_proj": 0}}, r"adapter\.rank_pattern: the value of k_proj must be above 0, got 0"),
        ({"modules_to_save": ["nrom"]}, r"adapter\.modules_to_save: nrom matches no layer"),
    ],
)
def test_names_that_match_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached(**settings)


@pytest.mark.closes("A20")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_adapter_of_one_of_two_tied_matrices_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="shares its weight"):
        attached(tie=True, **settings)
    model = attached(tie=False, **settings)
    audit.check_trainable(model, "first", attach.trainable(model, "first"))


@pytest.mark.closes("A17")
@pytest.mark.parametrize(("tie", "modules"), [(True, []), (False, ["norm", "mlp"])])
def test_saved_modules_and_added_tokens_are_float32_over_a_bfloat16_base(tie: bool, modules: list[str]) -> None:
    model = attached(dtype=torch.bfloat16, tie=tie, modules_to_save=modules, tokens=(510, 511))
    parameters = attach.trainable(model, "first")
    audit.check_trainable(model, "first", parameters)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    model(input_ids=torch.tensor([[510, 7, 511]])).logits.logsumexp(-1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in parameters.items() if ".lora_" not in n)


@pytest.mark.closes("A22")
@pytest.mark.parametrize("tie", [False, True])
def test_only_the_rows_of_added_tokens_train(tie: bool) -> None:
    model = attached(tie=tie, tokens=(510, 511))
    parameters = attach.trainable(model, "first")
    audit.check_trainable(model, "first", parameters)
    rows = {n: p for n, p in parameters.items() if "trainable_tokens" in n}
    assert {tuple(p.shape) for p in rows.values()} == {(2, 64)}
    model(input_ids=torch.tensor([[510, 7, 511]])).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in rows.values())


def test_audit_finds_a_base_that_trains() -> None:
    model = attached()
    next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_()
    with pytest.raises(MismatchError, match=r"also trained.*norm"):
        audit.check_trainable(model, "first", attach.trainable(model, "first"))


@pytest.mark.closes("A15")
def test_audit_finds_a_frozen_matrix() -> None:
    model = attached()
    parameters = attach.trainable(model, "first")
    next(iter(parameters.values())).requires_grad_(False)
    with pytest.raises(MismatchError, match=r"not trained.*lora_A"):
        audit.check_trainable(model, "first", parameters)


@pytest.mark.closes("A16")
def test_audit_finds_a_matrix_that_never_moved() -> None:
    parameters = attach.trainable(attached(), "first")
    before = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        *rest, last = (p for n, p in parameters.items() if "lora_B" in n)
        for p in rest:
            p.add_(1)
        with pytest.raises(MismatchError, match="1 adapter matrices never moved"):
            audit.check_moved(before, parameters)
        last.add_(1)
        audit.check_moved(before, parameters)


@pytest.mark.closes("A16")
def test_audit_finds_a_matrix_without_a_gradient() -> None:
    model = attached()
    parameters = attach.trainable(model, "first")
    model(input_ids=IDS).logits.sum().backward()
    audit.check_gradients(parameters)
    next(p for n, p in parameters.items() if "lora_B" in n).grad.zero_()
    with pytest.raises(MismatchError, match="1 adapter matrices get no gradient"):
        audit.check_gradients(parameters)


@pytest.mark.closes("D07")
def test_adapter_name_that_contains_another_is_another_adapter() -> None:
    model = attached()
    model.add_adapter("first0", model.peft_config["first"])
    assert len(attach.trainable(model, "first")) == len(attach.trainable(model, "first0")) == 28


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_layer_in_modules_to_save_is_refused(kind: str, tmp_path: Path) -> None:
    quant = config.Quant(kind=config.QuantKind[kind])
    model = load_base(config.Model(path=str(tiny_folder(tmp_path, "llama"))), quant, "cpu").model
    with pytest.raises(ConfigError, match=r"modules_to_save: down_proj is quantized"):
        attach.attach(model, config.Adapter(target_modules=["q_proj"], modules_to_save=["down_proj"]), "first", 1, [])


def test_changed_base_is_an_error() -> None:
    audit.check_base_unchanged("a", "a")
    with pytest.raises(MismatchError, match="changed during training"):
        audit.check_base_unchanged("a", "b")
