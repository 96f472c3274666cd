"""The kernels of `fast.kernels` equal the definitions of norm, gated activation and RoPE, and can be computed again."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_ft.errors import ConfigError
from lora_ft.ops import kernels
from lora_ft.ops.mlp import activation_gradient, gated_plain
from lora_ft.ops.norm import rms_norm_plain
from lora_ft.ops.recomputable import recipe_of
from lora_ft.ops.rope import rotate_plain
from lora_ft.values import BlockKernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let only these of the packages triton and liger_kernel be found."""
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object() if name in names else None)


@pytest.mark.parametrize(
    ("device", "choice", "packages", "expected"),
    [
        (CPU, "auto", ("triton", "liger_kernel"), "eager"),
        (CPU, "eager", (), "eager"),
        (CUDA, "eager", ("triton", "liger_kernel"), "eager"),
        (CUDA, "auto", ("triton", "liger_kernel"), "liger-kernel"),
        (CUDA, "liger", ("triton", "liger_kernel"), "liger-kernel"),
        (CUDA, "auto", ("triton",), "torch.compile"),
        (CUDA, "compile", ("triton", "liger_kernel"), "torch.compile"),
        (CUDA, "auto", ("liger_kernel",), "eager"),
        (CUDA, "auto", (), "eager"),
    ],
)
def test_kernels_are_chosen_by_device_and_packages(
    device: torch.device, choice: str, packages: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *packages)
    substitute_liger(monkeypatch)
    assert kernels.choose_kernels(device, BlockKernels(choice)).name == expected


@pytest.mark.parametrize(
    ("device", "choice", "packages", "message"),
    [
        (CPU, "compile", ("triton",), "fast.kernels=compile needs a CUDA device, but this run uses cpu"),
        (CPU, "liger", ("triton", "liger_kernel"), "fast.kernels=liger needs a CUDA device"),
        (CUDA, "liger", ("triton",), r"pip install 'lora_ft\[cuda\]'"),
        (CUDA, "liger", ("liger_kernel",), r"pip install 'lora_ft\[cuda\]'"),
        (CUDA, "compile", (), "pip install triton"),
    ],
)
def test_kernels_that_this_machine_does_not_have_are_refused(
    device: torch.device, choice: str, packages: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *packages)
    with pytest.raises(ConfigError, match=message):
        kernels.choose_kernels(device, BlockKernels(choice))


def substitute_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install functions with the parameters of Liger's that compute the definitions, and write where those write."""
    ops: Any = ModuleType("liger_kernel.ops")

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        assert (offset, casting_mode, in_place) in ((0.0, "llama", False), (1.0, "gemma", False))
        return rms_norm_plain(x, weight, eps, offset)

    def pair(activation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return gate, up, gated_plain(gate, up, activation)

        def backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            found = activation_gradient(dy * up, gate, activation), gated_plain(gate, dy, activation)
            gate.data.copy_(found[0])  # as a Triton kernel: unseen by the version counter
            up.data.copy_(found[1])
            return gate, up

        return forward, backward

    ops.LigerRMSNormFunction = SimpleNamespace(apply=rms_norm)
    ops.swiglu_forward, ops.swiglu_backward = pair("silu")
    ops.geglu_forward, ops.geglu_backward = pair("gelu_tanh")

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = PLAIN.rotate(q * 1, k * 1, cos, sin)
        for x, y in zip((q, k), rotated, strict=True):
            x.data.copy_(y.detach())
        return rotated

    ops.LigerRopeFunction = SimpleNamespace(apply=rotate)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)


def inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(num_tokens)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, gate, up = (drawn(1, num_tokens, 16).requires_grad_() for _ in range(3))
    q, k = (drawn(1, num_tokens, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = (f(drawn(1, num_tokens, 4)).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    return SimpleNamespace(x=x, gate=gate, up=up, weight=drawn(16), q=q, k=k, cos=cos, sin=sin)


def computed(
    found: kernels.Kernels, given: SimpleNamespace, activation: str = "silu", offset: float = 0.0
) -> list[Tensor]:
    """Return values and gradients of all three; check that recipes give the same bits and keep only inputs."""
    # Copies that are no leaves: Liger writes to q, k, gate and up.
    leaves = [given.x, given.gate, given.up, given.q, given.k]
    gate, up, q, k = (t * 1 for t in leaves[1:])
    normed = found.rms_norm(given.x, given.weight, 1e-5, offset)
    product = found.gated(gate, up, activation)
    for y in (normed, product) if found is not PLAIN else ():
        recipe = recipe_of(y)
        assert recipe is not None
        assert {id(t) for t in recipe.tensors} <= {id(t) for t in (given.x, given.weight, gate, up)}
        with torch.no_grad():
            again = recipe.function(*recipe.tensors)
        assert torch.equal(again, y) and again.data_ptr() != y.data_ptr()
        assert recipe_of(y) is not None  # the call did not modify an input
    q, k = found.rotate(q, k, given.cos, given.sin)
    loss = sum(t.float().sin().sum() for t in (normed, product, q, k))
    results = [t.detach().clone() for t in (normed, product, q, k)]
    return [*results, *torch.autograd.grad(loss, leaves)]


PLAIN = kernels.Kernels(
    rms_norm_plain,
    gated_plain,
    lambda q, k, cos, sin: (rotate_plain(q, cos, sin), rotate_plain(k, cos, sin)),
    "plain",
)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own imports
def test_compiled_kernels_are_one_graph_each_for_any_number_of_tokens() -> None:
    """Traced and differentiated as on a GPU, but run without the code generator."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    compiled = kernels.compiled_kernels(backend)
    for activation, offset in (("silu", 0.0), ("gelu_tanh", 1.0)):
        computed(compiled, inputs(5), activation, offset)
        before = backend.frame_count
        for num_tokens in (7, 12, 30):
            given = inputs(num_tokens)
            expected = computed(PLAIN, given, activation, offset)
            for ours, plain in zip(computed(compiled, given, activation, offset), expected, strict=True):
                torch.testing.assert_close(ours, plain)
        assert backend.frame_count == before


@pytest.mark.parametrize(("activation", "offset"), [("silu", 0.0), ("gelu_tanh", 1.0), ("gelu", 0.0)])
def test_liger_functions_get_correct_arguments(activation: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels need a GPU; substitutes with the same parameters compute the definitions."""
    substitute_liger(monkeypatch)
    found = kernels.liger_kernels()
    expected = computed(PLAIN, inputs(5), activation, offset)
    for ours, plain in zip(computed(found, inputs(5), activation, offset), expected, strict=True):
        assert torch.equal(ours, plain)


def test_second_backward_over_gradients_written_by_liger_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute with gradients in place of gate and up."""
    substitute_liger(monkeypatch)
    gate, up = (torch.randn(3, 4, requires_grad=True) * 1 for _ in range(2))
    y = kernels.liger_kernels().gated(gate, up, "silu")
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert recipe_of(y) is None


INTERPRETED = """
import numpy, torch, triton.language as tl
from triton.runtime import interpreter
convert = interpreter._implicit_cvt
def with_floats(value):  # as on a GPU; the interpreter of triton 3.9 passes them on as Python numbers
    if not isinstance(value, float):
        return convert(value)
    handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), tl.float32)
    return tl.tensor(handle, tl.float32)
interpreter._implicit_cvt = with_floats
import liger_kernel.ops.geglu, liger_kernel.ops.rms_norm  # functions of CUDA's libdevice, which it does not have
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
from lora_ft.ops import kernels
from test_kernels import PLAIN, computed, inputs
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 3e-3)):  # it has no arithmetic in bfloat16
    for activation, offset in (("silu", 0.0), ("gelu_tanh", 1.0)):
        given = inputs(5, dtype)
        expected = computed(PLAIN, given, activation, offset)
        found = computed(kernels.liger_kernels(), given, activation, offset)
        for number, (ours, plain) in enumerate(zip(found, expected, strict=True)):
            error = (ours.double() - plain.double()).norm() / plain.double().norm()
            assert error < bound, (dtype, activation, number, float(error))
"""


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("liger_kernel", "triton")),
    reason="Liger's kernels, interpreted on the CPU: pip install liger-kernel triton",
)
def test_ligers_own_kernels_equal_the_definitions_in_tritons_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tensors_without_values_get_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of a loaded model calls its kernels with meta tensors, on which neither Liger's nor compiled ones run."""
    substitute_liger(monkeypatch)
    ops = sys.modules["liger_kernel.ops"]
    for name in vars(ops):
        if "forward" in name or "Function" in name:
            monkeypatch.setattr(ops, name, None)
    found = kernels.liger_kernels()
    x, weight = torch.randn(2, 3, 4, device="meta", requires_grad=True), torch.randn(4, device="meta")
    y = found.rms_norm(x * 1, weight, 1e-6, 0.0)
    product = found.gated(y, x * 1, "silu")
    q, k = found.rotate((product * 1)[None], (y * 1)[None], weight, weight)
    assert recipe_of(y) and recipe_of(product) and q.shape == k.shape == (1, 2, 3, 4)
    (gradient,) = torch.autograd.grad((q + k).sum(), x)
    assert gradient.shape == x.shape and gradient.is_meta
