"""The weight of a frozen layer equals its definition to the bit in every storage format."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ft.models.quantize import dequantize_reference, exact_int8, import_bitsandbytes
from lora_ft.ops.weights import frozen_linear, frozen_weight, why_no_weight

bnb = import_bitsandbytes()
SHAPES = [(24, 64), (64, 24), (5, 6), (96, 192)]


def four_bit(shape: tuple[int, int], kind: str, double: bool, *, bias: bool = False) -> Any:
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=bias, compute_dtype=torch.float32, quant_type=kind, compress_statistics=double
    )
    layer.support_avx512bf16_for_cpu = False  # as models/quantize.py sets it
    return layer.to("cpu").requires_grad_(False)


def int8(shape: tuple[int, int]) -> Any:
    layer: Any = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False).to("cpu")
    layer.__class__, layer.compute_dtype = exact_int8(), torch.float32  # as models/quantize.py sets them
    return layer.requires_grad_(False)


def stored_small(layer: Any) -> Any:
    """Store a layer as models/storage.py does, but keep its forward."""
    layer.weight.data = layer.weight.data.bfloat16()
    layer.compute_dtype = torch.float32
    return layer.requires_grad_(False)


def layers() -> dict[str, Any]:
    torch.manual_seed(0)
    conv = Conv1D(24, 64)
    conv.bias.data.normal_()
    return {
        "linear": nn.Linear(64, 24).requires_grad_(False),
        "conv1d": conv.requires_grad_(False),
        "bf16 linear": stored_small(nn.Linear(64, 24)),
        "bf16 conv1d": stored_small(Conv1D(24, 64)),
        "int8": int8((24, 64)),
        "nf4": four_bit((24, 64), "nf4", False),
        "nf4 double": four_bit((24, 64), "nf4", True),
        "fp4 double": four_bit((24, 64), "fp4", True),
    }


def learned(product: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    x = inputs.clone().requires_grad_()
    y = product(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


@pytest.mark.closes("B03")
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bit_weight_is_codes_times_scales(shape: tuple[int, int], kind: str, double: bool) -> None:
    torch.manual_seed(1)
    layer = four_bit(shape, kind, double)
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None and weight.fresh
    # The order of operations is the same; fused multiply-adds differ in the last bit.
    torch.testing.assert_close(weight(), dequantize_reference(layer), rtol=3e-7, atol=1e-9)
    assert torch.equal(weight(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weight_is_codes_times_scales_before_and_after_a_forward(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    layer = int8(shape)
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None
    first = weight()
    torch.testing.assert_close(first, dequantize_reference(layer), rtol=3e-7, atol=0)
    layer(torch.randn(3, shape[1]))
    assert torch.equal(weight(), first)


@pytest.mark.parametrize("name", layers())
def test_frozen_linear_equals_the_layers_own_product_in_training(name: str) -> None:
    """Value and gradient: equal to the layer's own bit for bit, and to float64 within rounding."""
    layer = layers()[name]
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None and weight().dtype == torch.float32 and weight().shape == (24, 64)
    x = torch.randn(2, 7, 64)
    found = learned(lambda t: frozen_linear(t, weight, layer.bias), x)
    if not name.startswith("bf16"):  # which has no forward of its own
        for ours, theirs in zip(found, learned(layer, x), strict=True):
            assert torch.equal(ours, theirs)
    exact, bias = weight().double(), None if layer.bias is None else layer.bias.double()
    for ours, true in zip(found, learned(lambda t: nn.functional.linear(t, exact, bias), x.double()), strict=True):
        assert (ours - true).norm() / true.norm() < 1e-6


def test_int8_computes_as_bitsandbytes_does_when_it_trains_on_a_cpu() -> None:
    layer, x = int8((24, 64)), torch.randn(5, 64)
    theirs: Any = bnb.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=False)
    theirs.weight = layer.weight
    theirs.train()
    for ours, expected in zip(learned(layer, x), learned(theirs, x), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", layers())
def test_modifying_a_fresh_weight_does_not_change_the_layer(name: str) -> None:
    layer = layers()[name]
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None
    before = weight().clone()
    if weight.fresh:
        weight().add_(1.0)
        assert torch.equal(weight(), before)
    else:
        assert weight().data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("name", layers())
def test_weight_is_read_again_at_each_call(name: str) -> None:
    layer = layers()[name]
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None
    before = weight().clone()
    layer.weight.data.view(torch.uint8)[:] = 0
    assert not torch.equal(weight(), before)


def test_layers_without_a_frozen_weight_have_a_reason() -> None:
    float32, quantized_elsewhere = torch.float32, four_bit((8, 64), "nf4", False)
    quantized_elsewhere.weight.quant_state.dtype = torch.bfloat16
    reasons = {
        "is of type Embedding": nn.Embedding(4, 4),
        "is of type NonDynamicallyQuantizableLinear": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
        "computes in bfloat16": nn.Linear(4, 4, dtype=torch.bfloat16),
        "computes in float64": Conv1D(4, 4).double(),
        "not quantized yet": bnb.nn.Linear4bit(64, 8, compute_dtype=float32),
        "quantized from another dtype": quantized_elsewhere,
    }
    for reason, layer in reasons.items():
        assert reason in why_no_weight(layer, float32)
        assert frozen_weight(layer, float32) is None
    assert "computes in float32" in why_no_weight(int8((8, 64)), torch.bfloat16)
    elsewhere = int8((8, 64))
    elsewhere.weight = bnb.nn.Int8Params(torch.empty(8, 64, dtype=torch.int8, device="meta"), requires_grad=False)
    assert not why_no_weight(elsewhere, float32)
    half = four_bit((8, 64), "nf4", False)
    half.compute_dtype = torch.bfloat16
    assert "computes in bfloat16" in why_no_weight(half, float32)
    assert not why_no_weight(nn.Linear(4, 4), float32)


def test_frozen_linear_saves_no_tensor_for_the_backward() -> None:
    saved: list[Tensor] = []
    layer = layers()["nf4"]
    weight = frozen_weight(layer, torch.float32)
    assert weight is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(torch.randn(3, 64, requires_grad=True), weight, None).sum()
    assert saved == []


def test_plain_layers_need_no_bitsandbytes() -> None:
    code = (
        "import sys, torch; from lora_ft.ops.weights import frozen_weight; "
        "w = torch.nn.Linear(3, 2); assert frozen_weight(w, torch.float32)().shape == (2, 3); "
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
