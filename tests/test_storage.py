"""Weights stored in bfloat16 under a model that computes in float32 take half the bytes and give the same bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter
from accelerated import adapted as attach_random
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerate, dequantized_weights
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import load_base
from lora_ft.models.storage import copy_mapped_weights
from lora_ft.ops.dropout import switch_off_dropout

IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])
STORAGE = config.Fast(attention=False, loss=False, lora=False, norm=False, mlp=False, rope=False)


def store_in_bfloat16(model: Any, *, but: tuple[str, ...] = (), check: bool = True) -> int:
    """Accelerate only the storage; return the number of bytes saved."""
    before = sum(p.nbytes for p in model.parameters())
    accelerate(model, STORAGE, modules_to_save=but, check=check)
    return before - sum(p.nbytes for p in model.parameters())


def base_of(tmp_path: Path, family: str) -> Any:
    """Load a float32 model from a bfloat16 checkpoint; each call loads it again."""
    folder = tmp_path / family
    if not folder.is_dir():
        tiny_folder(tmp_path, family, dtype=torch.bfloat16)
    model = load_base(config.Model(path=str(folder)), config.Quant(), "cpu").model
    switch_off_dropout(model)
    return model


def adapted(model: Any, use_fast: bool, **settings: object) -> Any:
    made = attach_random(model, **settings)
    if use_fast:
        accelerate_adapter(made, "first")
    return made.train()


def learned(model: Any) -> list[Tensor]:
    """Return parameters, logits and gradients."""
    parameters = list(attach.trainable(model, "first").values())
    torch.manual_seed(3)  # for dropout
    logits = model(input_ids=IDS).logits
    return [*(p.detach() for p in parameters), logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters)]


def saved_bytes(model: Any) -> int:
    """Return the expected saving: two bytes for each weight of a linear layer inside the blocks."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    return sum(2 * layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_storage_saves_two_bytes_per_linear_weight_and_changes_no_logit_and_no_hash(
    tmp_path: Path, family: str
) -> None:
    model = base_of(tmp_path, family)
    before, expected = fingerprint(model), model(input_ids=IDS).logits
    assert store_in_bfloat16(model) == saved_bytes(model) > 0
    assert model.dtype == torch.float32
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert fingerprint(model) == before
    assert store_in_bfloat16(model) == 0
    layer = next(m for m in model.modules() if hasattr(m, "compute_dtype"))
    layer.weight.data[0, 0] += 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_has_the_same_gradients_over_stored_and_full_weights(
    tmp_path: Path, family: str, use_fast: bool, settings: dict[str, Any]
) -> None:
    full, stored = base_of(tmp_path, family), base_of(tmp_path, family)
    assert store_in_bfloat16(stored)
    full, stored = adapted(full, use_fast, **settings), adapted(stored, use_fast, **settings)
    for found, expected in zip(learned(stored), learned(full), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_adapter_gives_the_base_to_the_bit(tmp_path: Path, family: str) -> None:
    stored = base_of(tmp_path, family)
    expected = stored(input_ids=IDS).logits
    store_in_bfloat16(stored)
    stored = adapted(stored, True)
    with stored.disable_adapter():
        assert torch.equal(stored(input_ids=IDS).logits, expected)
    assert not torch.equal(stored(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_weights_restores_the_stored_forward(tmp_path: Path, family: str) -> None:
    model = base_of(tmp_path, family)
    store_in_bfloat16(model)
    forwards = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with dequantized_weights(model):
            inside = {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
            assert inside.keys() == forwards.keys()
            assert not set(inside.values()) & set(forwards.values())
            assert torch.equal(model(input_ids=IDS).logits, expected)
    assert {name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)} == forwards


def test_autograd_keeps_no_upcast_weight(tmp_path: Path) -> None:
    """PEFT's forward, with dropout or DoRA, would otherwise keep a float32 copy of every layer until the backward."""
    model = base_of(tmp_path, "llama")
    store_in_bfloat16(model)
    kept: list[Tensor] = []
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded).logits.sum()
    shapes = {tuple(m.weight.shape) for m in model.modules() if hasattr(m, "compute_dtype")}
    assert kept
    assert not shapes & {tuple(t.shape) for t in kept} | {tuple(t.T.shape) for t in kept if t.ndim == 2} & shapes


def test_layer_that_bfloat16_does_not_hold_exactly_stays_in_float32(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data[-1, -1] = 1 / 3
    assert store_in_bfloat16(model) == saved_bytes(model) - 2 * layer.weight.numel()
    assert layer.weight.dtype == torch.float32 and "forward" not in vars(layer)
    assert store_in_bfloat16(tiny_model("llama").requires_grad_(False)) == 0


def test_zero_infinity_and_the_smallest_numbers_keep_every_bit(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    layer = model.model.layers[0].mlp.up_proj
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 2.0**-133, -(2.0**-126), 3.38e38])
    layer.weight.data[0, :7] = special.bfloat16().float()
    before = layer.weight.data.clone()
    store_in_bfloat16(model, check=False)  # infinity has no finite loss to check
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float().view(torch.int32), before.view(torch.int32))


def test_layers_that_train_in_full_are_not_stored_in_bfloat16(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    store_in_bfloat16(model, but=("q_proj", "layers.1.mlp"))
    stay = {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype.itemsize == 4
    }
    assert stay == {
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
    }


def test_weight_shared_by_two_layers_stays_in_float32(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    store_in_bfloat16(model)
    assert first.weight is second.weight and first.weight.dtype == torch.float32


def test_copy_of_a_stored_model_computes_with_its_own_weights(tmp_path: Path) -> None:
    model = base_of(tmp_path, "gpt2")
    store_in_bfloat16(model)
    expected = model(input_ids=IDS).logits
    other = copy.deepcopy(model)
    for layer in other.modules():
        if hasattr(layer, "compute_dtype"):
            layer.weight.data.zero_()
    assert not torch.equal(other(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_storage_does_not_change_quantized_layers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", dtype=torch.bfloat16)
    for kind in ("nf4", "int8"):
        quant = config.Quant(kind=config.QuantKind(kind))
        assert store_in_bfloat16(load_base(config.Model(path=str(folder)), quant, "cpu").model) == 0


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_copy_mapped_weights_makes_the_model_independent_of_its_file(tmp_path: Path, kind: str, tie: bool) -> None:
    folder = tiny_folder(tmp_path, "llama", tie=tie)
    quant = config.Quant(kind=config.QuantKind(kind))
    model = load_base(config.Model(path=str(folder)), quant, "cpu").model
    before, expected = fingerprint(model), model(input_ids=IDS).logits
    copy_mapped_weights(model)
    # A mapped weight would show the zeros that are written into the file; a copy does not.
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert fingerprint(model) == before
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
