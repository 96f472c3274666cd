"""The kernels of `fast.compile` and `fast.liger` equal the definitions of norm, SwiGLU and RoPE."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_ft.errors import ConfigError
from lora_ft.ops import kernels
from lora_ft.ops.mlp import swiglu_plain
from lora_ft.ops.norm import rms_norm_plain
from lora_ft.ops.rope import rotate_plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_either_setting_our_own_functions_are_chosen() -> None:
    assert kernels.choose_kernels(CPU, compile_=False, liger=False) is kernels.OWN
    assert kernels.choose_kernels(CUDA, compile_=False, liger=False) is kernels.OWN


@pytest.mark.parametrize(
    "device, compile_, liger, message",
    [
        (CPU, True, False, "fast.compile=true needs a CUDA device, but this run uses cpu"),
        (CPU, False, True, "fast.liger=true needs a CUDA device"),
        (CUDA, True, True, "set only one of them"),
        (CUDA, False, True, "pip install liger-kernel"),
    ],
)
def test_settings_that_this_machine_does_not_support_are_refused(
    device: torch.device, compile_: bool, liger: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        kernels.choose_kernels(device, compile_=compile_, liger=liger)


def inputs(num_tokens: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(num_tokens)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, up = (drawn(1, num_tokens, 16).requires_grad_() for _ in range(2))
    q, k = (drawn(1, num_tokens, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = (f(drawn(1, num_tokens, 4)).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    return SimpleNamespace(x=x, up=up, weight=drawn(16), q=q, k=k, cos=cos, sin=sin)


def computed(found: kernels.Kernels, given: SimpleNamespace) -> list[Tensor]:
    """Return values and gradients of all three."""
    normed = found.rms_norm(given.x, given.weight, 1e-5)
    product = found.swiglu(given.x, given.up)
    q, k = found.rotate(given.q, given.k, given.cos, given.sin)
    loss = normed.sin().sum() + product.sin().sum() + q.sin().sum() + k.cos().sum()
    gradients = torch.autograd.grad(loss, [given.x, given.up, given.q, given.k])
    return [tensor.detach() for tensor in (normed, product, q, k, *gradients)]


PLAIN = kernels.Kernels(
    rms_norm_plain, swiglu_plain, lambda q, k, cos, sin: (rotate_plain(q, cos, sin), rotate_plain(k, cos, sin))
)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own imports
def test_compiled_kernels_are_one_graph_each_for_any_number_of_tokens() -> None:
    """Traced and differentiated as on a GPU, but run without the code generator."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    compiled = kernels.compiled_kernels(backend)
    for num_tokens in (7, 12):
        given = inputs(num_tokens)
        for ours, plain in zip(computed(compiled, given), computed(PLAIN, given), strict=True):
            torch.testing.assert_close(ours, plain)
    assert backend.frame_count == 3


def test_liger_functions_get_correct_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels need a GPU; substitutes with the same parameters compute the definitions."""
    functions: Any = ModuleType("liger_kernel.ops")

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return rms_norm_plain(x, weight, eps)

    functions.LigerRMSNormFunction = SimpleNamespace(apply=rms_norm)
    functions.LigerSiLUMulFunction = SimpleNamespace(apply=swiglu_plain)
    functions.LigerRopeFunction = SimpleNamespace(apply=PLAIN.rotate)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", functions)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: object())
    found = kernels.choose_kernels(CUDA, compile_=False, liger=True)
    assert found is not None
    for ours, plain in zip(computed(found, inputs(5)), computed(PLAIN, inputs(5)), strict=True):
        assert torch.equal(ours, plain)
