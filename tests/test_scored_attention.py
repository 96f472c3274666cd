"""Soft-capped scores and sinks: blocks of rows, and flash attention with sinks, give the values of the definition."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # registers the operators
from test_attention import starts_of, tensors
from torch import Tensor

from lora_ft.ops import attention
from lora_ft.ops.device import Target
from lora_ft.ops.scored_attention import Scoring, flash_with_sinks, scored_attention, scored_attention_plain

LENGTHS = (150, 1, 64, 70)
CAP = 1.5  # of scores that go up to about 3


def sinks_of(heads: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 3, heads, dtype=dtype).requires_grad_()


def with_gradients(form: Any, made: list[Tensor], sinks: Tensor | None, how: Scoring) -> list[Tensor]:
    """Return the output, and the gradients of query, key, value and sinks."""
    out = form(*made[:3], sinks, how)
    leaves = [*made[:3], *([] if sinks is None else [sinks])]
    return [out.detach(), *torch.autograd.grad(out, leaves, made[3])]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("cap", "has_sinks"), [(CAP, False), (None, True), (CAP, True)])
def test_blocks_equal_the_definition(
    heads: int, key_heads: int, window: int | None, cap: float | None, has_sinks: bool
) -> None:
    starts = starts_of(LENGTHS)
    made, sinks = tensors(starts[-1], heads, key_heads), sinks_of(heads) if has_sinks else None
    how = Scoring(starts, window, 0.5, cap)
    found = with_gradients(scored_attention, made, sinks, how)
    for ours, exact in zip(found, with_gradients(scored_attention_plain, made, sinks, how), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_definition_is_softmax_with_a_column_for_the_sink() -> None:
    """Three tokens, written out; so the comparisons with the definition mean something."""
    made = tensors(3, 1, 1)
    (q,), (k,), (v,) = (tensor[0].double() for tensor in made[:3])
    rows = []
    for row in range(3):
        scores = CAP * torch.tanh(0.5 * (k[: row + 1] @ q[row]) / CAP)
        weights = scores.exp() / (scores.exp().sum() + math.exp(0.7))
        rows.append(weights @ v[: row + 1])
    sink = torch.tensor([0.7], dtype=torch.float64)
    found = scored_attention_plain(*made[:3], sink, Scoring((0, 3), None, 0.5, CAP))
    torch.testing.assert_close(found[0, :, 0], torch.stack(rows))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.01), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("cap", "has_sinks"), [(CAP, False), (None, True)])
def test_blocks_are_exact_up_to_the_rounding_of_the_dtype(
    dtype: torch.dtype, bound: float, cap: float | None, has_sinks: bool
) -> None:
    starts, how = starts_of(LENGTHS), Scoring(starts_of(LENGTHS), 90, 0.5, cap)
    rounded = [t.detach().to(dtype).requires_grad_() for t in tensors(starts[-1], 6, 2)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    sinks = sinks_of(6) if has_sinks else None
    found = with_gradients(scored_attention, rounded, None if sinks is None else sinks_of(6, dtype), how)
    assert found[0].dtype is found[1].dtype is dtype
    for ours, expected in zip(found, with_gradients(scored_attention_plain, exact, sinks, how), strict=True):
        assert relative(ours, expected) < bound


class Flash:
    """The formulas of flash attention over boundaries, with a dense mask in place of tiles."""

    def __init__(self, starts: tuple[int, ...]) -> None:
        self.starts = starts

    def scores(self, q: Tensor, k: Tensor, scale: float, window: list[int]) -> Tensor:
        heads, keys = q.transpose(0, 1), k.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = torch.zeros(distance.shape, dtype=torch.bool)
        for start, end in pairwise(self.starts):
            seen[start:end, start:end] = True
        seen &= (distance >= -window[1]) & ((distance <= window[0]) | (window[0] < 0))
        return (heads @ keys.mT * scale).masked_fill(~seen, -math.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, longest, _, causal, scale, window, grouped = rest
        assert starts.tolist() == list(self.starts) and starts.dtype is torch.int32
        assert longest == 150 and causal is (window[0] == -1) and grouped
        scores = self.scores(q, k, scale, window)
        values = v.transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], 0)
        return (scores.softmax(-1) @ values).transpose(0, 1), scores.logsumexp(-1), torch.zeros(2)

    def backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        scale, window = rest[-2:]
        groups = k.shape[1]
        weights = (self.scores(q, k, scale, window) - lse[..., None]).exp()
        values = v.transpose(0, 1).repeat_interleave(q.shape[1] // groups, 0)
        keys = k.transpose(0, 1).repeat_interleave(q.shape[1] // groups, 0)
        rows = d_out.transpose(0, 1)
        d_scores = weights * (rows @ values.mT - (d_out * out).sum(-1).T[..., None]) * scale
        d_v, d_k = weights.mT @ rows, d_scores.mT @ q.transpose(0, 1)
        shared = (each.unflatten(0, (groups, -1)).sum(1).transpose(0, 1) for each in (d_k, d_v))
        return ((d_scores @ keys).transpose(0, 1), *shared)


@pytest.mark.parametrize("window", [None, 7])
def test_flash_attention_with_sinks_equals_the_definition(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: flash attention's own formulas stand in for its kernels."""
    starts = starts_of(LENGTHS)
    how, flash = Scoring(starts, window, 0.5, None), Flash(starts)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", flash.forward, raising=False)
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", flash.backward, raising=False)
    made, sinks = tensors(starts[-1], 6, 2), sinks_of(6)
    boundaries = torch.tensor(starts, dtype=torch.int32)

    def called(q: Tensor, k: Tensor, v: Tensor, s: Tensor, how: Scoring) -> Tensor:
        return flash_with_sinks(q, k, v, s, boundaries, 150, how)

    found = with_gradients(called, made, sinks, how)
    for ours, exact in zip(found, with_gradients(scored_attention_plain, made, sinks, how), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)  # the sinks' part is in float32


def test_torchs_operators_accept_the_arguments_of_flash_attention_with_sinks() -> None:
    """Fake tensors need no GPU: the real operators check their arguments."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = [torch.randn(1, 32, h, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]
        sinks = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
        boundaries = torch.zeros(3, dtype=torch.int32)
        out = flash_with_sinks(*made, sinks, boundaries, 23, Scoring((0, 9, 32), 7, 0.3, None))
        gradients = torch.autograd.grad(out.sum(), [*made, sinks])
    assert out.shape == (1, 32, 4, 8) and out.dtype is torch.bfloat16
    assert [g.shape for g in gradients] == [m.shape for m in (*made, sinks)]


@pytest.mark.parametrize(
    ("kind", "cap", "has_sinks", "value_width", "name"),
    [
        ("cuda", 2.0, False, 64, "blocks"),
        ("cuda", 2.0, True, 64, "blocks"),
        ("cuda", None, True, 64, "varlen"),
        ("cuda", None, True, 32, "blocks"),
        ("cpu", None, True, 64, "blocks"),
    ],
)
def test_sinks_take_flash_attention_where_it_is_exact(
    kind: str, cap: float | None, has_sinks: bool, value_width: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(kind, (9, 0), True) if kind == "cuda" else Target("cpu", None, False)
    monkeypatch.setattr(attention, "target", lambda _: target)
    chosen: list[str] = []
    for form in ("scored_attention", "flash_with_sinks"):
        monkeypatch.setattr(attention, form, lambda *_, form=form: chosen.append(form))
    made = [torch.empty(1, h, 32, w, dtype=torch.bfloat16) for h, w in ((6, 64), (2, 64), (2, value_width))]
    with attention.recorded_calls() as calls:
        attention.packed_causal_attention(
            torch.nn.Identity(), *made, None, document_starts=[0, 9, 32], softcap=cap,
            s_aux=torch.zeros(6) if has_sinks else None,
        )  # fmt: skip
    assert [call.kernel.name for call in calls] == [name]
    assert chosen == ["flash_with_sinks" if name == "varlen" else "scored_attention"]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_dropout_with_scored_attention_is_refused(name: str) -> None:
    made = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    value = 1.0 if name == "softcap" else torch.zeros(2)
    with pytest.raises(attention.Unsupported, match="dropout"):
        attention.packed_causal_attention(
            torch.nn.Identity(), *made, None, dropout=0.1, document_starts=[0, 3], **{name: value}
        )
