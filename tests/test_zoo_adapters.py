"""Every family of the zoo: the layers that an adapter takes, one step of training, PEFT alone, and all parameters."""

import functools
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from zoo import ZOO, zoo_config, zoo_model

from lora_ft import config
from lora_ft.adapters import attach, audit, targets
from lora_ft.adapters.accounting import Part, account
from lora_ft.adapters.text_path import (
    NO_TENSOR,
    NOT_CALLED,
    REFUSED,
    WEIGHT_READ,
    adaptable_layers,
    text_path,
)
from lora_ft.errors import ConfigError
from lora_ft.models.quantize import planned_layers

IDS = torch.arange(48).reshape(2, 24) * 37 % 512

# Names of the layers that are left out, by reason; all other linear layers but the head are adapted.
LEFT_OUT = {
    **dict.fromkeys(
        ["deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "qwen3_next"],
        {REFUSED: {"gate_proj", "up_proj", "down_proj"}},
    ),
    **dict.fromkeys(["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"], {WEIGHT_READ: {"out_proj"}}),
    **dict.fromkeys(["falcon_mamba", "mamba"], {WEIGHT_READ: {"dt_proj", "out_proj", "x_proj"}}),
    "jamba": {WEIGHT_READ: {"dt_proj"}},
    "gemma3": {NOT_CALLED: {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}},
    **dict.fromkeys(["llama4_text", "phimoe"], {NO_TENSOR: {"router"}}),
}


@functools.cache
def family(name: str) -> tuple[PreTrainedModel, targets.Selection, PeftModel]:
    """Return a base, the selection of all-linear, and the base with an adapter; one base of a family is kept."""
    base = zoo_model(name).requires_grad_(False)
    selection = targets.select(base, config.Adapter())
    return base, selection, attach.attach(base, config.Adapter(r=2), "first", 1, [])


@pytest.mark.parametrize("name", ZOO)
def test_first_step_reaches_every_layer_that_is_not_left_out(name: str) -> None:
    base, selection, model = family(name)
    by_reason: dict[str, set[str]] = {}
    for layer, reason in selection.left_out.items():
        by_reason.setdefault(reason, set()).add(targets.short(layer))
    assert by_reason == LEFT_OUT.get(name, {})
    assert adapted(base) == set(selection.layers)
    logits = model.train()(input_ids=IDS, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    parameters = attach.trainable(model, "first")
    audit.check_trainable(model, "first", parameters)
    audit.check_gradients(parameters)


@pytest.mark.parametrize("name", ZOO)
def test_peft_alone_finds_exactly_the_layers_by_the_saved_names(name: str) -> None:
    base, selection, model = family(name)
    with torch.device("meta"):
        fresh = type(base)._from_config(zoo_config(name))
        saved = LoraConfig(r=2, lora_alpha=32, target_modules=list(selection.names), task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = get_peft_model(fresh, saved)
    assert adapted(fresh) == set(selection.layers)
    state = get_peft_model_state_dict(model, adapter_name="first", save_embedding_layers=False)
    loaded = set_peft_model_state_dict(alone, {key: tensor.to("meta") for key, tensor in state.items()})
    assert loaded.unexpected_keys == []
    assert not [key for key in loaded.missing_keys if "lora_" in key]


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_accounted_for(name: str) -> None:
    base, selection, _ = family(name)
    with torch.device("meta"):
        fresh = type(base)._from_config(zoo_config(name))
    parameters = dict(fresh.named_parameters())
    parts = account(fresh, selection, config.Adapter())
    assert parts.keys() == parameters.keys()
    assert {n.removesuffix(".weight") for n, part in parts.items() if part is Part.ADAPTED} == set(selection.layers)
    assert not [n for n, part in parts.items() if part is Part.NOT_CHOSEN]
    head = fresh.get_output_embeddings()
    for parameter, part in parts.items():
        owner = fresh.get_submodule(parameter.rpartition(".")[0])
        dims = parameters[parameter].dim()
        match part:
            case Part.VECTOR:
                assert dims < 2, parameter
            case Part.HEAD:
                assert owner is head
            case Part.EMBEDDING:
                assert isinstance(owner, torch.nn.Embedding)
            case Part.OFF_PATH:
                assert "vision" in parameter or "projector" in parameter
            case Part.LEFT_OUT:
                assert parameter.removesuffix(".weight") in selection.left_out
            case Part.EXPERTS:
                assert "expert" in parameter or "moe" in parameter
            case Part.OTHER:
                assert not isinstance(owner, torch.nn.Linear)
    linear = {n.removesuffix(".weight") for n, part in parts.items() if part in (Part.ADAPTED, Part.LEFT_OUT)}
    assert linear <= set(planned_layers(fresh))


def adapted(base: PreTrainedModel) -> set[str]:
    return {name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


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
    with pytest.raises(ConfigError, match=r"fc1 matches only layers .* a text forward does not call it\): choose from"):
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
    assert targets.matched_layers(names, found.names) == set(found.layers)


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
def test_loaded_model_and_model_without_values_select_the_same_layers(name: str) -> None:
    loaded = targets.select(zoo_model(name), config.Adapter())
    assert loaded == targets.select(meta_model(name), config.Adapter())
    assert text_path(meta_model(name)) is text_path(meta_model(name))


def test_model_that_does_not_run_without_values_keeps_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo_model("llama")
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
