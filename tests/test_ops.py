"""Packed losses: fast paths equal plain paths, and packed documents equal single documents."""

import dataclasses
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerated import relative
from tiny import FAMILIES, VOCABULARY, tiny_folder, tiny_model
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from zoo import zoo_model

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.data.rows import Example
from lora_ft.evaluation.loss import eval_loss
from lora_ft.models.acceleration import accelerate, dequantized_weights
from lora_ft.models.load import load_base
from lora_ft.objectives.sft import Sft
from lora_ft.ops import attention
from lora_ft.ops import batch as batch_module
from lora_ft.ops.batch import Batch
from lora_ft.ops.device import GPU, standing_for
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.token_loss import token_loss_sum

FAST, PLAIN = config.Fast(), config.Fast(attention=False, loss=False)
LENGTHS = (9, 1, 17, 4)


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Return random documents of these lengths; every second position is supervised, never the last of a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    targets = torch.full_like(ids, -100)
    for start, end in pairwise(starts):
        targets[start : end - 1 : 2] = ids[start + 1 : end : 2]
    return Batch(ids, positions, targets, starts)


def gradients(model: torch.nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.closes("A10")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_loss_and_gradients_of_single_documents(family: str) -> None:
    """All gradients of the base in float64, fast and plain."""
    model = tiny_model(family, dtype=torch.float64)
    batch = packed()
    seen = []
    padded = batch.padded(16)
    assert len(padded.ids) == 32 and len(padded.documents()) == len(LENGTHS)
    for fast, batches in (
        (FAST, [batch]), (PLAIN, [batch]), (PLAIN, batch.documents()), (FAST, batch.documents()),
        (FAST, [padded]), (PLAIN, [padded]), (FAST, padded.documents()),
    ):  # fmt: skip
        paths = accelerate(model, fast).paths
        # A head that trains uses the plain loss; a frozen one uses the chunked loss.
        model.get_output_embeddings().requires_grad_(fast is PLAIN)
        loss = sum(token_loss_sum(model, b, paths) for b in batches)
        loss.backward()
        model.get_output_embeddings().weight.grad = None
        seen.append((loss.detach(), gradients(model)))
    for loss, gradient in seen[1:]:
        assert relative(loss, seen[0][0]) < 1e-13
        assert relative(gradient, seen[0][1]) < 1e-12


def test_batches_are_padded_for_a_gpu_only() -> None:
    batch = packed((70, 40))
    with standing_for(GPU):
        moved = batch.to(torch.device("meta"))
    assert (len(moved.ids), moved.all_starts, moved.starts) == (128, [0, 70, 110, 128], [0, 70, 110])
    assert moved.counts == batch.counts and len(moved.supervised) == len(batch.supervised)
    assert len(batch.to(torch.device("cpu")).ids) == 110
    assert batch.padded(55) is batch


@pytest.fixture
def padding_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "target", lambda _: GPU)


@pytest.mark.usefixtures("padding_as_on_a_gpu")
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_pack_and_take_the_fast_paths(family: str) -> None:
    """The self-check of the base uses padded documents on a GPU."""
    model = tiny_model(family)
    found = accelerate(model, FAST).paths
    assert found.packs and found.passes_starts and found.supervised_rows_only


@pytest.mark.usefixtures("padding_as_on_a_gpu")
def test_padding_is_left_out_where_documents_are_not_packed() -> None:
    model, batch = tiny_model("llama", dtype=torch.float64), packed((30,))
    paths = accelerate(model, FAST).paths
    expected = token_loss_sum(model, batch, paths)
    moved = batch.to(torch.device("cpu"))
    assert len(moved.ids) == 64
    torch.testing.assert_close(token_loss_sum(model, moved, replace(paths, packs=False)), expected)


def test_ignored_document_boundaries_change_the_loss() -> None:
    """So the comparison above can fail."""
    model = tiny_model("llama", dtype=torch.float64)
    batch, paths = packed(), accelerate(tiny_model("llama", dtype=torch.float64), FAST).paths
    accelerate(model, FAST)
    leaking = dataclasses.replace(batch, starts=[0, len(batch.ids)])
    assert relative(token_loss_sum(model, leaking, paths).detach(), token_loss_sum(model, batch, paths).detach()) > 1e-4


@pytest.mark.closes("A10")
def test_opt_without_packed_attention_gets_rows_side_by_side() -> None:
    """With a dense mask, packed documents of OPT see each other."""
    config_ = OPTConfig(vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=64, word_embed_proj_dim=64, dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config_).double().eval()
    implementation = model.config._attn_implementation
    made = accelerate(model, PLAIN)
    paths = made.paths
    assert paths.pads and not (paths.packs or paths.passes_starts or paths.supervised_rows_only)
    assert "packing off, rows of similar length side by side: packed documents see each other" in made.reasons
    assert model.config._attn_implementation == implementation
    batch = packed()
    separate = sum(token_loss_sum(model, b, paths).detach() for b in batch.documents())
    leaking = token_loss_sum(model, batch, dataclasses.replace(paths, packs=True)).detach()
    assert relative(leaking, separate) > 1e-4
    assert relative(token_loss_sum(model, batch, paths).detach(), separate) < 1e-13
    rows = [
        Example(b.ids.numpy().astype(np.int32), np.roll(b.targets.numpy() >= 0, 1), "here")
        for b in batch.documents()
        if len(b.ids) > 1
    ]
    assert eval_loss(model, Sft().loss, rows, paths, 1000).loss == pytest.approx(
        float(separate) / sum(int((b.targets >= 0).sum()) for b in batch.documents()), rel=1e-13
    )


@pytest.mark.parametrize("takes_attention", [True, False])
@pytest.mark.parametrize("takes_loss", [True, False])
def test_each_switch_turns_off_its_path_and_is_logged(takes_attention: bool, takes_loss: bool) -> None:
    model = tiny_model("llama")
    made = accelerate(model, dataclasses.replace(PLAIN, attention=takes_attention, loss=takes_loss))
    paths = made.paths
    assert (paths.packs, paths.passes_starts, paths.supervised_rows_only) == (True, takes_attention, takes_loss)
    assert model.config._attn_implementation == (attention.NAME if takes_attention else attention.PLAIN)
    kernel = attention.choose_kernel(model.device, model.dtype, 16)
    assert {line for line in made.reasons if "attention" in line or "loss" in line} == {
        f"attention: {kernel[0]} ({kernel[1]})" if takes_attention else "plain attention: fast.attention=false",
        *([] if takes_loss else ["plain loss: fast.loss=false"]),
    }


@pytest.mark.parametrize(("family", "width"), [("gemma", 32), ("llama", 16)])
def test_kernel_is_chosen_for_the_width_of_a_head(family: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = zoo_model(family), []
    kernel = attention.Kernel("per_document", "reason")
    monkeypatch.setattr(attention, "choose_kernel", lambda *a: asked.append(a) or kernel)
    made = accelerate(model, FAST, check=False)
    assert asked[-1] == (model.device, model.dtype, width)
    assert "attention: per_document (reason)" in made.reasons


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("fast", [FAST, PLAIN])
def test_head_with_its_adapter_off_gives_the_bits_of_the_base(settings: dict, fast: config.Fast) -> None:
    batch, bare = packed(), tiny_model("llama").requires_grad_(False)
    expected = token_loss_sum(bare, batch, accelerate(bare, fast).paths)
    model = attach.attach(tiny_model("llama").requires_grad_(False), config.Adapter(r=2, **settings), "first", 1, [])
    with torch.no_grad():
        for parameter in attach.trainable(model, "first").values():
            parameter.add_(0.1)
    base = model.get_base_model()
    plain = token_loss_sum(base, batch, accelerate(base, PLAIN).paths).detach()
    switched_on = token_loss_sum(base, batch, accelerate(base, fast).paths).detach()
    assert relative(switched_on, plain) < 1e-6
    assert relative(switched_on, expected) > 1e-3
    with model.disable_adapter():
        assert token_loss_sum(base, batch, accelerate(base, fast).paths) == expected


def test_switch_off_dropout_makes_training_mode_deterministic() -> None:
    for family in FAMILIES:
        model = tiny_model(family).train()
        model.config.attention_dropout = 0.3
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        switch_off_dropout(model)
        batch, paths = packed(), accelerate(model, FAST).paths
        assert token_loss_sum(model, batch, paths) == token_loss_sum(model, batch, paths)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_weights_give_the_same_bits_and_are_restored(
    family: str, kind: str, double: bool, tmp_path: Path
) -> None:
    quant = config.Quant(kind=config.QuantKind[kind], double=double)
    model = load_base(config.Model(path=str(tiny_folder(tmp_path, family))), quant, "cpu").model
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with dequantized_weights(model):
            assert any("forward" in vars(module) for module in model.modules())
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(input_ids=ids).logits, expected)
