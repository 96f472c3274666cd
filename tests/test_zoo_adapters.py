"""Every family of the zoo: the layers that an adapter takes, one step of training, PEFT alone, and all parameters."""

import functools
import json
import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from zoo import ZOO_BY_TIME, zoo_config, zoo_model

from lora_ft import config
from lora_ft.adapters import attach, audit, summary, targets
from lora_ft.adapters import text_path as traced_paths
from lora_ft.adapters.accounting import Part, account
from lora_ft.adapters.text_path import (
    LINEAR,
    NO_TENSOR,
    NOT_CALLED,
    WEIGHT_READ,
    adaptable_layers,
    text_path,
)
from lora_ft.errors import ConfigError
from lora_ft.models.load import Base, Identity
from lora_ft.models.meta_quantize import quantize_meta
from lora_ft.models.quantize import planned_layers
from lora_ft.models.quantize_experts import planned_parameters
from lora_ft.ops.lora_linear import lora_linear, lora_linear_plain
from lora_ft.ops.weights import FrozenWeight, frozen_linear
from lora_ft.publishing.adapter_facts import _shapes_of_base

IDS = torch.arange(12)[None] * 37 % 512

# Names of the layers that are left out, by reason; all other linear layers but the head are adapted.
LEFT_OUT = {
    "bamba falcon_h1 granitemoehybrid mamba2 nemotron_h": (WEIGHT_READ, "out_proj"),
    "falcon_mamba mamba": (WEIGHT_READ, "dt_proj out_proj x_proj"),
    "gemma3n_text": (NOT_CALLED, "correction_coefs"),
    "jamba": (WEIGHT_READ, "dt_proj"),
    "gemma3": (NOT_CALLED, "q_proj k_proj v_proj out_proj fc1 fc2"),
    "llama4_text phimoe": (NO_TENSOR, "router"),
}


@dataclass(frozen=True)
class Attached:
    """A base with an adapter; `owners` and `parts` are its parameters' modules and parts before it was attached."""

    base: PreTrainedModel
    selection: targets.Selection
    owners: dict[str, torch.nn.Module]
    parts: dict[str, Part]
    model: PeftModel


@functools.lru_cache(maxsize=1)
def attached(name: str) -> Attached:
    base = zoo_model(name).requires_grad_(False)
    selection = targets.select(base, config.Adapter())
    owners = {n: base.get_submodule(n.rpartition(".")[0]) for n, _ in base.named_parameters()}
    parts = account(base, selection, config.Adapter())
    return Attached(base, selection, owners, parts, attach.attach(base, config.Adapter(r=2), "first", 1, []))


@pytest.mark.parametrize("name", ZOO_BY_TIME)
def test_adapter_of_a_family(name: str) -> None:
    made = attached(name)
    check_layers(name, made)
    check_first_step(made)
    check_that_peft_finds_the_same_layers(name, made)
    check_that_every_parameter_is_accounted_for(made)


def check_layers(name: str, made: Attached) -> None:
    reason, layers = next((out for families, out in LEFT_OUT.items() if name in families.split()), ("", ""))
    assert {targets.short(layer) for layer in made.selection.left_out} == set(layers.split())
    assert set(made.selection.left_out.values()) <= {reason}
    assert adapted(made.base) == {*made.selection.layers, *made.selection.experts}


def check_first_step(made: Attached) -> None:
    logits = made.model.train()(input_ids=IDS, use_cache=False).logits
    cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    parameters = attach.trainable(made.model, "first")
    audit.check_trainable(made.model, "first", parameters)
    audit.check_gradients(parameters)


def check_that_peft_finds_the_same_layers(name: str, made: Attached) -> None:
    saved = LoraConfig(
        r=2, lora_alpha=32, target_modules=list(made.selection.modules),
        target_parameters=list(made.selection.parameters), task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = type(made.base)._from_config(zoo_config(name))
        alone = get_peft_model(fresh, saved)
    assert adapted(fresh) == {*made.selection.layers, *made.selection.experts}
    state = get_peft_model_state_dict(made.model, adapter_name="first", save_embedding_layers=False)
    loaded = set_peft_model_state_dict(alone, {key: tensor.to("meta") for key, tensor in state.items()})
    assert loaded.unexpected_keys == []
    assert not [key for key in loaded.missing_keys if "lora_" in key]


def check_that_every_parameter_is_accounted_for(made: Attached) -> None:
    taken = {name.removesuffix(".weight") for name, part in made.parts.items() if part is Part.ADAPTED}
    assert taken == {*made.selection.layers, *made.selection.experts}
    assert made.parts.keys() == made.owners.keys()
    for name, part in made.parts.items():
        owner, layer = made.owners[name], name.removesuffix(".weight")
        dims = owner.get_parameter(name.rpartition(".")[2]).dim()
        match part:
            case Part.ADAPTED if name in made.selection.experts:
                assert dims == 3 and ".experts." in name
            case Part.ADAPTED:
                assert dims == 2 and isinstance(owner, LINEAR)
            case Part.LEFT_OUT:
                assert layer in made.selection.left_out
            case Part.VECTOR:
                assert dims < 2 or (dims == 2 and name.endswith(("gate_up_proj_bias", "down_proj_bias")))
            case Part.HEAD | Part.EMBEDDING:
                assert isinstance(owner, torch.nn.Linear if part is Part.HEAD else torch.nn.Embedding)
            case Part.OFF_PATH:
                assert any(word in name for word in ("vision", "projector", "correction_bias"))
            case Part.OTHER if dims == 3:  # no matrix of an expert is left without an adapter
                assert "conv" in name or "rg_lru" in name
            case _:
                assert part is Part.OTHER and not isinstance(owner, (*LINEAR, torch.nn.Embedding))


def adapted(base: PreTrainedModel) -> set[str]:
    """Return the layers with an adapter, and the parameters that are not a layer's weight."""
    return {
        f"{name}.{getattr(layer, 'parameter_name', 'weight')}".replace(".base_layer", "").removesuffix(".weight")
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
    }


@functools.cache
def meta_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return type(zoo_model(name))._from_config(zoo_config(name))


def select(name: str, *chosen: str, exclude: tuple[str, ...] = ()) -> targets.Selection:
    return targets.select(meta_model(name), config.Adapter(target_modules=list(chosen), exclude=list(exclude)))


def test_names_select_the_text_tower_only() -> None:
    found = select("gemma3", "q_proj", "v_proj")
    assert all("language_model" in layer for layer in found.layers) and len(found.layers) == 4
    assert found.left_out == dict.fromkeys(found.left_out, NOT_CALLED)
    assert {targets.short(layer) for layer in found.left_out} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"fc1 matches only layers .* not called by a text forward\): choose from"):
        select("gemma3", "fc1")


@pytest.mark.parametrize(
    ("chosen", "exclude", "expected"),
    [
        (["all-linear"], ["mlp"], {"layers.0": 4, "layers.1": 4}),
        (["all-linear"], ["layers.0"], {"layers.1": 7}),
        (["all-linear"], [r".*\.0\..*", "down_proj"], {"layers.1": 6}),
        ([r"model\.layers\.[1-9]\.self_attn\.(q|k)_proj"], [], {"layers.1": 2}),
        ([r".*(up|down)_proj", "o_proj"], ["layers.1.mlp.up_proj"], {"layers.0": 3, "layers.1": 2}),
    ],
)
def test_expressions_and_exclusions_select_by_whole_names(chosen: list, exclude: list, expected: dict) -> None:
    found = select("llama", *chosen, exclude=tuple(exclude))
    counts = {f"layers.{i}": sum(f"layers.{i}." in layer for layer in found.layers) for i in range(2)}
    assert {key: count for key, count in counts.items() if count} == expected
    names = [name for name, _ in meta_model("llama").named_modules()]
    assert targets.matched_layers(names, found.modules) == set(found.layers)


@pytest.mark.parametrize(
    ("chosen", "exclude", "message"),
    [
        (["q_proj"], ["qq_proj"], "adapter.exclude: qq_proj matches no linear layer of this model"),
        (["q_proj"], ["self_attn"], r"adapter.target_modules=\[q_proj\] leaves no layer to adapt"),
        (["q_proj("], [], r"q_proj\( is not a regular expression"),
        ([".*_prj"], [], r"adapter.target_modules: \.\*_prj matches no layer"),
    ],
)
def test_selections_that_cannot_be_meant_are_refused(chosen: list, exclude: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select("llama", *chosen, exclude=tuple(exclude))


@pytest.mark.parametrize("name", ["gemma3", "phimoe", "jamba"])
def test_loaded_model_and_model_without_values_select_the_same_layers_by_one_trace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = targets.select(zoo_model(name), config.Adapter())
    monkeypatch.delattr(traced_paths, "_trace")
    assert loaded == targets.select(meta_model(name), config.Adapter())
    assert text_path(meta_model(name)) is text_path(meta_model(name))


def test_model_that_does_not_run_without_values_keeps_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo_model("llama")
    monkeypatch.setattr(traced_paths, "_traces", {})
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: torch.zeros(2).cpu().numpy()[5])
    linear = [n for n, m in adaptable_layers(model).items() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert list(targets.select(model, config.Adapter()).layers) == linear


def test_error_of_peft_is_a_config_error_and_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such layer")

    base = zoo_model("llama")
    before = [type(module) for module in base.modules()]
    monkeypatch.setattr(attach, "get_peft_model", refuse)
    with pytest.raises(ConfigError, match="PEFT cannot attach this adapter to llama: no such layer"):
        attach.attach(base, config.Adapter(), "first", 1, [])
    assert [type(module) for module in base.modules()] == before


@pytest.mark.parametrize("name", ["gemma3", "llama4_text", "phimoe", "gpt2", "jamba"])
def test_quantized_layers_are_the_planned_ones(name: str) -> None:
    model = zoo_model(name).to("meta")
    planned = planned_layers(model) + planned_parameters(model)
    quantized = quantize_meta(model, config.Quant(kind=config.QuantKind.nf4), torch.float32)
    assert quantized == tuple(planned) == (*planned_layers(model), *planned_parameters(model))
    assert not any("router" in layer for layer in planned)
    assert sum("experts" in name for name in planned) == {"phimoe": 4, "jamba": 2}.get(name, 0)


def test_model_without_a_layer_to_quantize_is_refused() -> None:
    with pytest.raises(ConfigError, match="falcon has no linear layer of torch's class to quantize: set quant=none"):
        planned_layers(meta_model("falcon"))


@pytest.mark.parametrize(
    ("name", "layers"), [("mamba", "dt_proj"), ("gemma3n_text", "correction_coefs"), ("bamba", "")]
)
def test_weights_that_code_reads_past_their_layers_cannot_be_quantized(name: str, layers: str) -> None:
    cfg = config.TrainRun(quant=config.Quant(kind=config.QuantKind.nf4), adapter=config.Adapter(r=2))
    with torch.device("meta"):
        model = type(meta_model(name))._from_config(zoo_config(name))
    base = Base(model.requires_grad_(False), tiny_tokenizer(), Identity(*[None] * len(fields(Identity))), ())
    if not layers:
        assert summary.layers(base, cfg).quantized > 0
        return
    with pytest.raises(ConfigError, match=rf"quant=nf4: the code of {name} reads the weights of {layers} outside"):
        summary.layers(base, cfg)


@pytest.mark.parametrize("tag", ["Infinity", "NaN"])
def test_config_with_numbers_that_json_does_not_have_describes_the_base(tag: str) -> None:
    written = json.loads(zoo_config("mamba2").to_json_string())
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    written["time_step_limit"][1]["__float__"] = tag
    shapes, tied = _shapes_of_base(written)
    assert tied is False
    assert shapes == {name: tuple(tensor.shape) for name, tensor in meta_model("mamba2").state_dict().items()}


def test_product_of_a_fast_layer_can_be_changed_in_place() -> None:
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(shape) for shape in ((2, 3, 8), (6, 8), (2, 8), (6, 2)))
    gradients = []
    for product in (lora_linear, lora_linear_plain):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        frozen = FrozenWeight(lambda: weight, fresh=False) if product is lora_linear else weight
        y = product(leaves[0], frozen, None, *leaves[1:], 0.5)
        y *= 3
        y.square().sum().backward()
        gradients.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(fast, plain, rtol=1e-5, atol=1e-4) for fast, plain in zip(*gradients, strict=True))


def test_product_of_a_frozen_layer_can_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8)
    y = frozen_linear(x, lambda: weight, None)
    y *= 3
    assert torch.equal(y, 3 * torch.nn.functional.linear(x, weight))
    y.sum().backward()
    assert torch.allclose(x.grad, 3 * weight.sum(dim=0).expand_as(x))
