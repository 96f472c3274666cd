"""LoRA layers in bfloat16 and float16 over float32 matrices: errors against float64, and casts of whole layers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from accelerated import accelerate_adapter, adapted, packed, relative
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.models.acceleration import accelerate, accelerated_lora
from lora_ft.ops import compute_copies
from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.gradient_checkpointing import recomputed_layers
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.training import optimizers

HALF = [torch.bfloat16, torch.float16]
NAMES = ("y", "dx", "dA", "dB", "dm")

# Layers [inputs, outputs] of SmolLM2-135M, Qwen3-0.6B and Llama-3.2-1B.
SHAPES = [(576, 1536), (1024, 3072), (2048, 512)]


class Net(nn.Module):
    """One linear layer, for PEFT to adapt."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def get_input_embeddings(self) -> nn.Module:
        return self.layer


def net(inputs: int, outputs: int, dtype: torch.dtype, **settings: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 16, "lora_alpha": 32, "target_modules": ["layer"], "init_lora_weights": False} | settings
    model = get_peft_model(Net(inputs, outputs).to(dtype), LoraConfig(**options), adapter_name="first")
    for n, parameter in model.named_parameters():
        if "lora_" in n:  # typical sizes after some training
            parameter.data = 0.02 * torch.randn(parameter.shape) + ("magnitude" in n)
    return model.train()


def results(model: Any, x: Tensor, dy: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Return the output and the gradients for x and the adapter's parameters."""
    x = x.clone().requires_grad_()
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    return [y.detach(), *torch.autograd.grad((y.double() * dy.double()).sum(), [x, *parameters])]


def exact(model: Any, inputs: int, outputs: int, x: Tensor, dy: Tensor, **settings: Any) -> list[Tensor]:
    """Return the results of the same weights and inputs in float64, by PEFT's forward."""
    twin = net(inputs, outputs, torch.float64, **settings)
    twin.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    return results(twin.double(), x.double(), dy.double())


def errors(shape: tuple[int, int], dtype: torch.dtype, **settings: Any) -> Iterator[tuple[str, float, float]]:
    """Yield for each result its name, the error of PEFT under autocast, and ours."""
    model = net(*shape, dtype, **settings)
    x, dy = torch.randn(2, 96, shape[0]).to(dtype), torch.randn(2, 96, shape[1]).to(dtype)
    expected = exact(model, *shape, x, dy, **settings)
    peft = results(model, x, dy, autocast=dtype)
    assert accelerate_adapter(model, "first") == []
    ours = results(model, x, dy)
    assert ours[0].dtype == ours[1].dtype == dtype and all(g.dtype is torch.float32 for g in ours[2:])
    for name, p, o, e in zip(NAMES, peft, ours, expected, strict=False):
        yield name, relative(p, e), relative(o, e)


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.nightly), SHAPES[2]])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_error_against_float64_is_no_larger_than_pefts_under_autocast(
    shape: tuple[int, int], dtype: torch.dtype, settings: dict[str, Any], record_property: Callable[[str, str], None]
) -> None:
    found = list(errors(shape, dtype, **settings))
    method = "DoRA" if settings else "LoRA"
    line = ", ".join(f"{name} {ours:.1e} ({peft:.1e})" for name, peft, ours in found)
    record_property("figure", f"{method} {dtype} {shape}, error against float64 (PEFT under autocast): {line}")
    assert all(ours <= 1.02 * peft for _, peft, ours in found), line


@pytest.mark.parametrize("dtype", HALF)
def test_dropout_in_half_precision_draws_a_mask_for_forward_and_backward(dtype: torch.dtype) -> None:
    model = net(576, 1536, dtype, lora_dropout=0.5)
    x, dy = torch.randn(96, 576).to(dtype), torch.randn(96, 1536).to(dtype)
    assert accelerate_adapter(model, "first") == []
    y, dx, da, db = results(model, x, dy)
    layer = model.base_model.model.layer
    a, b, w = (t.detach().double() for t in (layer.lora_A.first.weight, layer.lora_B.first.weight, layer.weight))
    torch.manual_seed(1)
    dropped, mask = torch.native_dropout(x, 0.5, True)
    expected = [
        x.double() @ w.T + layer.bias.double() + 2 * dropped.double() @ a.T @ b.T,
        dy.double() @ w + 2 * (dy.double() @ b @ a) * mask * 2,
        2 * (dy.double() @ b).T @ dropped.double(),
        2 * dy.double().T @ (dropped.double() @ a.T),
    ]
    bound = 2.0 ** (-7 if dtype is torch.bfloat16 else -10)
    assert all(relative(found, e) < bound for found, e in zip((y, dx, da, db), expected, strict=True))


class Casts(TorchDispatchMode):
    """Counts conversions to 16 bits."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and result.dtype in HALF
        return result


@pytest.mark.parametrize("recomputed", ["off", "every_1"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_matrices_of_a_layer_are_cast_together(settings: dict[str, Any], recomputed: str) -> None:
    """A forward of a layer casts its matrices A by one operation, and B, and changes no number by that."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    model, batches = adapted(base, **settings).train(), (packed(5, 9), packed(7))
    parameters = attach.trainable(model, "first")
    flat = optimizers.flatten(parameters)
    paths = accelerate(base, config.Fast(), check=False).paths
    matrices = [p for n, p in parameters.items() if "lora_A" in n or "lora_B" in n]

    def step(separate: bool) -> tuple[Tensor, int]:
        flat.gradients.zero_()
        torch.manual_seed(3)
        with accelerated_lora(model, "first", config.Fast()), recomputed_layers(base, recomputed), ExitStack() as stack:
            if separate:
                stack.enter_context(mock.patch.object(compute_copies, "_copy", lambda *_: None))
            with Casts() as casts:
                for batch in batches:
                    token_loss_sum(base, batch, paths).backward()
        assert not any(vars(matrix) for matrix in matrices)
        return flat.gradients.clone(), casts.count

    expected, casts_at_each_use = step(separate=True)
    found, casts = step(separate=False)
    assert torch.equal(found, expected)
    uses = 14 * (3 if "use_dora" in settings else 2)  # DoRA's norms read A again
    assert casts_at_each_use - casts == 2 * (1 if recomputed == "off" else 2) * (uses - 2 * 2)


def test_copies_are_views_of_one_cast_and_a_matrix_of_the_dtype_needs_none() -> None:
    named = {f"{i}.lora_A": nn.Parameter(torch.randn(2, 3)) for i in range(3)}
    optimizers.flatten(named)
    layer, matrices = nn.Identity(), list(named.values())
    other = nn.Parameter(torch.randn(4))
    with compute_copies.copied_by_layer([(layer, [*matrices, other])], torch.float16):
        seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda *_: seen.extend(compute_copy(m, torch.float16) for m in matrices))
        layer(torch.ones(1))
        assert len({copy.untyped_storage().data_ptr() for copy in seen}) == 1
        assert all(torch.equal(copy, matrix.half()) for copy, matrix in zip(seen, matrices, strict=True))
    assert compute_copy(matrices[0], torch.bfloat16).dtype is torch.bfloat16
    own = compute_copy(matrices[0], torch.float32)
    assert own.data_ptr() == matrices[0].data_ptr() and not own.requires_grad


def test_copies_end_with_a_forward_that_fails() -> None:
    named = {"0.lora_A": nn.Parameter(torch.randn(2, 3))}
    optimizers.flatten(named)
    matrices, layer = list(named.values()), nn.Linear(2, 2)
    with compute_copies.copied_by_layer([(layer, matrices)], torch.float16):
        with pytest.raises(RuntimeError):
            layer(torch.ones(3))  # of another width
        assert not vars(matrices[0])
