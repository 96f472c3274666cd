"""Both forms of the chunked loss equal the plain one, and are accurate compared with float64."""

import re
from typing import Any

import pytest
import torch
from accelerated import relative
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lora_ft.ops import cross_entropy, cross_entropy_cpu
from lora_ft.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from lora_ft.ops.logits import PRODUCT, HeadLora, LogitMap

MANY_WORDS = 2 * cross_entropy_cpu._BLOCK_WORDS + 5  # more than one block, the last one short
ROWS = cross_entropy_cpu.CHUNK_ROWS
MAPS = [PRODUCT, LogitMap(scale=0.3), LogitMap(cap=4.0), LogitMap(scale=2.0, cap=4.0)]


@pytest.fixture(params=["cpu", "other devices"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute on the CPU with the form of each device; the chunks of other devices have 32 rows of 50 words."""
    monkeypatch.setattr(cross_entropy, "fits_processor_cache", lambda _: request.param == "cpu")
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 32 * 50 * 8)
    return request.param


@pytest.mark.parametrize("words", [50, MANY_WORDS])
@pytest.mark.parametrize(
    ("with_lora", "with_bias"),
    [
        (False, False),
        (True, True),
        *(pytest.param(*each, marks=pytest.mark.nightly) for each in [(False, True), (True, False)]),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 5, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("form")
def test_chunked_loss_equals_plain_loss(
    rows: int, with_bias: bool, with_lora: bool, words: int, logit_map: LogitMap, weighted: bool
) -> None:
    if words == MANY_WORDS and rows > ROWS:
        rows = 5  # chunks of rows and blocks of words do not depend on each other
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = draw(rows, 16), draw(words, 16), draw(words) if with_bias else None
    lora = HeadLora(draw(3, 16), draw(words, 3), 1.7) if with_lora else None
    targets = torch.randint(0, words, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator).mul(3).round(decimals=1) if weighted else None  # some are 0
    learn = [hidden, *(lora[:2] if lora else ())]
    for tensor in learn:
        tensor.requires_grad_()
    results = []
    for function in (linear_cross_entropy_plain, linear_cross_entropy):
        loss = function(hidden, weight, bias, targets, lora, logit_map, weights)
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, learn)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-13, atol=0)
    for found, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, bias, targets, lora, logit_map, weights)
        torch.testing.assert_close(evaluated, results[0][0], rtol=1e-13, atol=0)


@pytest.mark.usefixtures("form")
def test_extreme_logits_give_the_plain_loss() -> None:
    """One target has a probability below the smallest float, one is almost certain."""
    weight = torch.eye(3, dtype=torch.float64)
    hidden = torch.tensor([[900.0, 0, 0], [900.0, 0, 0], [-900.0, -900.0, -900.0]], dtype=torch.float64)
    hidden.requires_grad_()
    targets = torch.tensor([1, 0, 2])
    results = []
    for function in (linear_cross_entropy_plain, linear_cross_entropy):
        loss = function(hidden, weight, None, targets)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-14, atol=1e-300)


@pytest.mark.usefixtures("form")
def test_second_backward_gives_the_same_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 4), None, torch.tensor([0, 6, 3]))
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("form")
def test_a_derivative_of_the_gradient_is_refused() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(7, 4), None, torch.tensor([0, 6, 3]))
    (gradient,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("logit_map", MAPS)
def test_chunked_loss_passes_gradcheck(logit_map: LogitMap) -> None:
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(9, 6, dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, None, targets, logit_map=logit_map), (hidden,)
    )


def as_transformers(
    hidden: Tensor, weight: Tensor, targets: Tensor, lora: HeadLora | None, logit_map: LogitMap
) -> Tensor:
    """Return the loss as transformers computes it: logits, scale and cap in half precision, softmax in float32."""
    logits = linear(hidden, weight)
    if lora is not None:  # as PEFT under autocast
        through_a = linear(hidden, lora.a.to(hidden.dtype))
        logits = logits + linear(through_a, lora.b.to(hidden.dtype)) * lora.scaling
    return torch_cross_entropy(logit_map(logits).float(), targets, reduction="sum")


def drawn_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, HeadLora]:
    """Return hidden [400, 256], weight [3000, 256], targets with the logits of a trained model, a LoRA in fp32."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(size, 256, generator=generator).to(dtype) for size in (400, 3000))
    weight *= 0.15
    targets = torch.randint(0, 3000, (400,), generator=generator)
    a, b = torch.randn(8, 256, generator=generator) / 16, torch.randn(3000, 8, generator=generator) / 8
    return hidden, weight, targets, HeadLora(a, b, 0.5)


def differentiated(loss: Tensor, *learn: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, learn)]


def errors_of_loss_and_gradients(
    function: Any, dtype: torch.dtype, with_lora: bool, logit_map: LogitMap
) -> list[float]:
    """Return the relative errors of loss and gradients against the definition in float64."""
    hidden, weight, targets, lora = drawn_head(dtype)
    learn = [hidden, *(lora[:2] if with_lora else ())]
    exact = [tensor.double().requires_grad_() for tensor in learn]
    expected = differentiated(
        linear_cross_entropy_plain(
            exact[0], weight.double(), None, targets, HeadLora(*exact[1:], 0.5) if with_lora else None, logit_map
        ),
        *exact,
    )
    for tensor in learn:
        tensor.requires_grad_()
    found = differentiated(function(hidden, weight, targets, lora if with_lora else None, logit_map), *learn)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, *[torch.float32] * 2 * with_lora]
    return [relative(one, other) for one, other in zip(found, expected, strict=True)]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, lora: HeadLora | None, logit_map: LogitMap) -> Tensor:
    return linear_cross_entropy(hidden, weight, None, targets, lora, logit_map)


@pytest.mark.parametrize("logit_map", [PRODUCT, LogitMap(scale=0.3), LogitMap(cap=4.0)])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_not_larger_than_that_of_transformers(
    dtype: torch.dtype, with_lora: bool, logit_map: LogitMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits in float32 from half-precision products; a cap or a scale in half precision is less exact."""
    monkeypatch.setattr(cross_entropy, "fits_processor_cache", lambda _: False)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 100 * 3000 * 4)
    plain = errors_of_loss_and_gradients(as_transformers, dtype, with_lora, logit_map)
    found = errors_of_loss_and_gradients(chunked, dtype, with_lora, logit_map)
    # The errors of the rows have both signs, so the error of their sum may be small by chance.
    chance = max(torch.finfo(dtype).eps / 100, torch.finfo(torch.float32).eps)
    assert found[0] <= 1.02 * plain[0] + chance
    assert all(one <= 1.02 * other for one, other in zip(found[1:], plain[1:], strict=True))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("logit_map", [PRODUCT, LogitMap(scale=0.3), LogitMap(cap=4.0)])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weighted_loss_is_accurate_in_every_dtype(dtype: torch.dtype, with_lora: bool, logit_map: LogitMap) -> None:
    hidden, weight, targets, lora = drawn_head(dtype)
    hidden, targets = hidden[:100], targets[:100]
    weights = torch.rand(100, generator=torch.Generator().manual_seed(3)) * 3

    def results(hidden: Tensor, weight: Tensor, lora: HeadLora, form: Any) -> list[Tensor]:
        learn = [t.detach().requires_grad_() for t in (hidden, *(lora[:2] if with_lora else ()))]
        of_lora = HeadLora(*learn[1:], lora.scaling) if with_lora else None
        return differentiated(form(learn[0], weight, None, targets, of_lora, logit_map, weights), *learn)

    doubled = HeadLora(lora.a.double(), lora.b.double(), lora.scaling)
    exact = results(hidden.double(), weight.double(), doubled, linear_cross_entropy_plain)
    found = results(hidden, weight, lora, linear_cross_entropy)
    errors = [relative(one, other) for one, other in zip(found, exact, strict=True)]
    assert max(errors) < (1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_form_for_a_cpu_is_accurate_in_every_dtype(dtype: torch.dtype, with_lora: bool) -> None:
    errors = errors_of_loss_and_gradients(chunked, dtype, with_lora, PRODUCT)
    assert max(errors) < (1e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps)


class Counted(TorchDispatchMode):
    """Count dispatches, and the bytes that live at once in tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.live: Any = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if function.namespace == "aten":
            self.names.append(str(function))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.live[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_8b_step_on_a_gpu_takes_at_most_100_dispatches_and_one_chunk_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4,096 supervised rows of Llama 3.1 8B in bfloat16, on fake tensors; a chunk has at most 373 of them."""
    monkeypatch.setattr(cross_entropy, "fits_processor_cache", lambda _: False)
    with FakeTensorMode(), Counted() as counted:
        hidden = torch.empty(4096, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16)
        targets = torch.empty(4096, dtype=torch.int64)
        held, before = counted.peak, len(counted.names)
        linear_cross_entropy(hidden, weight, None, targets).backward()
    launches = [
        name for name in counted.names[before:] if not re.search(r"empty|promote_types|split|unsqueeze|aten\.t\.", name)
    ]
    assert len(launches) <= 100
    assert sum(name.startswith("aten.mm") for name in launches) == 2 * 11
    logits = 373 * 128256 * 4
    assert logits <= cross_entropy.CHUNK_BYTES
    assert counted.peak - held <= logits * 3 // 2 + hidden.nbytes + 1e6


@pytest.mark.parametrize(("weight_trains", "bias_trains"), [(True, None), (True, False), (False, True)])
def test_chunked_loss_refuses_a_head_that_trains(weight_trains: bool, bias_trains: bool | None) -> None:
    weight = torch.randn(9, 6, requires_grad=weight_trains)
    bias = None if bias_trains is None else torch.randn(9, requires_grad=bias_trains)
    with pytest.raises(ValueError, match="head"):
        linear_cross_entropy(torch.randn(2, 6), weight, bias, torch.tensor([1, 2]))


@pytest.mark.usefixtures("form")
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
            torch.autograd.grad(function(hidden, weight, None, targets, HeadLora(a, b, 0.5)), learn)
            for function in forms
        ]
        assert all(relative(found, expected) < 1e-13 for expected, found in zip(*results, strict=True))
