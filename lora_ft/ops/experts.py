"""The experts of a mixture with frozen weights as one function: one expert's weight at a time, in any storage format.

    y_t = sum over the chosen experts e of  score_te  (W2_e g(W1_e x_t + b1_e) + b2_e)         g: the module's gate

    transformers' grouped products      dequantize all experts of a parameter, and autograd keeps them, the outputs of
                                        the gate and the outputs of each expert until the backward
    here                                tokens are sorted by expert once; an expert with tokens is dequantized for its
                                        product and dropped, in the forward and again in the backward. Kept are x, the
                                        inputs of the gate, and codes. The outputs are not needed for the gradient of a
                                        score: it is <W2' dy, g> + <b2, dy>, and W2' dy is computed anyway.

    LoRA on experts    W_e + s B_e A_e, with A and B in float32 as well if x is in 16 bits: they are multiplied as
                       copies in the dtype of x, and their gradients are float32, as in ops/lora_linear.py

The sums are those of transformers' grouped products: each product is rounded to its dtype, then bias, gate, second
product and bias are, then an output is multiplied by its score in the wider of both dtypes, and the outputs of a token
are added in the order of its scores and rounded once. transformers' eager experts add them in the order of the experts
and round after each one.

Shapes: T tokens, k experts a token, E experts, I inputs, O outputs, r rank; x [T, I], index and scores [T, k].
An index of E or more names no expert, and adds nothing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.lora_linear import product
from lora_ft.ops.weights import FrozenWeight, expert_weight

Gate = Callable[[Tensor], Tensor]


class ExpertLora(NamedTuple):
    """The LoRA of one parameter of experts: A [E, r, I], B [E, O, r], and their copies in the dtype of computation."""

    a: Tensor
    b: Tensor
    scaling: float
    low_a: Tensor
    low_b: Tensor


class Projection(NamedTuple):
    """One parameter of experts: the frozen W [O, I] of an expert by its number, biases [E, O], and a LoRA."""

    weight: Callable[[int], FrozenWeight]
    bias: Tensor | None = None
    lora: ExpertLora | None = None


def expert_lora(a: Tensor, b: Tensor, scaling: float, num_experts: int, dtype: torch.dtype) -> ExpertLora:
    """Return the LoRA of PEFT's matrices for a parameter: a [E * r, I], rows by expert; b [O, r * E], columns by rank.

    `dtype` is that of x. Gradients flow to `a` and `b`.
    """
    low_a, low_b = compute_copy(a, dtype), compute_copy(b, dtype)
    return ExpertLora(
        _by_expert(a, num_experts), _by_rank(b, num_experts), scaling,
        _by_expert(low_a, num_experts), _by_rank(low_b, num_experts).contiguous(),
    )  # fmt: skip


def _by_expert(a: Tensor, num_experts: int) -> Tensor:
    return a.view(num_experts, -1, a.shape[1])


def _by_rank(b: Tensor, num_experts: int) -> Tensor:
    return b.view(len(b), -1, num_experts).permute(2, 0, 1)


def is_experts(module: nn.Module) -> bool:
    """Return True for a module of experts that `module_experts` computes: one of transformers' grouped products."""
    described: Any = module
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and not described.has_post_expert_norm


def parameter_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of the two weights of a module of experts, in the order of their products."""
    described: Any = module
    return ("gate_up_proj" if described.has_gate else "up_proj"), "down_proj"


def module_experts(
    module: nn.Module,
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    loras: Mapping[str, ExpertLora] = MappingProxyType({}),
    weight: Callable[[nn.Module, str, int], FrozenWeight] = expert_weight,
) -> Tensor:
    """Return what a module of experts returns for x, index and scores.

    `loras` are those of its parameters by name. `weight` returns the weight of an expert of a parameter.
    """
    described: Any = module
    first, second = (
        Projection(
            functools.partial(weight, module, name),
            getattr(module, f"{name}_bias").detach() if described.has_bias else None,
            loras.get(name),
        )
        for name in parameter_names(module)
    )
    gate = described._apply_gate if described.has_gate else described.act_fn
    return experts(x, index, scores, first, second, gate, described.num_experts)


def experts(
    x: Tensor, index: Tensor, scores: Tensor, first: Projection, second: Projection, gate: Gate, num_experts: int
) -> Tensor:
    """Return the weighted sum [T, O] of the outputs of each token's experts, in the dtype of x.

    Weights and biases are frozen; x, scores and the matrices of the LoRAs get gradients.
    """
    trained = [m for each in (first, second) for m in ((each.lora.a, each.lora.b) if each.lora else (None, None))]
    leaves = [each for each in (x, scores, *trained) if each is not None]
    keeps = torch.is_grad_enabled() and any(each.requires_grad for each in leaves)
    result: Tensor = _Experts.apply(x, scores, *trained, _Layer(first, second, gate, _order(index, num_experts), keeps))
    return result


class _Order(NamedTuple):
    """Choices sorted by expert: the position of each in index.view(-1), its row of x, and the count of each expert."""

    choice: Tensor
    token: Tensor
    counts: list[int]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, and its part of the sorted choices."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def _order(index: Tensor, num_experts: int) -> _Order:
    ordered, choice = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=index.device), right=True)
    on_host = ends.cpu().tolist()  # a GPU is waited for here, once a layer: the host chooses the weights
    if index.is_meta:  # no value tells: as if the experts had equal shares
        on_host = [index.numel() * (expert + 1) // num_experts for expert in range(num_experts)]
    return _Order(choice, choice // index.shape[-1], [end - start for start, end in pairwise([0, *on_host])])


class _Layer(NamedTuple):
    first: Projection
    second: Projection
    gate: Gate
    order: _Order
    keeps: bool  # what the backward needs


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, a1: Any, b1: Any, a2: Any, b2: Any, layer: _Layer) -> Tensor:
        first, second, order = layer.first, layer.second, layer.order
        weights, flat, weighted, inputs = scores.reshape(-1, 1), scores.numel(), None, None
        for expert, span in order.spans():
            before = _project(x.index_select(0, order.token[span]), first, expert)
            if layer.keeps and inputs is None:
                inputs = before.new_empty(sum(order.counts), before.shape[-1])
            if inputs is not None:
                inputs[span] = before
            y = _project(layer.gate(before), second, expert)
            choice = order.choice[span]
            y = y * weights.index_select(0, choice)
            if weighted is None:
                empty = y.new_zeros if sum(order.counts) < flat else y.new_empty
                weighted = empty((flat, y.shape[-1]))
            weighted.index_copy_(0, choice, y)
        ctx.layer = layer._replace(first=_without_lora(first), second=_without_lora(second))
        ctx.save_for_backward(x, scores, inputs, *_lows(first), *_lows(second))
        ctx.scalings = [each.lora.scaling if each.lora else 0.0 for each in (first, second)]
        ctx.trained = [None if each is None else (each.shape, each.stride(), each.dtype) for each in (a1, b1, a2, b2)]
        if weighted is None:  # no token chose an expert
            return torch.zeros_like(x)
        return weighted.view(*scores.shape, -1).sum(dim=1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, inputs, *lows = ctx.saved_tensors
        layer, order, (dy,) = ctx.layer, ctx.layer.order, grads
        loras = [
            None if low_a is None else ExpertLora(low_a, low_b, scaling, low_a, low_b)
            for low_a, low_b, scaling in zip(lows[::2], lows[1::2], ctx.scalings, strict=True)
        ]
        first, second = (p._replace(lora=lora) for p, lora in zip((layer.first, layer.second), loras, strict=True))
        weights, flat = scores.reshape(-1, 1), scores.numel()
        exact = torch.promote_types(x.dtype, torch.float32)
        da1, db1, da2, db2 = made = [None if like is None else _zeros(x, *like) for like in ctx.trained]
        dx = x.new_zeros(flat, x.shape[-1]) if ctx.needs_input_grad[0] else None
        dscores = weights.new_zeros(flat) if ctx.needs_input_grad[1] else None
        for expert, span in order.spans():
            token, choice = order.token[span], order.choice[span]
            before = inputs[span]
            with torch.enable_grad():
                leaf = before.detach().requires_grad_()
                after = layer.gate(leaf)
            out = dy.index_select(0, token).to(after.dtype)
            score = weights.index_select(0, choice)
            h, through, dh = after.detach(), *_project_back(out, second, expert)
            if dscores is not None:
                along = (dh.to(exact) * h.to(exact)).sum(dim=-1)
                if second.bias is not None:
                    along += out.to(exact) @ second.bias[expert].to(exact)
                dscores.index_copy_(0, choice, along.to(dscores.dtype))
            if through is not None:
                scaled = (out * score).to(out.dtype)
                _add_lora_gradient(da2, db2, expert, second, scaled, (through * score).to(through.dtype), h)
            (dbefore,) = torch.autograd.grad(after, leaf, (dh * score).to(after.dtype))
            if dx is None and first.lora is None:
                continue
            through, din = _project_back(dbefore, first, expert, wanted=dx is not None)
            if through is not None:
                _add_lora_gradient(da1, db1, expert, first, dbefore, through, x.index_select(0, token))
            if dx is not None:
                dx.index_copy_(0, choice, din.to(dx.dtype))
        if dx is not None:
            dx = dx.view(*scores.shape, -1).sum(dim=1)
        return dx, None if dscores is None else dscores.view(scores.shape), *made, None


def _without_lora(projection: Projection) -> Projection:
    return projection._replace(lora=None)


def _lows(projection: Projection) -> tuple[Tensor | None, Tensor | None]:
    return (projection.lora.low_a, projection.lora.low_b) if projection.lora else (None, None)


def _zeros(like: Tensor, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=like.device).zero_()


def _project(rows: Tensor, projection: Projection, expert: int) -> Tensor:
    """Return W x + b + s B (A x) of an expert."""
    w = projection.weight(expert)()
    rows = rows.to(w.dtype)
    y = linear(rows, w)
    if lora := projection.lora:
        y.addmm_(rows @ lora.low_a[expert].T, lora.low_b[expert].T, alpha=lora.scaling)
    if projection.bias is not None:
        y += projection.bias[expert].to(y.dtype)
    return y


def _project_back(dy: Tensor, projection: Projection, expert: int, wanted: bool = True) -> tuple[Any, Any]:
    """Return s B' dy, None without a LoRA, and the gradient of the input, W' dy + A' (s B' dy), None if not wanted."""
    lora = projection.lora
    through = None if lora is None else dy @ lora.low_b[expert] * lora.scaling
    if not wanted:
        return through, None
    dx = dy @ projection.weight(expert)()
    return through, dx if lora is None else dx.addmm_(through, lora.low_a[expert])


def _add_lora_gradient(
    da: Any, db: Any, expert: int, projection: Projection, dy: Tensor, through: Tensor, rows: Tensor
) -> None:
    """Write the gradients of an expert's A and B, in their dtype."""
    lora = projection.lora
    assert lora is not None
    da[expert] = product(through.T, rows, da.dtype)
    db[expert] = product(dy.T, rows @ lora.low_a[expert].T * lora.scaling, db.dtype)
