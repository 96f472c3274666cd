"""Gradient checkpointing: recomputation changes no bit, and `auto` recomputes as few layers as memory allows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter, packed
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.errors import ConfigError
from lora_ft.models.acceleration import accelerate
from lora_ft.ops import gradient_checkpointing, lora_linear
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.gradient_checkpointing import (
    Footprint,
    fewest_recomputed,
    measure,
    recompute_layers,
    settle_checkpoint,
)
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


def test_other_dropout_masks_change_the_loss() -> None:
    """So the comparison above can fail."""
    model = adapted("llama", 0.3)
    before = loss_and_gradients(model, "off")
    torch.manual_seed(4)
    loss = token_loss_sum(model, packed(70, 66, 90), accelerate(model, FAST).paths)
    assert not torch.equal(before[0], loss.detach())


def test_model_without_recomputable_layers_is_an_error_or_off() -> None:
    class Plain(torch.nn.Module):
        config = tiny_model("llama").config

    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=every_1"):
        recompute_layers(Plain(), "every_1")
    setting, reason = settle_checkpoint(Plain(), accelerate(tiny_model("llama"), FAST).paths, 100)
    assert setting == "off" and "no layers" in reason


def kept_bytes(model: torch.nn.Module, setting: str, num_tokens: int) -> int:
    recompute_layers(model, setting)
    return gradient_checkpointing._bytes_kept(model, accelerate(model, FAST).paths, num_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_footprint_measured_on_a_few_tokens_holds_for_many(family: str) -> None:
    """Documents long enough for tiles keep slightly less per token than the measured ones, never more."""
    model = adapted(family)
    footprint = measure(model, accelerate(model, FAST).paths)
    layers = footprint.num_layers * footprint.layer
    assert 0.8 < kept_bytes(model, "off", 200) / (200 * (layers + footprint.rest)) <= 1.01
    recomputed = footprint.num_layers * footprint.recomputed_layer
    assert kept_bytes(model, "every_1", 200) == pytest.approx(200 * (recomputed + footprint.rest), rel=0.01)


def test_measuring_does_not_change_the_model_its_settings_and_the_random_state() -> None:
    model = adapted("llama", 0.3)
    model.eval()
    recompute_layers(model, "every_2")
    before = [layer.gradient_checkpointing for layer in gradient_checkpointing._layers(model)]
    state = torch.get_rng_state()
    measure(model, accelerate(model, FAST).paths)
    assert [layer.gradient_checkpointing for layer in gradient_checkpointing._layers(model)] == before == [True, False]
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


FOOTPRINTS = st.builds(
    lambda recomputed, more, rest, layers, fixed: Footprint(recomputed + more, recomputed, rest, layers, fixed),
    st.integers(1, 10_000), st.integers(0, 100_000), st.integers(0, 10_000), st.integers(1, 80), st.integers(0, 10**9),
)  # fmt: skip


@given(FOOTPRINTS, st.integers(1, 100_000), st.integers(1, 100_000), st.integers(0, 10**12), st.integers(0, 10**12))
def test_more_memory_never_recomputes_more_layers_and_more_tokens_never_fewer(
    footprint: Footprint, tokens: int, more_tokens: int, budget: int, more_budget: int
) -> None:
    def recomputed(num_tokens: int, num_bytes: int) -> int:
        every = fewest_recomputed(footprint, num_tokens, num_bytes)
        assert every <= 1 or footprint.peak(num_tokens, every) <= num_bytes
        return -(-footprint.num_layers // every) if every else 0

    chosen = recomputed(tokens, budget)
    assert recomputed(tokens, budget + more_budget) <= chosen <= recomputed(tokens + more_tokens, budget)


def test_fewest_recomputed_ranges_from_off_to_every_layer() -> None:
    footprint = Footprint(layer=100, recomputed_layer=10, rest=0, num_layers=8)
    chosen = [fewest_recomputed(footprint, 1, budget) for budget in (900, 899, 810, 630, 540, 180, 0)]
    assert chosen == [0, 8, 8, 3, 2, 1, 1]


@pytest.mark.parametrize("free, setting", [(10**8, "off"), (0, "every_1")])
def test_auto_depends_on_free_memory_and_logs_both_figures(
    free: int, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("qwen3")
    monkeypatch.setattr(gradient_checkpointing, "available_bytes", lambda device: free)
    found, reason = settle_checkpoint(model, accelerate(model, FAST).paths, 4096)
    assert found == setting
    assert reason.startswith(f"train.gradient_checkpointing=auto: {setting}") and "4,096 tokens" in reason
    assert f"{free / 1e9:.2f} GB free" in reason
    monkeypatch.setattr(gradient_checkpointing, "available_bytes", lambda device: None)
    assert settle_checkpoint(model, accelerate(model, FAST).paths, 4096)[0] == "off"


def test_models_of_several_parts_and_with_a_short_context_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 has its sizes in a config for text; a context of learned positions may be shorter than the probe."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    gemma = Gemma3ForConditionalGeneration(Gemma3Config(text_config=sizes, vision_config=vision)).requires_grad_(False)
    short = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=VOCABULARY))
    for model in (gemma, short):
        model.get_input_embeddings().requires_grad_(True)
        for free in (10**12, 0):
            monkeypatch.setattr(gradient_checkpointing, "available_bytes", lambda device, free=free: free)
            setting, _ = settle_checkpoint(model, accelerate(model, FAST).paths, 100)
            assert setting == ("off" if free else "every_1")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_measured_if_memory_is_plentiful(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family)
    measured = measure(model, accelerate(model, FAST).paths).peak(4096, 0)
    assert 4096 * gradient_checkpointing._more_than_kept(model) > measured
    monkeypatch.setattr(gradient_checkpointing, "available_bytes", lambda device: 10**12)
    monkeypatch.setattr(gradient_checkpointing, "measure", None)
    assert settle_checkpoint(model, accelerate(model, FAST).paths, 4096)[0] == "off"


def test_limits_of_a_control_group_and_its_parents_are_read(tmp_path: Path) -> None:
    """The page cache counts as free memory."""
    root, own = tmp_path / "fs", tmp_path / "fs" / "user" / "job"
    own.mkdir(parents=True)
    for folder, limit, current, cache in ((own, "900", 400, 100), (own.parent, "max", 0, 0), (root, "5000", 10, 0)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    assert gradient_checkpointing._left_by_cgroups(membership, root) == [600, 4990]
    membership.write_text("4:memory:/old\n")
    assert gradient_checkpointing._left_by_cgroups(membership, root) == []
    assert gradient_checkpointing._left_by_cgroups(tmp_path / "none", root) == []


def test_free_memory_of_this_machine_is_known() -> None:
    assert 0 < (gradient_checkpointing.available_bytes(torch.device("cpu")) or 1) < 2**50
