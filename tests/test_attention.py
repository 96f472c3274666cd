"""Packed attention: every kernel that runs on a CPU gives the values and gradients of the definition in float64."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_ft import config
from lora_ft.models.acceleration import accelerate, plain_attention
from lora_ft.ops import attention
from lora_ft.ops import device as device_module
from lora_ft.ops.batch import Batch
from lora_ft.ops.tiled_attention import TILE_ROWS, Tile, tiled_attention, tiles, worth_it
from lora_ft.ops.token_loss import token_loss_sum

LONG = (2 * TILE_ROWS + 5, 1, TILE_ROWS, 3, TILE_ROWS + 1)


def starts_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def tensors(num_tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key and value [1, heads, T, 8] in the layout of a projection, and a gradient [1, T, H, 8]."""
    generator = torch.Generator().manual_seed(num_tokens)
    made = [torch.randn(1, num_tokens, h, 8, generator=generator, dtype=dtype) for h in (heads, key_heads, key_heads)]
    gradient = torch.randn(1, num_tokens, heads, 8, generator=generator, dtype=dtype)
    return [*(tensor.transpose(1, 2).requires_grad_() for tensor in made), gradient]


def definition(query: Tensor, key: Tensor, value: Tensor, starts: Any, window: int | None, scale: float) -> Tensor:
    """Compute softmax with a dense mask over all tokens, key heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    position = torch.arange(starts[-1])
    document = torch.searchsorted(torch.tensor(starts), position, right=True)
    distance = position[:, None] - position
    seen = (distance >= 0) & (document[:, None] == document)
    if window is not None:
        seen &= distance < window
    scores = (query @ key.mT * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradients(function: Any, made: list[Tensor], *arguments: Any) -> list[Tensor]:
    out = function(*made[:3], *arguments)
    return [out.detach(), *torch.autograd.grad(out, made[:3], made[3])]


@pytest.mark.parametrize("window", [None, 1, 7, TILE_ROWS + 3])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 2), LONG])
@pytest.mark.parametrize("form", [tiled_attention, attention.per_document])
def test_every_kernel_equals_the_definition(
    form: Any, lengths: tuple[int, ...], heads: int, key_heads: int, window: int | None
) -> None:
    starts = starts_of(lengths)
    made = tensors(starts[-1], heads, key_heads)
    found = with_gradients(form, made, starts, window, 0.3)
    for ours, exact in zip(found, with_gradients(definition, made, starts, window, 0.3), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_tiles_in_fp32_are_as_accurate_as_torchs_kernel() -> None:
    starts = starts_of(LONG)
    exact = tensors(starts[-1], 6, 2)
    rounded = [tensor.detach().float().requires_grad_() for tensor in exact]
    expected = with_gradients(definition, exact, starts, None, 0.3)

    def errors(form: Any) -> list[float]:
        found = with_gradients(form, rounded, starts, None, 0.3)
        return [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]

    for tiled, torchs in zip(errors(tiled_attention), errors(attention.per_document), strict=True):
        assert 0 < tiled < max(2 * torchs, 5e-7)


def test_tiles_give_the_same_bits_under_checkpointing() -> None:
    starts = starts_of(LONG)
    made = tensors(starts[-1], 6, 2, torch.float32)

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(tiled_attention, q, k, v, starts, None, 0.3, use_reentrant=False)

    kept = with_gradients(tiled_attention, made, starts, None, 0.3)
    assert all(map(torch.equal, kept, with_gradients(again, made)))


def seen_by(plan: list[Tile], num_tokens: int) -> Tensor:
    """Count how often tiles let each row see each key."""
    counts = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for tile in plan:
        free = torch.ones(tile.end - tile.start, tile.end - tile.first_key, dtype=torch.int64)
        free[:, -tile.mask.shape[1] :] = (tile.mask == 0).long()
        counts[tile.start : tile.end, tile.first_key : tile.end] += free
    return counts


@pytest.mark.parametrize("window", [None, 5, 100])
def test_tiles_cover_every_visible_key_once_and_no_other(window: int | None) -> None:
    starts = starts_of(LONG)
    expected = torch.zeros(starts[-1], starts[-1], dtype=torch.int64)
    for a, b in pairwise(starts):
        expected[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.int64).tril()
    if window is not None:
        expected = expected.triu(1 - window)
    plan = tiles(starts, window, torch.float32)
    assert torch.equal(seen_by(plan, starts[-1]), expected)
    assert max(tile.end - tile.start for tile in plan) <= TILE_ROWS


def test_tiles_are_used_only_for_documents_for_which_they_are_faster() -> None:
    assert worth_it(starts_of((180, 300, 90)), None)
    assert not worth_it(starts_of((16,) * 8), None)
    assert not worth_it(starts_of((200, 2048)), None)
    assert worth_it(starts_of((200, 2048)), 512)


@pytest.mark.parametrize("lengths", [LONG, (16, 16), (1100,)])
@pytest.mark.parametrize("window", [None, 40])
def test_packed_causal_attention_equals_the_definition(lengths: tuple[int, ...], window: int | None) -> None:
    starts = starts_of(lengths)
    made = tensors(starts[-1], 2, 1)

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.packed_causal_attention(
            torch.nn.Identity(), q, k, v, None, document_starts=list(starts), sliding_window=window
        )[0]

    found = with_gradients(called, made)
    for ours, exact in zip(found, with_gradients(definition, made, starts, window, 8**-0.5), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_with_tiles_has_the_loss_and_gradients_of_a_dense_mask(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    starts = list(starts_of((80, 100)))
    assert worth_it(tuple(starts), None)
    ids = torch.randint(4, VOCABULARY, (180,), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.cat([torch.arange(80), torch.arange(100)]), ids.roll(-1), starts)
    results = []
    for fast in (config.Fast(), config.Fast(attention=False)):
        loss = token_loss_sum(model, batch, accelerate(model, fast).paths)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for tiled, dense in zip(*results, strict=True):
        assert float((tiled - dense).norm() / dense.norm()) < 1e-11


def test_attention_dropout_keeps_the_mean() -> None:
    query, key, value, _ = tensors(150, 2, 1)
    torch.manual_seed(0)
    outs = [
        attention.packed_causal_attention(
            torch.nn.Identity(), query, key, value.abs(), None, document_starts=[0, 70, 150], dropout=dropout
        )[0].detach()
        for dropout in (0.0, 0.5)
    ]
    assert not torch.allclose(outs[0], outs[1])
    assert float(outs[1].mean() / outs[0].mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["position_bias", "block_table"])
def test_attention_refuses_arguments_that_it_would_ignore(name: str) -> None:
    made = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=name):
        attention.packed_causal_attention(torch.nn.Identity(), *made, None, document_starts=[0, 3], **{name: 1.0})


@pytest.mark.closes("A10")
def test_packed_model_refuses_a_call_without_boundaries() -> None:
    """Generation with a key cache and no mask would be silently wrong, so it uses plain_attention."""
    model = tiny_model("llama")
    accelerate(model, config.Fast())
    with pytest.raises(ValueError, match="document_starts"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with plain_attention(model):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="document_starts"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def pretend(monkeypatch: pytest.MonkeyPatch, capability: Any, has_flash: bool) -> None:
    """Let cuda be a GPU of this compute capability, with or without torch's flash attention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    monkeypatch.setattr(device_module, "_target_of", device_module._target_of.__wrapped__)  # it caches its answers


@pytest.mark.parametrize(
    "device, dtype, width, capability, built, name, reason",
    [
        ("cpu", torch.float32, 64, None, False, "tiled", "float32 on a CPU"),
        ("cpu", torch.bfloat16, 64, None, False, "per_document", "round scores"),
        ("mps", torch.float16, 64, None, False, "per_document", "mps"),
        ("cuda", torch.float32, 64, (9, 0), True, "per_document", "16 bits only"),
        ("cuda", torch.float16, 64, (7, 5), True, "per_document", "8.0"),
        ("cuda", torch.bfloat16, 512, (9, 0), True, "per_document", "512"),
        ("cuda", torch.bfloat16, 12, (9, 0), True, "per_document", "12"),
        ("cuda", torch.bfloat16, 128, (8, 6), True, "varlen", "boundaries"),
        ("cuda", torch.float16, 128, (8, 0), False, "per_document", "without flash attention"),
    ],
)
def test_kernel_is_chosen_by_device_dtype_and_head_width(
    device: str, dtype: torch.dtype, width: int, capability: Any, built: bool, name: str, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretend(monkeypatch, capability, built)
    kernel = attention.choose_kernel(torch.device(device), dtype, width)
    assert kernel.name == name
    assert reason in kernel.reason


@pytest.mark.parametrize("window", [None, 7])
def test_varlen_passes_correct_arguments_to_flash_attention(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A substitute for the GPU kernel computes the definition from the arguments."""
    starts = starts_of((9, 20, 3))
    made = tensors(starts[-1], 4, 2)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        assert cu_q.dtype is cu_k.dtype is torch.int32 and cu_q.tolist() == cu_k.tolist() == list(starts)
        assert max_q == max_k == 20 and enable_gqa
        left, right = window_size
        assert right == 0
        heads = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        # Flash attention does not count the row itself as part of the window.
        return definition(*heads, starts, None if left == -1 else left + 1, scale)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    found = with_gradients(attention.varlen, made, starts, window, 0.3)
    for ours, exact in zip(found, with_gradients(definition, made, starts, window, 0.3), strict=True):
        torch.testing.assert_close(ours, exact)


def test_flash_attention_gets_values_as_wide_as_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention (DeepSeek) has narrower values, which get columns of zeros."""
    starts = starts_of((9, 20, 3))
    query, key, value, gradient = tensors(starts[-1], 4, 2)
    made = [query, key, value[..., :6].detach().requires_grad_(), gradient[..., :6]]
    kernel = attention.Kernel("varlen", "a substitute")
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: kernel)
    widths: list[int] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None, scale: float) -> Tensor:
        widths.append(v.shape[-1])
        return definition(q, k, v, starts, window, scale)

    monkeypatch.setattr(attention, "varlen", varlen)

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.packed_causal_attention(torch.nn.Identity(), q, k, v, None, document_starts=list(starts))[0]

    found = with_gradients(called, made)
    for ours, exact in zip(found, with_gradients(definition, made, starts, None, 8**-0.5), strict=True):
        torch.testing.assert_close(ours, exact)
    assert widths == [8]


def test_torchs_varlen_accepts_the_arguments_and_returns_the_expected_shapes() -> None:
    """Fake tensors need no GPU: the real operator checks its arguments, and has a backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = [torch.randn(1, 32, h, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]
        out = attention.varlen(*made, attention.DocumentStarts([0, 9, 32]), 7, 0.3)
        gradients = torch.autograd.grad(out.sum(), made)
    assert out.shape == (1, 32, 4, 8) and out.dtype is torch.bfloat16
    assert [g.shape for g in gradients] == [m.shape for m in made]


def test_varlen_expands_keys_for_a_torch_whose_kernel_takes_no_grouped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """`enable_gqa` is newer than torch 2.11."""
    starts = starts_of((9, 20, 3))
    made = tensors(starts[-1], 4, 2)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):  # type: ignore[no-untyped-def]
        assert q.shape == k.shape == v.shape
        heads = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        return definition(*heads, starts, None, scale)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    found = with_gradients(attention.varlen, made, starts, None, 0.3)
    for ours, exact in zip(found, with_gradients(definition, made, starts, None, 0.3), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    "device, dtype, width, capability, window, value_width, grouped",
    [
        ("cuda", torch.float32, 64, (9, 0), None, 64, False),
        ("cuda", torch.float16, 64, (7, 5), None, 64, False),
        ("cuda", torch.bfloat16, 12, (9, 0), None, 12, False),
        ("cuda", torch.bfloat16, 512, (9, 0), None, 512, False),
        ("cuda", torch.bfloat16, 64, (9, 0), None, 64, True),
        ("cuda", torch.bfloat16, 64, (9, 0), None, 32, False),  # flash attention needs values as wide as the keys
        ("cuda", torch.bfloat16, 64, (9, 0), 7, 64, False),  # and takes no mask
        ("cuda", torch.bfloat16, 64, (9, 0), 40, 64, True),  # wider than every document: no mask
        ("cpu", torch.bfloat16, 64, None, None, 64, True),
    ],
)
def test_torchs_kernel_gets_grouped_keys_only_where_flash_attention_runs(
    device: str, dtype: torch.dtype, width: int, capability: Any, window: int | None, value_width: int, grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Everywhere else on a GPU they make torch keep all scores [H, T, T] (pytorch issue 181528)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls: list[Any] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        assert options["is_causal"] is (options["attn_mask"] is None)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    pretend(monkeypatch, capability, has_flash=True)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention, "visible", lambda *a: torch.ones(a[1] - a[0], a[1] - a[2], dtype=torch.bool))
    with FakeTensorMode():
        query, key = (torch.empty(1, h, 32, width, dtype=dtype, device=device) for h in (6, 2))
        value = torch.empty(1, 2, 32, value_width, dtype=dtype, device=device)
        out = attention.per_document(query, key, value, (0, 9, 32), window, 0.3)
    assert out.shape == (1, 32, 6, value_width)
    assert calls == [(6, 2, 2, True) if grouped else (6, 6, 6, False)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_expanded_keys_give_the_values_and_gradients_of_grouped_ones(dtype: torch.dtype, window: int | None) -> None:
    starts = starts_of((9, 20, 3))
    exact = tensors(starts[-1], 6, 2)
    made = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]

    def expanded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.per_document(query, *attention.expanded(query, key, value), starts, window, 0.3)

    grouped = with_gradients(attention.per_document, made, starts, window, 0.3)
    true = with_gradients(definition, exact, starts, window, 0.3)
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for found, same, expected in zip(with_gradients(expanded, made), grouped, true, strict=True):
        assert found.dtype is dtype and found.shape == expected.shape
        assert (found.double() - expected).norm() <= bound * expected.norm()
        assert (found - same).norm() <= bound * expected.norm()
