"""Norms, activations and rotations that keep less: values, gradients, recipes and saved tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerated import relative
from torch import Tensor
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.models.gemma import modeling_gemma
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from lora_ft.ops.cross_entropy import linear_cross_entropy
from lora_ft.ops.mlp import gated, gated_plain, gelu
from lora_ft.ops.norm import layer_norm, rms_norm, rms_norm_plain
from lora_ft.ops.recomputable import recipe_of, with_recipe
from lora_ft.ops.rope import rotate, rotate_plain
from lora_ft.ops.tiled_attention import tiled_attention

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTH = 24
NARROW = torch.bfloat16
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
swiglu = partial(gated, activation="silu")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kept(function: Callable[[], Tensor]) -> set[int]:
    """Return the addresses of the storages that `function` saves for its backward."""
    addresses: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        addresses.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return addresses


def addresses(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def angles(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return cos and sin [1, T, width] of two packed documents, with equal halves as in a model's rotary embedding."""
    positions = torch.cat([torch.arange(tokens // 2), torch.arange(tokens - tokens // 2)])
    turns = positions[:, None] / 10 ** (torch.arange(width // 2) / width)
    both = torch.cat((turns, turns), dim=-1)[None]
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_rms_norm_equals_transformers_bit_for_bit(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    x, norm = random(3, 7, WIDTH, dtype=dtype), modeling_llama.LlamaRMSNorm(WIDTH, EPS)
    norm.weight.data = random(WIDTH, dtype=weight_dtype or dtype, seed=1)
    norm.requires_grad_(False)
    for form in (rms_norm, rms_norm_plain):
        found = form(x, norm.weight, EPS)
        assert found.dtype == norm(x).dtype
        assert torch.equal(found, norm(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_norm_with_offset_equals_gemmas_bit_for_bit(dtype: torch.dtype) -> None:
    x, norm = random(3, 7, WIDTH, dtype=dtype).requires_grad_(), modeling_gemma.GemmaRMSNorm(WIDTH, EPS)
    norm.weight.data = random(WIDTH, dtype=dtype, seed=1)
    norm.requires_grad_(False)
    dy = random(3, 7, WIDTH, dtype=dtype, seed=2)
    (expected,) = torch.autograd.grad(norm(x), x, dy)
    for form in (rms_norm, rms_norm_plain):
        assert torch.equal(form(x, norm.weight, EPS, 1.0), norm(x))
        (found,) = torch.autograd.grad(form(x, norm.weight, EPS, 1.0), x, dy)
        assert relative(found, expected) < torch.finfo(dtype).eps * 4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gradient_of_rms_norm_is_close_to_float64(dtype: torch.dtype, bound: float, scale: float) -> None:
    x, weight, dy = (random(*s, dtype=dtype, seed=n) for n, s in enumerate([(5, 9, WIDTH), (WIDTH,), (5, 9, WIDTH)]))
    x = (x * scale).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
    (expected,) = torch.autograd.grad(y, exact, dy.double())
    (found,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, dy)
    (plain,) = torch.autograd.grad(rms_norm_plain(x, weight, EPS), x, dy)
    assert found.dtype == dtype
    assert relative(found, expected) < bound
    assert relative(found, plain) < bound


def test_rms_norm_keeps_its_input_and_one_number_per_row() -> None:
    x, weight = random(6, WIDTH).requires_grad_(), random(WIDTH)
    y = rms_norm(x, weight, EPS)
    recipe = recipe_of(y)
    assert recipe is not None
    (_, reciprocal_rms, _) = recipe.tensors
    assert reciprocal_rms is not None and reciprocal_rms.shape == (6, 1)
    found = {id(t) for t in recipe.tensors}
    assert found == {id(x), id(reciprocal_rms), id(weight)}
    # The autograd node saves nothing else, and shares the numbers per row with the recipe.
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == addresses(x, weight, reciprocal_rms)


def test_rms_norm_refuses_a_weight_that_trains() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(random(2, WIDTH), random(WIDTH).requires_grad_(), EPS)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_equals_torchs_and_keeps_no_output(affine: bool) -> None:
    x = random(6, WIDTH).requires_grad_()
    weight, bias = (random(WIDTH, seed=1), random(WIDTH, seed=2)) if affine else (None, None)
    y = layer_norm(x, weight, bias, EPS)
    assert torch.equal(y, functional.layer_norm(x, (WIDTH,), weight, bias, EPS))
    assert not kept(lambda: layer_norm(x, weight, bias, EPS)) & addresses(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation_equals_its_definition_bit_for_bit_and_keeps_two_tensors(
    dtype: torch.dtype, activation: str
) -> None:
    own, plain_form = (partial(form, activation=activation) for form in (gated, gated_plain))
    gate, up = (random(5, WIDTH, dtype=dtype, seed=n).requires_grad_() for n in (0, 1))
    assert torch.equal(own(gate, up), plain_form(gate, up))
    dy = random(5, WIDTH, dtype=dtype, seed=2)
    found = torch.autograd.grad(own(gate, up), (gate, up), dy)
    plain = torch.autograd.grad(plain_form(gate, up), (gate, up), dy)
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))
    assert kept(lambda: own(gate, up)) == addresses(gate, up)
    assert len(kept(lambda: plain_form(gate, up))) == 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_gated_activation_passes_gradcheck(frozen: str, activation: str) -> None:
    tensors = {name: random(3, 4, dtype=torch.float64, seed=n) for n, name in enumerate(("gate", "up"))}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    assert torch.autograd.gradcheck(partial(gated, activation=activation), tuple(tensors.values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_overwrites_activations_and_never_a_leaf(activation: str) -> None:
    leaves = [random(3, 4, seed=i).requires_grad_() for i in range(2)]
    before = [leaf.detach().clone() for leaf in leaves]
    expected = torch.autograd.grad(gated_plain(*leaves, activation).square().sum(), leaves)
    found = torch.autograd.grad(gated(*leaves, activation).square().sum(), leaves)
    assert all(map(torch.equal, before, leaves)) and all(map(torch.equal, found, expected))
    y = gated(*(leaf * 1 for leaf in leaves), activation).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, retain_graph=True), expected))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, leaves)


def test_swiglu_equals_its_definition_for_large_values() -> None:
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("inf")]).requires_grad_()
    up = torch.ones(7)
    (found,) = torch.autograd.grad(swiglu(gate, up).sum(), gate)
    (plain,) = torch.autograd.grad(gated_plain(gate, up, "silu").sum(), gate)
    assert torch.equal(found.nan_to_num(7.0), plain.nan_to_num(7.0))


def plain_rms_norm(x: Tensor) -> Tensor:
    norm = modeling_llama.LlamaRMSNorm(x.shape[-1], EPS)
    norm.weight.data = random(x.shape[-1], dtype=x.dtype, seed=1)
    return norm.requires_grad_(False)(x)


def exact_rms_norm(x: Tensor) -> Tensor:
    return random(x.shape[-1], dtype=NARROW, seed=1).to(x) * functional.rms_norm(x, x.shape[-1:], eps=EPS)


def turned(form: Callable[..., Tensor], x: Tensor) -> Tensor:
    return form(x[None], *(angle.to(x) for angle in angles(40, 256, NARROW)))


@pytest.mark.parametrize(
    ("form", "plain", "exact"),
    [
        (lambda x: rms_norm(x, random(x.shape[-1], dtype=x.dtype, seed=1), EPS), plain_rms_norm, exact_rms_norm),
        (lambda x: gelu(x, "gelu_tanh"), NewGELUActivation(), lambda x: functional.gelu(x, approximate="tanh")),
        (*(partial(turned, f) for f in (rotate, rotate_plain, rotate_plain)),),
        *[
            (*(partial(lambda x, f, a: f(x, x.roll(1, 0), a), f=f, a=activation) for f in (gated, *2 * [gated_plain])),)
            for activation in ACTIVATIONS
        ],
    ],
    ids=["rms_norm", "new gelu", "rotate", *ACTIVATIONS],
)  # fmt: skip
def test_error_in_bfloat16_is_not_larger_than_that_of_transformers(
    form: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]
) -> None:
    x = random(3, 40, 256, dtype=NARROW).requires_grad_()
    dy = random(3, 40, 256, dtype=NARROW, seed=7)
    results = []
    for function, leaf in ((form, x), (plain, x), (exact, x.detach().double().requires_grad_())):
        y = function(leaf).view(x.shape)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))))
    for found, other, expected in zip(*results, strict=True):
        assert found.dtype == NARROW
        assert relative(found, expected) <= 1.02 * relative(other, expected) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 8])
def test_rotation_equals_transformers_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    q, k = (random(1, 9, heads, 16, dtype=dtype, seed=heads).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = angles(9, width, dtype)
    modeling: Any = modeling_llama if width == 16 else modeling_gpt_neox
    for x, expected in zip((q, k), modeling.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        dy = random(*x.shape, dtype=dtype, seed=5)
        for form in (rotate, rotate_plain):
            assert torch.equal(form(x, cos, sin), expected)
        (found,) = torch.autograd.grad(rotate(x, cos, sin), x, dy)
        (plain,) = torch.autograd.grad(expected, x, dy, retain_graph=True)
        assert relative(found, plain) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("width", [6, 4])
def test_rotation_passes_gradcheck_with_different_halves(width: int) -> None:
    x = random(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    cos, sin = (random(2, 5, width, dtype=torch.float64, seed=n) for n in (1, 2))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    assert torch.equal(rotate(x, cos, sin), rotate_plain(x, cos, sin))


def test_rotation_keeps_only_the_angles() -> None:
    x = random(1, 5, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = angles(5, 8)
    assert kept(lambda: rotate(x, cos, sin)) == addresses(cos, sin)
    assert rotate(x, cos, sin).stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form",
    [
        lambda x: rms_norm(x, random(WIDTH, dtype=x.dtype, seed=1), EPS),
        lambda x: layer_norm(x, random(WIDTH, dtype=x.dtype, seed=1), random(WIDTH, dtype=x.dtype, seed=2), EPS),
        lambda x: layer_norm(x, None, None, EPS),
        lambda x: swiglu(x, random(*x.shape, dtype=x.dtype, seed=1)),
        lambda x: gelu(x, "gelu_tanh"),
        lambda x: gelu(x, "gelu"),
        lambda x: rms_norm(x, random(WIDTH, dtype=x.dtype, seed=1), EPS, 1.0),
        lambda x: gated(x, random(*x.shape, dtype=x.dtype, seed=1), "gelu_tanh"),
    ],
    ids=[
        "rms_norm",
        "layer_norm",
        "layer_norm without weights",
        "swiglu",
        "gelu tanh",
        "gelu erf",
        "gemma norm",
        "geglu",
    ],
)
def test_recipe_computes_the_tensor_again_bit_for_bit(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    # More rows than one thread takes, and a width that is not a multiple of a vector register.
    y = form(random(2000, WIDTH, dtype=dtype).requires_grad_())
    recipe = recipe_of(y)
    assert recipe is not None
    with torch.no_grad():
        again = recipe.function(*recipe.tensors)
    assert torch.equal(again, y)
    assert again.data_ptr() != y.data_ptr()


def test_recipe_is_invalid_after_its_input_was_modified() -> None:
    """Autograd does not notice this if the input requires no gradient, as in the first layer."""
    x = random(3, 8)
    y = rms_norm(x, random(8), EPS)
    assert recipe_of(y) is not None
    x.add_(1)
    assert recipe_of(y) is None


def test_recipe_belongs_to_one_unmodified_tensor() -> None:
    x = random(4, 6)
    y = with_recipe(x.clone(), torch.clone, x)
    assert recipe_of(y) is not None
    for other in (y.view(2, 12), y.T, y[:2], y.double(), y.clone(), y.detach(), x):
        assert recipe_of(other) is None
    y.mul_(2)
    assert recipe_of(y) is None


@pytest.mark.parametrize(
    "form",
    [
        lambda x: rms_norm(x, random(8), EPS),
        lambda x: swiglu(x, random(*x.shape)),
        lambda x: rotate(x, *angles(5, 8)),
        lambda x: linear_cross_entropy(x.flatten(0, -2), random(9, 8), None, torch.arange(10) % 9),
        lambda x: tiled_attention(x, x, x, (0, 5), None, 0.3),
    ],
    ids=["rms_norm", "swiglu", "rotate", "loss", "attention"],
)
def test_second_derivative_is_refused(form: Callable[[Tensor], Tensor]) -> None:
    """Saved intermediate values are constants to autograd, so a second derivative would be silently wrong."""
    x = random(1, 2, 5, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(form(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", [lambda x: rms_norm(x, random(8), EPS), lambda x: swiglu(x, x.detach())])
def test_modified_input_is_an_error_in_the_backward(form: Callable[[Tensor], Tensor]) -> None:
    x = random(3, 8).requires_grad_() * 1
    y = form(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
