"""Weights stored in bfloat16 under a model that computes in float32: half the bytes, the same bits everywhere."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerate, dequantized_weights
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import load_base
from lora_ft.models.storage import leave_file
from lora_ft.ops.dropout import switch_off_dropout

IDS = torch.tensor([[5, 99, 42, 7, 300, 11]])
STORAGE = config.Fast(attention=False, loss=False, lora=False, norm=False, mlp=False, rope=False)


def store_in_bfloat16(model: Any, *, but: tuple[str, ...] = (), check: bool = True) -> int:
    """Accelerate with storage alone; returns the number of bytes saved."""
    before = sum(p.nbytes for p in model.parameters())
    accelerate(model, STORAGE, modules_to_save=but, check=check)
    return before - sum(p.nbytes for p in model.parameters())


def base_of(tmp_path: Path, family: str) -> Any:
    """A float32 model of a bfloat16 checkpoint, loaded anew by each call."""
    folder = tmp_path / family
    if not folder.is_dir():
        tiny_folder(tmp_path, family, dtype=torch.bfloat16)
    model = load_base(config.Model(path=str(folder)), config.Quant(), "cpu").model
    switch_off_dropout(model)
    return model


def adapted(model: Any, use_fast: bool, **settings: object) -> Any:
    made = attach.attach(model, config.Adapter(**{"r": 3, **settings}), "first", 1, [])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attach.trainable(made, "first").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if use_fast:
        accelerate_adapter(made, "first")
    return made.train()


def learned(model: Any) -> list[Tensor]:
    """Initial parameters, logits and gradients."""
    parameters = list(attach.trainable(model, "first").values())
    torch.manual_seed(3)  # for dropout
    logits = model(input_ids=IDS).logits
    return [*(p.detach() for p in parameters), logits.detach(), *torch.autograd.grad(logits.square().sum(), parameters)]


def saved_bytes(model: Any) -> int:
    """Two bytes for each weight of a linear layer inside the blocks."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    return sum(2 * layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_storing_saves_two_bytes_a_linear_weight_and_changes_no_logit_and_no_hash(tmp_path: Path, family: str) -> None:
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
def test_an_adapter_starts_and_learns_over_stored_weights_as_over_full_ones(
    tmp_path: Path, family: str, use_fast: bool, settings: dict[str, Any]
) -> None:
    full, stored = base_of(tmp_path, family), base_of(tmp_path, family)
    assert store_in_bfloat16(stored)
    full, stored = adapted(full, use_fast, **settings), adapted(stored, use_fast, **settings)
    for found, expected in zip(learned(stored), learned(full), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_the_adapter_off_gives_the_base_to_the_bit(tmp_path: Path, family: str) -> None:
    stored = base_of(tmp_path, family)
    expected = stored(input_ids=IDS).logits
    store_in_bfloat16(stored)
    stored = adapted(stored, True)
    with stored.disable_adapter():
        assert torch.equal(stored(input_ids=IDS).logits, expected)
    assert not torch.equal(stored(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_unpacks_once_and_gives_the_stored_forward_back(tmp_path: Path, family: str) -> None:
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
    """The plain path of dropout and DoRA would otherwise keep a float32 copy of every layer until the backward."""
    model = base_of(tmp_path, "llama")
    store_in_bfloat16(model)
    kept: list[Tensor] = []
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded).logits.sum()
    shapes = {tuple(m.weight.shape) for m in model.modules() if hasattr(m, "compute_dtype")}
    assert kept
    assert not shapes & {tuple(t.shape) for t in kept} | {tuple(t.T.shape) for t in kept if t.ndim == 2} & shapes


def test_one_bit_too_many_keeps_that_layer_alone_in_float32(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data[-1, -1] = 1 / 3
    assert store_in_bfloat16(model) == saved_bytes(model) - 2 * layer.weight.numel()
    assert layer.weight.dtype == torch.float32 and "forward" not in vars(layer)
    assert store_in_bfloat16(tiny_model("llama").requires_grad_(False)) == 0


def test_zero_infinity_and_the_smallest_numbers_come_back_with_every_bit(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    layer = model.model.layers[0].mlp.up_proj
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 2.0**-133, -(2.0**-126), 3.38e38])
    layer.weight.data[0, :7] = special.bfloat16().float()
    before = layer.weight.data.clone()
    store_in_bfloat16(model, check=False)  # infinity has no finite loss to check
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float().view(torch.int32), before.view(torch.int32))


def test_layers_that_train_or_will_train_in_full_stay(tmp_path: Path) -> None:
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


def test_a_weight_that_two_layers_share_stays(tmp_path: Path) -> None:
    model = base_of(tmp_path, "llama")
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    store_in_bfloat16(model)
    assert first.weight is second.weight and first.weight.dtype == torch.float32


def test_a_copy_of_a_stored_model_computes_with_its_own_weights(tmp_path: Path) -> None:
    model = base_of(tmp_path, "gpt2")
    store_in_bfloat16(model)
    expected = model(input_ids=IDS).logits
    other = copy.deepcopy(model)
    for layer in other.modules():
        if hasattr(layer, "compute_dtype"):
            layer.weight.data.zero_()
    assert not torch.equal(other(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_quantized_layers_stay_as_they_are(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", dtype=torch.bfloat16)
    for kind in ("nf4", "int8"):
        quant = config.Quant(kind=config.QuantKind(kind))
        assert store_in_bfloat16(load_base(config.Model(path=str(folder)), quant, "cpu").model) == 0


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_that_left_its_file_reads_nothing_from_it(tmp_path: Path, kind: str, tie: bool) -> None:
    folder = tiny_folder(tmp_path, "llama", tie=tie)
    quant = config.Quant(kind=config.QuantKind(kind))
    model = load_base(config.Model(path=str(folder)), quant, "cpu").model
    before, expected = fingerprint(model), model(input_ids=IDS).logits
    leave_file(model)
    # A mapped file shows the zeros that are written into it; a copy does not.
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert fingerprint(model) == before
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
