"""An int8 layer multiplies by its dequantized weight: in training, evaluation and generation, on every device."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerated import accelerate_adapter, adapted, packed
from bitsandbytes.autograd import _functions
from tiny import tiny_folder
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models.acceleration import accelerate, dequantized_weights
from lora_ft.models.load import load_base
from lora_ft.models.quantize import dequantize_reference
from lora_ft.ops.token_loss import document_loss_sums
from lora_ft.ops.weights import frozen_weight


def loaded(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    settings = config.Model(path=str(tiny_folder(folder, family)), dtype=config.Dtype(str(dtype).split(".")[1]))
    return load_base(settings, config.Quant(kind=config.QuantKind.int8), "cpu").model


def int8_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes compute as it does on CUDA, where its training forward rounds activations as well."""
    monkeypatch.setattr(_functions.MatMul8bitFp, "apply", _functions.MatMul8bitLt.apply)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_loss_of_a_document_does_not_depend_on_the_documents_packed_with_it(
    tmp_path: Path, training: bool, fast: bool
) -> None:
    """bitsandbytes chooses outlier columns of a whole pack, and so one document would change another one's result."""
    base = loaded(tmp_path)
    paths = accelerate(base, config.Fast()).paths
    for layer in int8_layers(base):
        layer.state.threshold = 1.0  # so that the small activations of this model have outliers
    model = adapted(base).train(training)
    if fast:
        accelerate_adapter(model, "first")
    batch = packed(9, 21)
    other = packed(9, 21)
    other.ids[9:] = other.ids[9:].roll(5)
    first, second = (document_loss_sums(base, b, paths)[0] for b in (batch, other))
    assert torch.equal(first, second)
    alone = document_loss_sums(base, batch.documents()[0], paths)[0]
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_multiplies_by_the_dequantized_weight(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = loaded(tmp_path, family, dtype)
    layer = int8_layers(model)[-1]
    layer.state.threshold = 6.0
    weight = frozen_weight(layer, dtype)
    assert weight is not None
    x = torch.randn(2, 7, layer.in_features).to(dtype)
    x[0, 3, 5] = 20.0  # an outlier
    expected = linear(x, weight(), layer.bias)
    with torch.no_grad():
        found = {"eval": layer.eval()(x), "train": layer.train()(x)}
        with dequantized_weights(model):
            found["generation"] = layer.eval()(x)
    found["backward"] = layer(x.requires_grad_())
    for mode, product in found.items():
        assert torch.equal(product, expected), mode
    (gradient,) = torch.autograd.grad(found["backward"], x, expected)
    assert torch.equal(gradient, expected @ weight())


def test_weight_is_the_codes_times_their_scales_rounded_once(tmp_path: Path) -> None:
    """bfloat16 holds every code exactly; only the product with the scale is rounded."""
    for layer in int8_layers(loaded(tmp_path, dtype=torch.bfloat16)):
        weight = frozen_weight(layer, torch.bfloat16)
        assert weight is not None
        assert layer.weight.to(torch.bfloat16).to(torch.int8).equal(layer.weight.data)
        exact = dequantize_reference(layer).double()
        assert (weight().double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert ((weight().double() - exact).abs() <= 2**-8 * exact.abs()).all()


def test_train_and_eval_give_the_same_logits(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    ids = packed(12).ids[None]
    with torch.no_grad():
        evaluated, trained = model.eval()(input_ids=ids).logits, model.train()(input_ids=ids).logits
    assert torch.equal(evaluated, trained)


def test_generation_computes_with_weights_that_are_dequantized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_ft.ops import weights

    model, calls = loaded(tmp_path), []
    dequantize = weights._from_int8
    monkeypatch.setattr(weights, "_from_int8", lambda *a: calls.append(1) or dequantize(*a))
    ids = packed(4).ids[None]
    with torch.no_grad(), dequantized_weights(model):
        for _ in range(3):
            model(input_ids=ids)
    assert len(calls) == len(int8_layers(model)) == 14
