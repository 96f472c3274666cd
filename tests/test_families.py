"""Every family of the zoo: documents that share a forward pass, training, merging and saved adapters are exact."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import models_page
import pytest
import torch
from accelerated import packed, relative
from finished import adapted, finished_run, settings
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from states import detach, state_on, trained
from test_training import plain_loop, without_dropout
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ZOO, ZOO_BY_TIME, zoo_folder, zoo_model

import lora_ft
from lora_ft import config
from lora_ft.models.acceleration import accelerate
from lora_ft.ops.batch import Batch
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths, document_loss_sums, similar_lengths, token_loss_sum

# Longer than the windows and chunks of the zoo, 8; of lengths that differ little and much.
BATCH = packed(24, 1, 19, 22, 8)
# One of each kind: soft-capped scores, sinks, ALiBi, a convolution, latent attention.
SOME = ("gemma2", "gpt_oss", "falcon-rw", "lfm2", "youtu")
REST = [pytest.param(name, marks=pytest.mark.nightly) for name in ZOO if name not in SOME]


def learned(model: PreTrainedModel, batches: list[Batch], paths: Paths) -> tuple[Tensor, Tensor]:
    """Return the loss of batches, and its gradient at a factor and an offset of all embeddings."""
    offset = torch.zeros(model.get_input_embeddings().weight.shape[1], dtype=torch.float64, requires_grad=True)
    scale = torch.ones_like(offset, requires_grad=True)

    def changed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return (output * scale + offset).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(changed)
    try:
        loss = sum(token_loss_sum(model, batch, paths).double() for batch in batches)
        gradients = torch.autograd.grad(loss, [offset, scale])
    finally:
        hook.remove()
    return loss.detach(), torch.cat(gradients)


@pytest.mark.closes("A10")
@pytest.mark.parametrize("name", ZOO_BY_TIME)
def test_documents_that_share_a_pass_have_the_loss_and_gradients_of_documents_alone(name: str) -> None:
    model = zoo_model(name, dtype=torch.float64).requires_grad_(False)
    switch_off_dropout(model)
    expected = learned(model, BATCH.documents(), PLAIN_PATHS)
    made = accelerate(model, config.Fast())
    assert made.paths.share_a_pass
    found = learned(model, [BATCH], made.paths)
    assert all(relative(f, e) < 1e-6 for f, e in zip(found, expected, strict=True))
    assert models_page.shared(made) == tuple(models_page.cells(name)[:3]), "run python tests/models_page.py"


@pytest.mark.parametrize("name", ["seed_oss", "gpt_bigcode", "falcon", "opt"])
def test_dropout_of_a_base_is_off_whatever_it_is_called(name: str) -> None:
    model = zoo_model(name)
    ids = BATCH.ids[None, :20]
    expected = model(input_ids=ids).logits
    switch_off_dropout(model)
    assert torch.equal(model.train()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("fast_loss", [True, False])
def test_losses_of_rows_side_by_side_are_in_the_order_of_the_documents(fast_loss: bool) -> None:
    model = zoo_model("lfm2", dtype=torch.float64).requires_grad_(False)
    expected = torch.stack([token_loss_sum(model, document, PLAIN_PATHS) for document in BATCH.documents()])
    made = accelerate(model, config.Fast(loss=fast_loss))
    assert made.paths.pads and made.paths.supervised_rows_only is fast_loss
    torch.testing.assert_close(document_loss_sums(model, BATCH, made.paths), expected)
    # Documents that would change the rotary frequencies of others are computed one by one.
    limited = replace(made.paths, longest_shared=20)
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *a: rows.append(len(a[2])))
    torch.testing.assert_close(document_loss_sums(model, BATCH, limited), expected)
    hook.remove()
    assert rows == [1] * 5


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_rows_side_by_side_have_similar_lengths(lengths: list[int]) -> None:
    groups = similar_lengths(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    of_groups = [[lengths[index] for index in group] for group in groups]
    assert all(group[0] == max(group) and min(group) >= 0.7 * group[0] for group in of_groups)
    assert sum(len(group) * group[0] for group in of_groups) <= sum(lengths) / 0.7
    # No two groups could be one.
    assert all(later[0] < 0.7 * group[0] for group, later in pairwise(of_groups))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("phi3", "5 norm, 2 mlp, 2 rope"),  # gate and up in one layer
        ("granitemoehybrid", "5 norm, 2 mlp, 1 rope"),  # the same, of shared experts
        ("lfm2", "7 norm, 2 mlp, 1 rope"),  # parts called w1, w2, w3
        ("cohere", "3 norm, 2 mlp"),  # layer norms without a bias
    ],
)
def test_blocks_with_other_parts_are_accelerated_and_give_the_same_gradients(name: str, blocks: str) -> None:
    model = zoo_model(name).requires_grad_(False)
    expected = learned(model, BATCH.documents(), PLAIN_PATHS)
    made = accelerate(model, config.Fast())
    assert f"accelerated blocks: {blocks}" in made.reasons
    found = learned(model, [BATCH], made.paths)
    assert all(relative(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", [*SOME, *REST])
def test_fifty_steps_equal_a_plain_peft_loop(name: str, tmp_path: Path) -> None:
    """The plain loop pads rows, and uses no code of lora_ft. Masks of padding give NaN in float64 (eager attention)."""
    state = state_on(zoo_model(name, dtype=torch.float64), tmp_path)
    adapter = trained(state)
    plain = without_dropout(zoo_model(name, dtype=torch.float64)).requires_grad_(False)
    expected, losses = plain_loop(plain, state, masked=False)
    assert len(losses) == 50
    bound = 1e-5 if name == "gemma4_text" else 1e-6  # it rounds more to float32 than others
    assert state.losses == pytest.approx(losses, rel=bound)
    assert relative(adapter, expected) < bound
    detach(state)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", [*SOME, *REST])
def test_merged_model_and_plain_peft_compute_the_logits_of_the_attached_adapter(name: str, tmp_path: Path) -> None:
    zoo_folder(tmp_path, name)
    run = finished_run(tmp_path, name)
    lora_ft.merge(run, tmp_path / "merged", ["device=cpu"])
    _, attached = adapted(settings(tmp_path, name))
    ids = torch.randint(4, 500, (1, 30), generator=torch.Generator().manual_seed(0))
    auto: Any = type(attached.get_base_model())
    with torch.no_grad():
        expected = attached(input_ids=ids).logits
        with attached.disable_adapter():
            assert relative(attached(input_ids=ids).logits, expected) > 0.05
        merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert relative(merged(input_ids=ids).logits, expected) < 2e-5
        plain = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / name), run / "adapter")
        assert relative(plain(input_ids=ids).logits, expected) < 1e-6


@pytest.mark.nightly
@pytest.mark.parametrize("name", ZOO)
def test_page_of_families_is_current(name: str, tmp_path: Path) -> None:
    found = models_page.row(name, tmp_path)
    assert models_page.as_cells(found) == models_page.cells(name), "run python tests/models_page.py"
