"""The chunked loss equals the plain one, and is accurate compared with float64."""

import pytest
import torch
from accelerated import relative
from torch import Tensor

from lora_ft.ops import cross_entropy
from lora_ft.ops.cross_entropy import HeadLora, linear_cross_entropy, linear_cross_entropy_plain

MANY_WORDS = 2 * cross_entropy._BLOCK_WORDS + 5  # more than one block, the last one short


@pytest.mark.parametrize("words", [50, MANY_WORDS])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, cross_entropy.CHUNK_ROWS, 2 * cross_entropy.CHUNK_ROWS + 3])
def test_chunked_loss_equals_plain_loss(rows: int, with_bias: bool, with_lora: bool, words: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = draw(rows, 16), draw(words, 16), draw(words) if with_bias else None
    lora = HeadLora(draw(3, 16), draw(words, 3), 1.7) if with_lora else None
    targets = torch.randint(0, words, (rows,), generator=generator)
    learn = [hidden, *(lora[:2] if lora else ())]
    for tensor in learn:
        tensor.requires_grad_()
    results = []
    for form in (linear_cross_entropy_plain, linear_cross_entropy):
        loss = form(hidden, weight, bias, targets, lora)
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, learn)))
    assert relative(results[1][0], results[0][0]) < 1e-14
    for found, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert relative(found, expected) < 1e-12
    with torch.no_grad():
        assert relative(linear_cross_entropy(hidden, weight, bias, targets, lora), results[0][0]) < 1e-14


def test_extreme_logits_give_the_plain_loss() -> None:
    """One target has a probability below the smallest float, one is almost certain."""
    weight = torch.eye(3, dtype=torch.float64)
    hidden = torch.tensor([[900.0, 0, 0], [900.0, 0, 0], [-900.0, -900.0, -900.0]], dtype=torch.float64)
    hidden.requires_grad_()
    targets = torch.tensor([1, 0, 2])
    results = []
    for form in (linear_cross_entropy_plain, linear_cross_entropy):
        loss = form(hidden, weight, None, targets)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-14, atol=1e-300)


def test_second_backward_gives_the_same_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 4), None, torch.tensor([0, 6, 3]))
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_chunked_loss_passes_gradcheck() -> None:
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(9, 6, dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, None, targets), (hidden,))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunked_loss_is_accurate_in_lower_precision(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(300, 32).to(dtype), torch.randn(200, 32).to(dtype)
    targets = torch.randint(0, 200, (300,))
    exact = hidden.double().requires_grad_()
    expected = linear_cross_entropy_plain(exact, weight.double(), None, targets)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    hidden.requires_grad_()
    found = linear_cross_entropy(hidden, weight, None, targets)
    (gradient,) = torch.autograd.grad(found, hidden)
    assert found.dtype == torch.float32
    assert relative(found.double().detach(), expected.detach()) < bound
    assert relative(gradient.double(), expected_gradient) < bound


@pytest.mark.parametrize(("weight_trains", "bias_trains"), [(True, None), (True, False), (False, True)])
def test_chunked_loss_refuses_a_head_that_trains(weight_trains: bool, bias_trains: bool | None) -> None:
    weight = torch.randn(9, 6, requires_grad=weight_trains)
    bias = None if bias_trains is None else torch.randn(9, requires_grad=bias_trains)
    with pytest.raises(ValueError, match="head"):
        linear_cross_entropy(torch.randn(2, 6), weight, bias, torch.tensor([1, 2]))


def test_chunked_loss_gives_gradients_only_to_tensors_that_require_them() -> None:
    """As for a LoRA on the head over a frozen body."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 6), (9, 6), (2, 6), (9, 2))
    )
    targets = torch.randint(0, 9, (7,), generator=generator)
    for learn in ([a], [b], [a, b], [hidden, b]):
        for tensor in (hidden, a, b):
            tensor.requires_grad_(any(tensor is one for one in learn))
        forms = (linear_cross_entropy_plain, linear_cross_entropy)
        results = [
            torch.autograd.grad(form(hidden, weight, None, targets, HeadLora(a, b, 0.5)), learn) for form in forms
        ]
        assert all(relative(found, expected) < 1e-13 for expected, found in zip(*results, strict=True))
