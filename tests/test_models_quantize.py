"""Quantized bases: the planned layers are quantized, their values follow the definitions, and use changes nothing."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.models import load, quantize
from lora_ft.models.fingerprint import fingerprint

bnb = quantize.import_bitsandbytes()
KINDS = ("int8", "nf4", "fp4")
IDS = torch.tensor([[5, 300, 7, 44, 511, 20]])

# Layer names per block, listed so that the test does not depend on the tested code.
LLAMA = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
PLANS = {
    "llama": [f"model.layers.{i}.{part}" for i in (0, 1) for part in LLAMA],
    "qwen3": [f"model.layers.{i}.{part}" for i in (0, 1) for part in LLAMA],
    "gpt2": [
        f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "gpt_neox": [
        f"gpt_neox.layers.{i}.{p}" for i in (0, 1)
        for p in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    ],
}  # fmt: skip
# The 16 levels of each type: NF4 from the QLoRA paper (arXiv 2305.14314, appendix E), FP4 as bitsandbytes documents
# it: sign, two bits of exponent, one of mantissa, over 12.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def base_of(folder: Path, kind: str, **settings) -> load.Base:
    quant = {k: settings.pop(k) for k in ("double", "compute_dtype") if k in settings}
    model = config.Model(path=str(folder), **settings)
    return load.load_base(model, config.Quant(kind=config.QuantKind(kind), **quant), "cpu")


@pytest.mark.closes("B04")
@pytest.mark.parametrize(("family", "kind", "tie"), [(f, k, (i + j) % 2 == 0) for i, f in enumerate(FAMILIES)
                                                     for j, k in enumerate(KINDS)])  # fmt: skip
def test_only_linear_layers_except_the_head_are_quantized(tmp_path, family, kind, tie):
    base = base_of(tiny_folder(tmp_path, family, tie=tie), kind)
    assert sorted(base.quantized) == sorted(PLANS[family])
    small = {torch.int8} if kind == "int8" else {torch.uint8}
    assert {base.model.get_submodule(name).weight.dtype for name in base.quantized} == small
    source = tiny_model(family, tie=tie)
    for name, parameter in base.model.named_parameters():
        if name.removesuffix(".weight") not in base.quantized:
            assert torch.equal(parameter, source.get_parameter(name)), name
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_equals_a_model_with_the_dequantized_weights(tmp_path, family, kind):
    base = base_of(tiny_folder(tmp_path, family), kind)
    plain = tiny_model(family)
    for name in base.quantized:
        weight = quantize.dequantize_reference(base.model.get_submodule(name))
        target = plain.get_submodule(name).weight
        error = (weight - (target.T if family == "gpt2" else target)).norm() / target.norm()
        assert 0 < error < {"int8": 0.01, "nf4": 0.12, "fp4": 0.16}[kind]
        target.data.copy_(weight.T if family == "gpt2" else weight)
    outputs, gradients = [], []
    for model in (base.model, plain):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.logsumexp(-1).sum().backward()
        outputs.append(logits.detach())
        gradients.append(embeddings.grad)
    for found, expected in (outputs, gradients):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert expected.norm() > 0


@pytest.mark.closes("B03")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weights_follow_the_published_levels_and_block_scales(tmp_path, kind, double):
    base = base_of(tiny_folder(tmp_path, "llama"), kind, double=double)
    levels = torch.tensor(NF4 if kind == "nf4" else FP4)
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.quant_state.nested is double
    weight = quantize.dequantize_reference(layer)
    assert torch.equal(weight, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    source = tiny_model("llama").get_submodule("model.layers.0.mlp.up_proj").weight.view(-1, 64)
    scales = source.abs().amax(dim=1, keepdim=True)
    nearest = levels[(source / scales)[..., None].sub(levels).abs().argmin(-1)] * scales
    if double:  # the scales are rounded to 8 bits
        assert (weight.view(-1, 64) - nearest).abs().max() < 0.02 * scales.max()
    else:
        assert torch.allclose(weight.view(-1, 64), nearest, rtol=1e-6, atol=0)


def by_bitsandbytes(weight: torch.Tensor, blocksize: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Call bitsandbytes' own kernel, which ours replaces on the CPU."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return torch.ops.bitsandbytes.quantize_4bit.default.redispatch(key, weight, blocksize, kind, torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 128]),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_quantize_4bit_gives_the_bits_of_bitsandbytes(shape, dtype, kind, blocksize, scale, seed):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    ours, theirs = (
        quantize.quantize_4bit(weight, blocksize, kind, torch.uint8),
        by_bitsandbytes(weight, blocksize, kind),
    )
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    registered = torch.ops.bitsandbytes.quantize_4bit(weight, blocksize, kind, torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(ours, registered, strict=True))


def test_values_between_two_levels_are_rounded_as_bitsandbytes_does():
    for kind, levels in (("nf4", NF4), ("fp4", FP4)):
        ordered = torch.tensor(levels).sort().values
        middle = (ordered[:-1] + ordered[1:]) / 2
        row = torch.cat(
            [middle, middle.nextafter(torch.tensor(1.0)), middle.nextafter(torch.tensor(-1.0)), torch.ones(1)]
        )
        weight = torch.nn.functional.pad(row, (0, 64 - len(row)))
        assert torch.equal(
            quantize.quantize_4bit(weight, 64, kind, torch.uint8)[0], by_bitsandbytes(weight, 64, kind)[0]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_using_a_quantized_base_does_not_change_its_bytes(tmp_path, family, kind):
    # bitsandbytes would repack 4-bit weights at the first inference, and cast biases to the dtype of products.
    compute = {} if kind == "int8" else {"compute_dtype": config.Dtype.bfloat16}
    base = base_of(tiny_folder(tmp_path, family), kind, **compute)
    before = fingerprint(base.model)
    with torch.no_grad():
        first = base.model(IDS).logits
        assert torch.equal(base.model(IDS).logits, first)
    assert fingerprint(base.model) == before
    base.model.train()
    base.model(inputs_embeds=torch.randn(1, 4, 64, requires_grad=True)).logits.sum().backward()
    assert fingerprint(base.model) == before
    base.model.eval()
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, first)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_twice_gives_the_same_fingerprint_which_includes_the_scales(tmp_path, kind):
    folder = tiny_folder(tmp_path, "llama")
    base = base_of(folder, kind)
    before = fingerprint(base.model)
    assert before == fingerprint(base_of(folder, kind).model)
    weight = base.model.get_submodule(base.quantized[3]).weight
    scale = weight.SCB if kind == "int8" else weight.quant_state.state2.absmax
    scale.view(-1)[0] *= 1.5
    assert fingerprint(base.model) != before


def test_inference_in_float32_does_not_compute_in_bfloat16(tmp_path):
    base = base_of(tiny_folder(tmp_path, "llama"), "nf4")
    layer = base.model.get_submodule(base.quantized[0])
    inputs = torch.randn(3, 64)
    with torch.no_grad():
        found = layer(inputs)
    expected = inputs @ quantize.dequantize_reference(layer).T
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_compute_dtype_defaults_to_the_models_dtype(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    for settings_, expected in (({}, torch.float32), ({"compute_dtype": config.Dtype.bfloat16}, torch.bfloat16),
                                ({"dtype": config.Dtype.bfloat16}, torch.bfloat16)):  # fmt: skip
        base = base_of(folder, "nf4", **settings_)
        assert base.model.get_submodule(base.quantized[0]).compute_dtype is expected


def test_added_tokens_work_with_quantized_layers(tmp_path):
    base = base_of(tiny_folder(tmp_path, "llama"), "nf4", added_tokens=["<think>"])
    assert sorted(base.quantized) == sorted(PLANS["llama"])
    assert base.model(torch.tensor([[512]])).logits.shape[-1] == 513


@pytest.mark.closes("B04")
def test_quantized_head_or_unquantized_layer_is_an_error_that_names_it(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    # A skip list replaces transformers' default list, which contains lm_head.
    settings_ = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.1.mlp.up_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings_, device_map={"": "cpu"})
    model.config.quantization_config.llm_int8_skip_modules = None  # with a list, it would be that of quantized files
    with pytest.raises(ConfigError, match=r"missing \['model\.layers\.1\.mlp\.up_proj'\].*unexpected \['lm_head'\]"):
        quantize.check_plan(model)


def scaled(kind: str, monkeypatch: pytest.MonkeyPatch, factor) -> None:
    """Multiply the products of quantized layers by factor(rows)."""
    owner, name = (quantize, "frozen_linear") if kind == "int8" else (bnb, "matmul_4bit")
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda x, *a, **options: right(x, *a, **options) * factor(len(x)))


@pytest.mark.closes("B06")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("factor", "rows"),
    [
        (lambda rows: 1.05, 1),
        (lambda rows: math.nan, 1),
        (lambda rows: 1.05 if 1 < rows <= 1536 else 1, 8),
        (lambda rows: 1.05 if rows > 1536 else 1, 2048),
    ],
)
def test_kernel_that_computes_wrong_products_is_found_when_the_base_loads(tmp_path, kind, factor, rows, monkeypatch):
    """bitsandbytes has kernels of their own for few rows; training uses the one for many."""
    folder = tiny_folder(tmp_path, "gpt2")
    scaled(kind, monkeypatch, factor)
    with pytest.raises(ResourceError, match=f"computes wrong products on cpu for {rows} rows"):
        base_of(folder, kind)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.05 * grad


@pytest.mark.closes("B06")
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_that_computes_wrong_gradients_is_found_when_the_base_loads(tmp_path, kind, monkeypatch):
    folder = tiny_folder(tmp_path, "llama")
    if kind == "int8":
        right = quantize.frozen_linear
        monkeypatch.setattr(quantize, "frozen_linear", lambda x, *a: right(WrongBackward.apply(x), *a))
    else:  # the backward's kernel, which the forward does not use
        right = bnb.functional.dequantize_4bit
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a: 1.05 * right(*a))
    with pytest.raises(ResourceError, match="computes wrong gradients on cpu for 1 rows"):
        base_of(folder, kind)


def test_out_of_memory_while_quantizing_is_an_error_that_names_it(tmp_path, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = tiny_folder(tmp_path, "llama")
    monkeypatch.setattr(bnb.functional, "quantize_4bit", run_out)
    with pytest.raises(
        ResourceError, match="llama cannot be quantized on cpu; the most common reason is lack of memory"
    ):
        base_of(folder, "nf4")


def test_unquantized_load_does_not_configure_bitsandbytes(tmp_path):
    assert quantize.bitsandbytes_config(config.Quant(), torch.float32) is None
