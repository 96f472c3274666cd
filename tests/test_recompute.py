"""Gradient checkpointing: recomputation changes no bit."""

from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter, packed
from tiny import FAMILIES, tiny_model
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.errors import ConfigError
from lora_ft.models.acceleration import accelerate
from lora_ft.ops import lora_linear
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.gradient_checkpointing import recompute_layers
from lora_ft.ops.token_loss import token_loss_sum

FAST = config.Fast()


def adapted(family: str, dropout: float = 0.0) -> torch.nn.Module:
    """Return a tiny model in training mode with an adapter of which every matrix gets a gradient."""
    model = tiny_model(family).requires_grad_(False)
    switch_off_dropout(model)
    peft_model = attach.attach(model, config.Adapter(r=4, lora_dropout=dropout), "adapter0", 0, [])
    accelerate_adapter(peft_model, "adapter0")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    return model


def loss_and_gradients(model: torch.nn.Module, setting: str) -> list[Tensor]:
    paths = accelerate(model, FAST).paths
    recompute_layers(model, setting)
    torch.manual_seed(3)
    loss = token_loss_sum(model, packed(70, 66, 90), paths)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.closes("A16")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_layers_changes_no_bit_of_loss_and_gradients(family: str, dropout: float) -> None:
    model = adapted(family, dropout)
    kept = loss_and_gradients(model, "off")
    assert all(gradient.norm() > 0 for gradient in kept[1:])
    for setting, recomputed in (("every_1", 2), ("every_2", 1)):
        assert all(map(torch.equal, kept, loss_and_gradients(model, setting)))
        assert recompute_layers(model, setting) == recomputed


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_last_product_of_a_layer_is_not_computed_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(family), 0
    paths = accelerate(model, FAST).paths
    compute = lora_linear._Product.forward

    def count(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return compute(*arguments)

    monkeypatch.setattr(lora_linear._Product, "forward", count)
    recompute_layers(model, "every_1")
    loss = token_loss_sum(model, packed(70, 66, 90), paths)
    assert calls == 2 * 7
    loss.backward()
    assert calls == 2 * 7 + 2 * 6, "both layers compute all products again but down_proj's"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_state_of_the_generator_is_kept_only_for_dropout(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(True) or state())
    model = adapted("llama", dropout)
    paths = accelerate(model, FAST).paths
    recompute_layers(model, "every_1")
    calls.clear()
    token_loss_sum(model, packed(70, 66, 90), paths).backward()
    assert bool(calls) == (dropout > 0)


def test_other_dropout_masks_change_the_loss() -> None:
    """So the comparison above can fail."""
    model = adapted("llama", 0.3)
    before = loss_and_gradients(model, "off")
    torch.manual_seed(4)
    loss = token_loss_sum(model, packed(70, 66, 90), accelerate(model, FAST).paths)
    assert not torch.equal(before[0], loss.detach())


def test_model_without_recomputable_layers_is_an_error() -> None:
    class Plain(torch.nn.Module):
        config = tiny_model("llama").config

    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=every_1"):
        recompute_layers(Plain(), "every_1")
