"""Blocks that keep less give the same loss and gradients in real models, and change nothing else."""

import copy
import dataclasses
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from accelerated import accelerate_adapter, adapted, relative
from peft import PeftModel
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models import accelerated_blocks
from lora_ft.models.acceleration import accelerate
from lora_ft.ops.batch import Batch
from lora_ft.ops.gradient_checkpointing import recompute_layers
from lora_ft.ops.kernels import OWN, Kernels
from lora_ft.ops.token_loss import token_loss_sum

LENGTHS = (9, 1, 14)
IDS = torch.randint(4, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1,
         "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
OTHERS = {
    "mistral": MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES),
    "qwen2": Qwen2Config(num_key_value_heads=2, **SIZES),
    "gemma": GemmaConfig(num_key_value_heads=2, head_dim=16, **SIZES),  # 1 + weight in norms, GELU in gated MLPs
}
ALL = (*FAMILIES, *OTHERS)
BLOCKS = config.Fast(storage=False, attention=False, loss=False, lora=False)


def use_fast_blocks(model: Any, fast: config.Fast = BLOCKS, **options: Any) -> list[str]:
    """Accelerate only the blocks; return the log lines about them."""
    lines = accelerate(model.get_base_model() if isinstance(model, PeftModel) else model, fast, **options).reasons
    return [line for line in lines if "blocks" in line or line.startswith(("plain norm", "plain mlp", "plain rope"))]


def built(model_config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=dtype).eval()


def base(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = built(OTHERS[family], dtype) if family in OTHERS else tiny_model(family, dtype=dtype)
    with torch.no_grad():  # norms of ones and zeros would hide errors in their weights
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model.requires_grad_(False)


def learned(model: PeftModel) -> tuple[Tensor, Tensor]:
    """Return logits of packed documents, and the gradient of all adapter parameters."""
    parameters = list(attach.trainable(model, "first").values())
    logits = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    gradients = torch.autograd.grad(logits.float().square().sum(), parameters)
    return logits.detach(), torch.cat([g.flatten() for g in gradients])


def kept_bytes(model: PeftModel) -> int:
    """Return the bytes of activations, each storage once, that a forward keeps for the backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body = model.get_base_model().base_model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)
    del body
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 2e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_fast_blocks_give_the_same_logits_and_gradients(family: str, dtype: torch.dtype, bound: float) -> None:
    model = adapted(base(family, dtype))
    logits, gradients = learned(model)
    lines = use_fast_blocks(model)
    found_logits, found_gradients = learned(model)
    if family in ("gpt2", "gpt_neox") and dtype is torch.float64:  # other models use fp32 inside
        bound = 1e-12
    assert not [line for line in lines if "transformers" in line]
    assert relative(found_gradients, gradients) < bound
    if family == "gpt2":  # one operation instead of eight rounds differently
        assert relative(found_logits, logits) < bound
    else:
        assert torch.equal(found_logits, logits)


@pytest.mark.parametrize("family", ALL)
def test_fast_gradients_are_as_accurate_as_plain_ones(family: str) -> None:
    model = adapted(base(family))
    exact = learned(copy.deepcopy(model).double())[1]
    plain = relative(learned(model)[1], exact)
    use_fast_blocks(model)
    assert relative(learned(model)[1], exact) < 2 * plain < 1e-5


@pytest.mark.parametrize(("family", "checkpoint"), [*zip(ALL, cycle(["off", "every_1", "every_2"]))])
def test_lora_layers_with_recipes_and_checkpointing_give_the_same_gradients(family: str, checkpoint: str) -> None:
    model = adapted(base(family))
    expected = learned(model)
    use_fast_blocks(model)
    accelerate_adapter(model, "first")
    recompute_layers(model.get_base_model(), checkpoint)
    model.train()  # recomputation needs it; of the tiny models, gpt2 and gpt_neox have dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert all(relative(f, e) < 2e-5 for f, e in zip(learned(model), expected, strict=True))


@pytest.mark.closes("A10")
@pytest.mark.parametrize("family", ALL)
def test_fast_blocks_pass_document_boundaries_to_packed_attention(family: str) -> None:
    model = adapted(base(family))
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    batch = Batch(IDS[0], POSITIONS[0], IDS[0].roll(-1), starts)
    paths = accelerate(model.get_base_model(), config.Fast(norm=False, mlp=False, rope=False)).paths
    expected = token_loss_sum(model.get_base_model(), batch, paths).detach()
    use_fast_blocks(model, config.Fast())
    found = token_loss_sum(model.get_base_model(), batch, paths).detach()
    assert relative(found, expected) < 1e-6
    leaking = token_loss_sum(
        model.get_base_model(), dataclasses.replace(batch, starts=[0, IDS.shape[1]]), paths
    ).detach()
    assert relative(leaking, expected) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_keep_neither_normed_inputs_nor_the_mlp_product(family: str) -> None:
    """A layer saves at least two normed inputs and the MLP's product, in fp32."""
    tokens, hidden, inner, layers = IDS.shape[1], 64, 128, 2
    model = adapted(base(family))
    accelerate_adapter(model, "first")
    before = kept_bytes(model)
    use_fast_blocks(model)
    saved = before - kept_bytes(model)
    assert saved >= 4 * tokens * layers * (2 * hidden + inner)


def test_gradients_are_the_same_if_no_layer_uses_the_recipes() -> None:
    """PEFT's own LoRA forward, and a layer that casts its input, keep the input themselves."""
    model = adapted(base("llama"), target_modules=["q_proj", "down_proj"])
    expected = learned(model)
    use_fast_blocks(model)
    plain = learned(model)
    accelerate_adapter(model, "first")
    assert relative(plain[1], expected[1]) < 2e-5
    assert relative(learned(model)[1], expected[1]) < 2e-5


@pytest.mark.parametrize("family", ALL)
def test_without_gradients_the_models_own_forwards_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = base(family), base(family)
    names = list(model.state_dict())
    use_fast_blocks(model)
    monkeypatch.setattr(accelerated_blocks, "layer_norm", None)
    for module in model.modules():
        if "forward" in vars(module):  # _forward(module, plain, fast)
            module.forward = partial(module.forward.func, *module.forward.args[:2], None)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(input_ids=IDS).logits, bare(input_ids=IDS).logits)
            assert torch.equal(
                model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False),
                bare.generate(IDS[:, :5], max_new_tokens=4, do_sample=False),
            )
    assert list(model.state_dict()) == names


def test_given_kernels_run_if_gradients_are_enabled() -> None:
    calls: list[str] = []
    functions = {name: getattr(OWN, name) for name in ("rms_norm", "gated", "rotate")}
    watched = Kernels(*(lambda *a, f=f, n=n: calls.append(n) or f(*a) for n, f in functions.items()), "watched")
    model = adapted(base("llama"))
    use_fast_blocks(model, kernels=watched)
    calls_of_the_check = calls.copy()
    calls.clear()
    learned(model)
    assert set(calls_of_the_check) == set(calls)
    assert {name: calls.count(name) for name in calls} == {"rms_norm": 5, "gated": 2, "rotate": 2}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_key_cache_and_output_attentions_work_with_gradients(family: str) -> None:
    bare, model = base(family), base(family)
    use_fast_blocks(model)
    results = []
    for m in (bare, model):
        m.set_attn_implementation("eager")
        cache = DynamicCache(config=m.config)
        first = m(input_ids=IDS[:, :6], past_key_values=cache, use_cache=True)
        second = m(input_ids=IDS[:, 6:9], past_key_values=first.past_key_values, use_cache=True, output_attentions=True)
        results.append((second.logits, *second.attentions))
    assert all(torch.equal(f, e) for f, e in zip(*results, strict=True))


@pytest.mark.parametrize(("family", "norm"), [("llama", "input_layernorm"), ("gpt2", "ln_1")])
@pytest.mark.parametrize("late", [False, True])
def test_norm_that_trains_uses_the_plain_form_and_its_own_weights(family: str, norm: str, late: bool) -> None:
    """PEFT trains a deep copy of the norm, which must not compute with the original's weights."""
    model = base(family)
    if not late:
        use_fast_blocks(model)
    found = adapted(model, modules_to_save=[norm])
    expected = adapted(base(family), modules_to_save=[norm])
    if late:
        use_fast_blocks(found)
    assert all(relative(f, e) < 2e-5 for f, e in zip(learned(found), learned(expected), strict=True))


def test_copied_model_computes_with_its_own_weights() -> None:
    model = base("llama")
    use_fast_blocks(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(input_ids=IDS).logits, base("llama")(input_ids=IDS).logits)


def test_replaced_blocks_are_logged_and_replaced_only_once() -> None:
    model = base("qwen3")
    assert use_fast_blocks(model, dataclasses.replace(BLOCKS, mlp=False)) == [
        "plain mlp: fast.mlp=false",
        "accelerated blocks: 9 norm, 2 rope",
    ]
    assert not [m for m in model.modules() if type(m).__name__ == "Qwen3MLP" and "forward" in vars(m)]
    assert use_fast_blocks(model) == ["accelerated blocks: 2 mlp"]
    assert use_fast_blocks(model) == []


@pytest.mark.parametrize(
    ("model_config", "lines"),
    [
        (
            GemmaConfig(num_key_value_heads=2, head_dim=16, hidden_act="quick_gelu", **SIZES),
            {"accelerated blocks: 5 norm, 2 rope", "2 blocks compute as transformers does: GemmaMLP"},
        ),
        (
            LlamaConfig(num_key_value_heads=2, hidden_act="relu", **SIZES),
            {
                "2 blocks compute as transformers does: LlamaMLP",
                "accelerated blocks: 5 norm, 2 rope",
            },
        ),
    ],
)
def test_blocks_that_compute_something_else_stay_plain(model_config: Any, lines: set[str]) -> None:
    model = adapted(built(model_config).requires_grad_(False))
    expected = learned(model)
    assert set(use_fast_blocks(model)) == lines
    assert torch.equal(learned(model)[0], expected[0])
    assert relative(learned(model)[1], expected[1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_differ_are_replaced_by_eager_ones(dtype: torch.dtype) -> None:
    """Also if they differ only in the model's own dtype."""

    def wrong(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return OWN.gated(gate, up, activation) * (1.1 if gate.dtype is dtype else 1.0)

    model = adapted(base("llama", dtype))
    expected = learned(model)
    lines = use_fast_blocks(model, kernels=OWN._replace(gated=wrong, name="others"))
    assert "2 blocks with eager kernels, since others differs: LlamaMLP" in lines
    assert all(
        relative(f, e) < (2e-5 if dtype is torch.float32 else 0.1)
        for f, e in zip(learned(model), expected, strict=True)
    )


def test_norm_that_multiplies_otherwise_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 1.001 * plain(self, x))
    lines = use_fast_blocks(base("llama"))
    assert "5 blocks compute as transformers does: LlamaRMSNorm" in lines
