"""Fast paths that pass the self-check change no number in any model family, and all of them can be undone."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import adapted, packed, relative
from peft import PeftModel
from tiny import FAMILIES, VOCABULARY, tiny_folder, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.evaluation.comparison import adapter_off
from lora_ft.models import self_check
from lora_ft.models.acceleration import Accelerated, accelerate, accelerated, accelerated_lora, replaced_forwards
from lora_ft.models.load import load_base
from lora_ft.ops import attention
from lora_ft.ops.batch import Batch
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.logits import PRODUCT, LogitMap
from lora_ft.ops.token_loss import PLAIN_PATHS, Paths, document_loss_sums, token_loss_sum

FAST = config.Fast()
BATCH = packed(9, 1, 14)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 3,
         "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
WINDOW = {"head_dim": 16, "sliding_window": 128}
# Settings of families that lora_ft does not list.
SETTINGS: dict[str, dict[str, Any]] = {
    "olmo2": {}, "starcoder2": {}, "gemma": {"head_dim": 16}, "granite": {"logits_scaling": 8.0}, "stablelm": {},
    "cohere": {"logit_scale": 0.25}, "gemma2": WINDOW, "gemma3_text": WINDOW,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {}, "falcon": {"alibi": True}, "gpt_oss": {"head_dim": 16, "num_local_experts": 4},
    "phi3": {}, "lfm2": {"layer_types": ["conv", "full_attention"]}, "llama4_text": {"head_dim": 16},
}  # fmt: skip
PACKS, PADS, ATTENTION, LOSS = "packs", "pads", "attention", "loss"
EXPECTED = {
    "olmo2": {PACKS, ATTENTION, LOSS},
    "starcoder2": {PACKS, ATTENTION, LOSS},
    "gemma": {PACKS, ATTENTION, LOSS},
    "opt": {PACKS, ATTENTION, LOSS},
    "gemma3_text": {PACKS, ATTENTION, LOSS},
    "granite": {PACKS, ATTENTION, LOSS},  # divides its logits
    "cohere": {PACKS, ATTENTION, LOSS},  # multiplies its logits
    "gemma2": {PACKS, ATTENTION, LOSS},  # caps scores and logits
    "stablelm": {PACKS, LOSS},  # passes no keyword to its attention
    "gpt_oss": {PACKS, ATTENTION, LOSS},  # has sinks
    "bloom": {PADS, LOSS},
    "falcon": {PADS, LOSS},
    "lfm2": {PADS, LOSS},  # a convolution over time
}


def built(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    made = AutoConfig.for_model(family, **{**SIZES, **SETTINGS[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(made, dtype=dtype).eval().requires_grad_(False)
    switch_off_dropout(model)
    return model


def learned(model: PeftModel, batches: list[Batch], paths: Paths) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of all adapter parameters."""
    loss = sum(token_loss_sum(model.get_base_model(), batch, paths) for batch in batches)
    gradients = torch.autograd.grad(loss, list(attach.trainable(model, "first").values()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def switched_on(made: Accelerated) -> set[str]:
    paths = made.paths
    names = {PACKS: paths.packs, PADS: paths.pads, ATTENTION: paths.passes_starts, LOSS: paths.supervised_rows_only}
    return {name for name, on in names.items() if on}


def own_forwards(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.closes("A10")
@pytest.mark.parametrize("family", EXPECTED)
def test_packed_fast_training_equals_plain_training_of_single_documents(family: str) -> None:
    model = built(family)
    expected = learned(adapted(copy.deepcopy(model)).train(), BATCH.documents()[::2], PLAIN_PATHS)
    made = accelerate(model, FAST)
    assert switched_on(made) == EXPECTED[family]
    batches = [BATCH] if made.paths.share_a_pass else BATCH.documents()[::2]
    peft_model = adapted(model).train()
    with accelerated_lora(peft_model, "first", FAST):
        found = learned(peft_model, batches, made.paths)
    assert all(relative(f, e) < 1e-4 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "expected"),
    [("gemma2", LogitMap(cap=30.0)), ("granite", LogitMap(scale=1 / 8)), ("cohere", LogitMap(0.25)), ("phi3", PRODUCT)],
)
def test_function_from_head_to_logits_is_measured(family: str, expected: LogitMap, dtype: torch.dtype) -> None:
    """The logits of a random model are too small to show a cap: the check replaces the head's outputs."""
    assert accelerate(built(family, dtype), FAST).paths.logit_map == expected


def test_logits_that_are_another_function_of_the_head_use_the_plain_loss() -> None:
    model = built("cohere")
    model.logit_scale = torch.linspace(0.1, 0.2, VOCABULARY)  # one factor a word
    made = accelerate(model, FAST)
    assert switched_on(made) == {PACKS, ATTENTION}
    assert "plain loss: the logits are not the product with the head, scaled or soft-capped" in made.reasons


@pytest.mark.parametrize(
    ("family", "dtype"), [("bloom", torch.bfloat16), ("falcon", torch.float16), ("opt", torch.float64)]
)
def test_self_check_finds_leaking_documents_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    """With weights of the usual size, 0.02, attention changes a random model's logits less than rounding does."""
    made = accelerate(built(family, dtype), config.Fast(attention=False))
    assert not made.paths.packs
    assert "packing off, rows of similar length side by side: packed documents see each other" in made.reasons


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_switches_no_fast_path_off(family: str, dtype: torch.dtype) -> None:
    made = accelerate(tiny_model(family, dtype=dtype).requires_grad_(False), FAST)
    assert switched_on(made) == {PACKS, ATTENTION, LOSS}
    assert not [line for line in made.reasons if "transformers" in line]


@pytest.mark.parametrize(
    ("kind", "compute_dtype", "least_exact"),
    [("nf4", "auto", torch.float32), ("nf4", "bfloat16", torch.bfloat16), ("int8", "auto", torch.float32)],
)
def test_quantization_switches_no_fast_path_off(
    kind: str, compute_dtype: str, least_exact: torch.dtype, tmp_path: Path
) -> None:
    """In SmolLM2-135M, bfloat16 products of NF4 layers change the gradient by 0.007 between packed and single."""
    quant = config.Quant(kind=config.QuantKind[kind], compute_dtype=config.Dtype[compute_dtype])
    base = load_base(config.Model(path=str(tiny_folder(tmp_path, "llama"))), quant, "cpu")
    assert switched_on(accelerate(base.model, FAST)) == {PACKS, ATTENTION, LOSS}
    assert self_check.tolerance(base.model) == self_check._TOLERANCE[least_exact]


def test_models_with_chunks_are_not_packed_and_windows_must_reach_packed_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradient cannot show this: the documents of the check are shorter than any window."""
    made = accelerate(built("llama4_text"), FAST)
    assert switched_on(made) == {PADS}
    assert "packing off, rows of similar length side by side: attention counts chunks along a row" in made.reasons
    model = built("gemma3_text")
    assert ATTENTION in switched_on(accelerate(model, FAST))
    model = built("gemma3_text")
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    made = accelerate(model, FAST)
    assert switched_on(made) == {PACKS, LOSS}
    assert any("have a sliding window that packed attention does not receive" in line for line in made.reasons)


def test_packed_attention_applies_sliding_windows_in_long_documents() -> None:
    model = built("gemma3_text", torch.float64, sliding_window=6)
    expected = learned(adapted(copy.deepcopy(model)).train(), BATCH.documents()[::2], PLAIN_PATHS)
    made = accelerate(model, FAST)
    assert made.paths.passes_starts
    found = learned(adapted(model).train(), [BATCH], made.paths)
    assert all(relative(f, e) < 1e-6 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restore_undoes_storage_forwards_and_attention(family: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, family, dtype=torch.bfloat16)
    model = load_base(config.Model(path=str(folder)), config.Quant(), "cpu").model
    ids = BATCH.documents()[0].ids[None]
    before = {name: (p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    logits, implementation, attributes = model(input_ids=ids).logits, model.config._attn_implementation, _names(model)
    with accelerated(model, FAST):
        assert own_forwards(model)
        assert any(p.dtype == torch.bfloat16 for p in model.parameters())
        assert model.config._attn_implementation == attention.NAME
    assert not own_forwards(model) and _names(model) == attributes
    assert model.config._attn_implementation == implementation
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name][0] and torch.equal(parameter, before[name][1])
    assert torch.equal(model(input_ids=ids).logits, logits)


def _names(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_accelerated_adapter_leaves_nothing_on_the_base(quant: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    model = load_base(config.Model(path=str(folder)), config.Quant(kind=config.QuantKind[quant]), "cpu").model
    made = accelerate(model, FAST)
    forwards, attributes = own_forwards(model), _names(model)
    peft_model = adapted(model).train()
    with accelerated_lora(peft_model, "first", FAST):
        assert len(own_forwards(model)) > len(forwards)
        learned(peft_model, BATCH.documents(), made.paths)
    seen = weakref.ref(peft_model)
    peft_model.unload()
    del peft_model
    gc.collect()
    assert seen() is None
    # PEFT adds attributes to the base.
    added = {name: names - attributes[name] for name, names in _names(model).items() if names - attributes[name]}
    assert own_forwards(model) == forwards
    assert all(not {"forward", "token_loss_sum"} & names for names in added.values())


def test_replaced_forwards_restores_a_forward_set_on_the_instance() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x
    with replaced_forwards({layer: torch.neg}):
        assert layer(torch.ones(1)) == -1
    assert layer.forward is own


def test_storage_is_undone_if_a_model_casts_activations_to_the_weights_dtype() -> None:
    """T5 casts the input of a layer to its weight's dtype, so a weight stored in bfloat16 would round it."""
    model = tiny_model("llama", dtype=torch.bfloat16).float().requires_grad_(False)
    assert any("weights stored in bfloat16" in line for line in accelerate(copy.deepcopy(model), FAST).reasons)
    size = T5Config(d_model=64, d_ff=96, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    for layer in model.model.layers:
        layer.mlp = T5DenseGatedActDense(size).to(torch.bfloat16).float().eval().requires_grad_(False)
    made = accelerate(model, FAST)
    assert any(line.startswith("plain storage: this model computes other numbers") for line in made.reasons)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_long_document_does_not_change_the_rotation_of_others() -> None:
    """longrope chooses frequencies by the largest position of a forward pass; the check's documents are short."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4,
            "original_max_position_embeddings": 12, "factor": 16.0}  # fmt: skip
    model = built("phi3", rope_parameters=rope, original_max_position_embeddings=12, initializer_range=0.2)
    expected = [token_loss_sum(model, document, PLAIN_PATHS) for document in BATCH.documents()]
    with accelerated(model, FAST) as made, torch.no_grad():
        found = document_loss_sums(model, BATCH, made.paths)
    assert relative(found, torch.stack(expected)) < 1e-5


def test_head_below_an_adapter_keeps_its_storage() -> None:
    """The loss with the adapter off reads the head's weight directly."""
    model = tiny_model("llama").requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    batch = BATCH.documents()[0]
    expected = token_loss_sum(model, batch, PLAIN_PATHS)
    peft_model = attach.attach(model, config.Adapter(r=3, target_modules=["lm_head", "q_proj"]), "first", 1, [])
    with accelerated(model, FAST) as made, adapter_off(peft_model), torch.no_grad():
        assert made.paths.supervised_rows_only
        assert relative(token_loss_sum(model, batch, made.paths), expected) < 1e-5


def test_self_check_rejects_a_wrong_block_that_passed_its_own_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_ft.models.accelerated_blocks._is_equal", lambda *_: True)
    model = built("gemma")
    made = accelerate(model, FAST)
    assert switched_on(made) == {PACKS, ATTENTION, LOSS} and not own_forwards(model)
    assert any(line.startswith("all blocks compute as transformers does") for line in made.reasons)


def test_base_without_a_finite_loss_stays_plain() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.norm.weight.fill_(float("nan"))
    made = accelerate(model, FAST)
    assert made.paths == PLAIN_PATHS and "not finite" in made.reasons[0] and not own_forwards(model)


def test_out_of_memory_is_raised_and_the_model_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = tiny_model("llama").requires_grad_(False)
    monkeypatch.setattr(self_check, "token_loss_sum", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(model, FAST)
    assert not own_forwards(model) and model.config._attn_implementation == attention.PLAIN


def test_self_check_keeps_random_state_and_training_mode() -> None:
    model = tiny_model("gpt2").requires_grad_(False).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    accelerate(model, FAST)
    assert torch.equal(torch.rand(3), expected) and model.training


def test_without_check_all_selected_paths_are_used() -> None:
    made = accelerate(built("bloom"), FAST, check=False)
    assert switched_on(made) == {PACKS, ATTENTION, LOSS}
