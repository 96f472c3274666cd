"""Modules trained in full and rows of added tokens are float32 over a half-precision base, and compute as PEFT does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import packed, relative
from finished import adapted, settings
from peft import PeftModel
from states import detach, state_on
from tiny import tiny_folder, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_ft import config
from lora_ft.adapters import attach, files, provenance
from lora_ft.models.acceleration import accelerate, accelerated_lora
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import load_base
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.gradient_checkpointing import recomputed_layers
from lora_ft.ops.token_loss import PLAIN_PATHS, token_loss_sum
from lora_ft.training import checkpoint, optimizers
from lora_ft.training.trainer import fit

BATCH = packed(9, 21, 4)
BATCH.ids[3], BATCH.targets[7] = TOKENS = [510, 511]
MODULES = [("llama", ["norm"]), ("llama", ["lm_head", "mlp"]), ("llama", ["embed_tokens"]), ("llama", ["self_attn"]),
           ("gpt2", ["ln_f", "ln_1"]), ("qwen3", ["q_norm", "layers.1"])]  # fmt: skip


def attached(model: PreTrainedModel, modules: list[str], tokens: list[int] | None = None) -> PeftModel:
    adapter = config.Adapter(r=2, modules_to_save=modules, target_modules=["all-linear"])
    switch_off_dropout(model)
    return attach.attach(model.requires_grad_(False), adapter, "default", 1, tokens or [])


def full(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters outside of the LoRA matrices."""
    found = {n: p for n, p in attach.trainable(model, "default").items() if ".lora_" not in n}
    assert found
    return found


def gradients(model: PeftModel, paths: Any = PLAIN_PATHS) -> dict[str, Tensor]:
    parameters = full(model)
    loss = token_loss_sum(model.get_base_model(), BATCH, paths)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.closes("A17")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "modules"), MODULES)
def test_copies_are_float32_and_compute_in_the_dtype_of_the_base(
    family: str, modules: list[str], dtype: torch.dtype
) -> None:
    base = tiny_model(family, dtype=dtype)
    before, expected = fingerprint(base), base(input_ids=BATCH.ids[None]).logits
    model = attached(base, modules)
    assert {p.dtype for p in attach.trainable(model, "default").values()} == {torch.float32}
    logits = model(input_ids=BATCH.ids[None]).logits
    assert logits.dtype is dtype and torch.equal(logits, expected)  # the adapter has changed nothing yet
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}
    attach.detach(base)
    assert fingerprint(base) == before
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert torch.equal(base(input_ids=BATCH.ids[None]).logits, expected)


@pytest.mark.closes("A17")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("family", "modules", "tokens"), [*((f, m, []) for f, m in MODULES), ("llama", [], TOKENS)])
def test_gradients_equal_those_of_float64_within_the_rounding_of_bfloat16(
    family: str, modules: list[str], tokens: list[int], fast: bool
) -> None:
    base = tiny_model(family, dtype=torch.bfloat16)
    exact = gradients(attached(tiny_model(family, dtype=torch.bfloat16).double(), modules, tokens))
    paths = accelerate(base, config.Fast()).paths if fast else PLAIN_PATHS
    model = attached(base, modules, tokens).train()
    with accelerated_lora(model, "default", config.Fast(lora=fast)):
        found = gradients(model, paths)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert relative(gradient, exact[name]) < 0.05, name


@pytest.mark.parametrize(("family", "modules"), MODULES)
def test_gradients_are_summed_in_float32_and_recomputed_exactly(family: str, modules: list[str]) -> None:
    model = attached(tiny_model(family, dtype=torch.bfloat16), modules).train()
    base, (first, second, _) = model.get_base_model(), BATCH.documents()
    parts = []
    for document in (first, second):
        loss = token_loss_sum(base, document, PLAIN_PATHS)
        parts.append(torch.autograd.grad(loss, list(full(model).values())))
        with recomputed_layers(base, "every_1"):
            token_loss_sum(base, document, PLAIN_PATHS).backward()
    rounded = 0
    for one, two, parameter in zip(*parts, full(model).values(), strict=True):
        assert torch.equal(parameter.grad, one + two)
        rounded += int((parameter.grad != parameter.grad.bfloat16()).sum())
    assert rounded > 0  # a sum in bfloat16 would have lost these


@pytest.mark.closes("A17")
@pytest.mark.parametrize(
    ("modules", "tokens"), [(["norm", "mlp"], []), (["lm_head"], []), (["embed_tokens"], []), ([], TOKENS)]
)
def test_updates_far_below_the_rounding_of_bfloat16_are_kept(modules: list[str], tokens: list[int]) -> None:
    """AdamW moves every weight by about lr in each step, 200 times less than a weight's last bit in bfloat16."""
    model = attached(tiny_model("llama", dtype=torch.bfloat16), modules, tokens)
    parameters = full(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    flat = optimizers.flatten(parameters)
    optimizer = optimizers.build(flat, config.Optim(lr=1e-6, weight_decay=0.0))
    for _ in range(5):
        flat.gradients.zero_()
        token_loss_sum(model.get_base_model(), BATCH, PLAIN_PATHS).backward()
        optimizer.step()
    for name, parameter in parameters.items():
        moved = (parameter.detach() - start[name]).abs()
        assert 0 < moved.max() <= 5.5e-6, name
        assert (moved[parameter.grad != 0] > 1e-6).float().mean() > 0.9, name
        assert (parameter.detach().bfloat16() == start[name].bfloat16()).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("modules", "added"), [(["norm", "lm_head"], ()), ([], ("spider", "France"))])
def test_trained_adapter_in_plain_peft_gives_the_same_logits(
    modules: list[str], added: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    cfg = settings(tmp_path, "llama", modules_to_save=modules)
    cfg.model.dtype, cfg.model.added_tokens = config.Dtype(str(dtype).split(".")[1]), list(added)
    base, model = adapted(cfg)
    files.save(model, "first", tmp_path / "saved", base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d"))
    stored = files.read_tensors(tmp_path / "saved")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=dtype)
    if added:
        plain.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
        plain.load_state_dict(load_base(cfg.model, cfg.quant, "cpu", base.tokenizer).model.state_dict())
    ids = torch.tensor([[5, 99, 42, len(base.tokenizer) - 1, len(base.tokenizer) - 2, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        again = files.load(load_base(cfg.model, cfg.quant, "cpu").model, tmp_path / "saved", "first")
        for loaded in (PeftModel.from_pretrained(plain, tmp_path / "saved").eval(), again):
            found = loaded(input_ids=ids).logits
            assert found.dtype is expected.dtype is dtype
            assert torch.equal(found, expected)


def test_float32_base_keeps_its_classes_and_its_bits() -> None:
    model = attached(tiny_model("llama"), ["norm", "mlp"])
    copies = [m for n, m in model.named_modules() if n.endswith("modules_to_save.default")]
    assert {type(m).__module__.split(".")[0] for m in copies} == {"transformers"}
    assert all("weight" not in vars(type(part)) for copy in copies for part in copy.modules())


def test_head_over_a_quantized_bfloat16_base_trains_in_float32(tmp_path: Path) -> None:
    model = config.Model(path=str(tiny_folder(tmp_path, "llama")), dtype=config.Dtype.bfloat16)
    base = load_base(model, config.Quant(kind=config.QuantKind.nf4), "cpu").model
    found = gradients(attached(base, ["lm_head", "norm"]))
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(g.any() for g in found.values())


def test_training_and_resume_keep_float32_values(tmp_path: Path) -> None:
    """A run that stops and goes on from its checkpoint ends with the bits of a run that does not stop."""
    options: dict[str, Any] = {
        "adapter": config.Adapter(r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
        "train": config.Train(epochs=100, max_steps=4, tokens_per_step=60),
        "optim": config.Optim(lr=1e-6),
    }
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = fingerprint(model)
    whole = state_on(model, tmp_path / "whole", **options)
    fit(whole)
    expected = {n: p.detach().clone() for n, p in whole.parameters.items()}
    assert all((expected[n] != whole.start[n]).any() for n in expected)
    detach(whole)
    assert fingerprint(model) == before
    part = state_on(model, tmp_path / "part", **options)
    fit(part, until=2)
    checkpoint.save(part)
    detach(part)
    again = state_on(model, tmp_path / "part", **options)
    checkpoint.resume(again)
    assert again.step == 2
    fit(again)
    for name, parameter in again.parameters.items():
        assert parameter.dtype is torch.float32 and torch.equal(parameter, expected[name])
    detach(again)


@pytest.mark.parametrize("targets", ["q_proj", "all-linear"])
def test_loss_follows_that_of_a_float32_run(tmp_path: Path, targets: str) -> None:
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model("llama", dtype=torch.bfloat16).to(dtype)
        adapter = config.Adapter(r=2, target_modules=[targets], modules_to_save=["norm", "lm_head", "embed_tokens"])
        state = state_on(model, tmp_path / str(dtype), adapter=adapter, optim=config.Optim(lr=3e-3),
                         train=config.Train(epochs=100, max_steps=5, tokens_per_step=10_000))  # fmt: skip
        fit(state)
        losses.append(torch.tensor(state.losses))
        detach(state)
    assert losses[1][0] - losses[1][-1] > 0.2
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=0)


def test_settings_of_the_adapter_are_unchanged_by_the_copies() -> None:
    adapter = config.Adapter(modules_to_save=["norm"])
    given = dataclasses.asdict(adapter)
    attach.attach(tiny_model("llama", dtype=torch.bfloat16), adapter, "default", 1, [])
    assert dataclasses.asdict(adapter) == given
