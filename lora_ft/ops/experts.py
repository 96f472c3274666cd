"""The experts of a mixture with frozen weights as one function: one expert's weight at a time, in any storage format.

    y_t = sum over the chosen experts e of  score_te  (W2_e g(W1_e x_t + b1_e) + b2_e)         g: the module's gate

    transformers' grouped products      dequantize all experts of a parameter, and autograd keeps them, the outputs of
                                        the gate and the outputs of each expert until the backward
    here                                tokens are sorted by expert once; an expert with tokens is dequantized for its
                                        product and dropped, in the forward and again in the backward. Kept are x, the
                                        inputs of the gate, and codes. The outputs are not needed for the gradient of a
                                        score: it is <W2' dy, g> + <b2, dy>, and W2' dy is computed anyway.
    groups of experts                   of 128 MiB, on GPUs with a kernel for grouped products (bfloat16, from compute
                                        capability 8.0): launches for 128 experts would take longer than the products.
                                        Weights that are not quantized need no buffer: all experts are one group

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
from torch.nn.functional import grouped_mm

from lora_ft.ops import expert_codes
from lora_ft.ops.compute_copies import compute_copy
from lora_ft.ops.device import target
from lora_ft.ops.lora_linear import product
from lora_ft.ops.weights import expert_weights

Gate = Callable[[Tensor], Tensor]

_GROUP_BYTES = 128 << 20  # of the weights of a group


class ExpertLora(NamedTuple):
    """The LoRA of one parameter of experts: A [E, r, I], B [E, O, r], and their copies in the dtype of computation."""

    a: Tensor
    b: Tensor
    scaling: float
    low_a: Tensor
    low_b: Tensor


class Projection(NamedTuple):
    """One parameter of experts: weights(start, stop) returns the frozen [.., O, I] of some; biases [E, O], a LoRA."""

    weights: Callable[[int, int], Tensor]
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
    weights: Callable[[nn.Module, str, int, int], Tensor] = expert_weights,
) -> Tensor:
    """Return what a module of experts returns for x, index and scores.

    `loras` are those of its parameters by name. `weights` returns the weights of some experts of a parameter.
    """
    described: Any = module
    first, second = (
        Projection(
            functools.partial(weights, module, name),
            getattr(module, f"{name}_bias").detach() if described.has_bias else None,
            loras.get(name),
        )
        for name in parameter_names(module)
    )
    gate = described._apply_gate if described.has_gate else described.act_fn
    return experts(x, index, scores, first, second, gate, described.num_experts, _group_of(module, x))


def _group_of(module: Any, x: Tensor) -> int:
    """Return how many experts of a module are computed together."""
    device, parameters = target(x.device), [module._parameters[name] for name in parameter_names(module)]
    is_cpu, is_quantized = device.kind == "cpu", any(map(expert_codes.is_quantized, parameters))
    has_kernel = device.kind == "cuda" and device.capability >= (8, 0) and x.dtype is torch.bfloat16
    if not (has_kernel or (is_cpu and not is_quantized and x.dtype is not torch.float64)):
        return 1
    sizes = [x.itemsize * expert_codes.shape_of(each)[1:].numel() for each in parameters]
    return max(1, _GROUP_BYTES // max(sizes)) if is_quantized else int(module.num_experts)


def experts(
    x: Tensor,
    index: Tensor,
    scores: Tensor,
    first: Projection,
    second: Projection,
    gate: Gate,
    num_experts: int,
    group: int = 1,
) -> Tensor:
    """Return the weighted sum [T, O] of the outputs of each token's experts, in the dtype of x.

    Weights and biases are frozen; x, scores and the matrices of the LoRAs get gradients. The weights of `group` experts
    exist at a time.
    """
    trained = [m for each in (first, second) for m in ((each.lora.a, each.lora.b) if each.lora else (None, None))]
    leaves = [each for each in (x, scores, *trained) if each is not None]
    keeps = torch.is_grad_enabled() and any(each.requires_grad for each in leaves)
    layer = _Layer(first, second, gate, _order(index, num_experts), group, keeps)
    result: Tensor = _Experts.apply(x, scores, *trained, layer)
    return result


class _Group(NamedTuple):
    """Experts from `start` to `stop`: their span of the sorted choices, and the part of each expert within the span."""

    start: int
    stop: int
    span: slice
    parts: list[tuple[int, slice]]


class _Order(NamedTuple):
    """Choices sorted by expert: the expert of each, its position in index.view(-1), its row of x; ends: of experts."""

    expert: Tensor
    choice: Tensor
    token: Tensor
    ends: Tensor
    on_host: list[int]

    def groups(self, size: int) -> Iterator[_Group]:
        """Yield the experts in groups of `size`, except for groups without tokens."""
        edges = [0, *self.on_host]
        for start in range(0, len(self.on_host), size):
            stop = min(start + size, len(self.on_host))
            first, last = edges[start], edges[stop]
            if first < last:
                inside = enumerate(pairwise(edges[start : stop + 1]), start)
                parts = [(expert, slice(a - first, b - first)) for expert, (a, b) in inside if a < b]
                yield _Group(start, stop, slice(first, last), parts)


def _order(index: Tensor, num_experts: int) -> _Order:
    ordered, choice = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=index.device), right=True)
    on_host = ends.cpu().tolist()  # a GPU is waited for here, once a layer: the host chooses the weights
    if index.is_meta:  # no value tells: as if the experts had equal shares
        on_host = [index.numel() * (expert + 1) // num_experts for expert in range(num_experts)]
    return _Order(ordered, choice, choice // index.shape[-1], ends, on_host)


class _Layer(NamedTuple):
    first: Projection
    second: Projection
    gate: Gate
    order: _Order
    group: int
    keeps: bool  # what the backward needs


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, a1: Any, b1: Any, a2: Any, b2: Any, layer: _Layer) -> Tensor:
        first, second, order = layer.first, layer.second, layer.order
        count, by_choice, weighted, inputs = order.on_host[-1], scores.reshape(-1, 1), None, None
        for group in order.groups(layer.group):
            before = _project(x.index_select(0, order.token[group.span]), first, order, group)
            if layer.keeps and inputs is None:
                inputs = before.new_empty(count, before.shape[-1])
            if inputs is not None:
                inputs[group.span] = before
            y = _project(layer.gate(before), second, order, group)
            choice = order.choice[group.span]
            score = by_choice.index_select(0, choice)
            y = y.mul_(score) if y.dtype == score.dtype else y * score
            if weighted is None:
                empty = y.new_zeros if count < len(by_choice) else y.new_empty
                weighted = empty((len(by_choice), y.shape[-1]))
            weighted.index_copy_(0, choice, y)
        ctx.layer = layer._replace(first=first._replace(lora=None), second=second._replace(lora=None))
        ctx.save_for_backward(x, scores, inputs, *_lows(first), *_lows(second))
        ctx.scalings = [each.lora.scaling if each.lora else 0.0 for each in (first, second)]
        ctx.trained = [None if each is None else (each.shape, each.dtype) for each in (a1, b1, a2, b2)]
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
        by_choice, exact = scores.reshape(-1, 1), torch.promote_types(x.dtype, torch.float32)
        da1, db1, da2, db2 = made = [
            None if like is None else x.new_zeros(like[0], dtype=like[1]) for like in ctx.trained
        ]
        dx = x.new_zeros(len(by_choice), x.shape[-1]) if ctx.needs_input_grad[0] else None
        dscores = by_choice.new_zeros(len(by_choice)) if ctx.needs_input_grad[1] else None
        for group in order.groups(layer.group):
            token, choice = order.token[group.span], order.choice[group.span]
            with torch.enable_grad():
                leaf = inputs[group.span].detach().requires_grad_()
                after = layer.gate(leaf)
            out, score, h = dy.index_select(0, token).to(after.dtype), by_choice.index_select(0, choice), after.detach()
            through, dh = _project_back(out, second, order, group)
            if dscores is not None:
                along = (dh.to(exact) * h.to(exact)).sum(dim=-1)
                if second.bias is not None:
                    along += (out.to(exact) * _biases(second, order, group).to(exact)).sum(dim=-1)
                dscores.index_copy_(0, choice, along.to(dscores.dtype))
            if through is not None:
                scaled = (out * score).to(out.dtype)
                _lora_gradient(da2, db2, second, order, group, scaled, (through * score).to(through.dtype), h)
            (dbefore,) = torch.autograd.grad(after, leaf, (dh * score).to(after.dtype))
            if dx is None and first.lora is None:
                continue
            through, din = _project_back(dbefore, first, order, group, wanted=dx is not None)
            if through is not None:
                _lora_gradient(da1, db1, first, order, group, dbefore, through, x.index_select(0, token))
            if dx is not None:
                dx.index_copy_(0, choice, din.to(dx.dtype))
        if dx is not None:
            dx = dx.view(*scores.shape, -1).sum(dim=1)
        return dx, None if dscores is None else dscores.view(scores.shape), *made, None


def _lows(projection: Projection) -> tuple[Tensor | None, Tensor | None]:
    return (projection.lora.low_a, projection.lora.low_b) if projection.lora else (None, None)


def _project(rows: Tensor, projection: Projection, order: _Order, group: _Group) -> Tensor:
    """Return W x + b + s B (A x) of the experts of a group."""
    w = projection.weights(group.start, group.stop)
    rows = rows.to(w.dtype)
    y = _product(rows, w.mT, order, group)
    if lora := projection.lora:
        through = _product(rows, lora.low_a[group.start : group.stop].mT, order, group)
        _add_product(y, through, lora.low_b[group.start : group.stop].mT, lora.scaling, order, group)
    if projection.bias is not None:
        y += _biases(projection, order, group).to(y.dtype)
    return y


def _project_back(
    dy: Tensor, projection: Projection, order: _Order, group: _Group, wanted: bool = True
) -> tuple[Any, Any]:
    """Return s B' dy, None without a LoRA, and the gradient of the input, W' dy + A' (s B' dy), None if not wanted."""
    lora, through, dx = projection.lora, None, None
    if lora is not None:
        through = _product(dy, lora.low_b[group.start : group.stop], order, group) * lora.scaling
    if wanted:
        dx = _product(dy, projection.weights(group.start, group.stop), order, group)
        if lora is not None and through is not None:
            _add_product(dx, through, lora.low_a[group.start : group.stop], 1.0, order, group)
    return through, dx


def _lora_gradient(
    da: Any, db: Any, projection: Projection, order: _Order, group: _Group, dy: Tensor, through: Tensor, rows: Tensor
) -> None:
    """Write the gradients of A and B of the experts of a group, in their dtype."""
    lora = projection.lora
    assert lora is not None
    through_a = _product(rows, lora.low_a[group.start : group.stop].mT, order, group) * lora.scaling
    for expert, part in group.parts:
        da[expert] = product(through[part].T, rows[part], da.dtype)
        db[expert] = product(dy[part].T, through_a[part], db.dtype)


def _product(rows: Tensor, matrices: Tensor, order: _Order, group: _Group) -> Tensor:
    """Return rows @ matrix, for each row that of its expert; `matrices` are those of the group."""
    if len(matrices) == 1:
        return rows @ matrices[0]
    if _is_aligned(rows) and _is_aligned(matrices):
        return grouped_mm(rows, matrices, offs=_ends(order, group))
    return torch.cat([rows[part] @ matrices[expert - group.start] for expert, part in group.parts])


def _add_product(y: Tensor, rows: Tensor, matrices: Tensor, scaling: float, order: _Order, group: _Group) -> None:
    """Add s rows @ matrix to y, for each row that of its expert."""
    if len(matrices) == 1:
        y.addmm_(rows, matrices[0], alpha=scaling)
    else:
        y.add_(_product(rows, matrices, order, group), alpha=scaling)


def _is_aligned(matrix: Tensor) -> bool:
    """Return True if grouped products take a matrix: contiguous along one dimension, and they read 16 bytes at a time.

    A matrix of rank 1 has the stride 1 twice.
    """
    strides = list(matrix.stride())
    if 1 not in strides:
        return False
    strides.remove(1)
    return all(stride * matrix.itemsize % 16 == 0 for stride in strides)


def _ends(order: _Order, group: _Group) -> Tensor:
    return (order.ends[group.start : group.stop] - group.span.start).to(torch.int32)


def _biases(projection: Projection, order: _Order, group: _Group) -> Tensor:
    """Return the biases of the experts of a group, a row for each choice or one for all."""
    assert projection.bias is not None
    if group.stop == group.start + 1:
        return projection.bias[group.start : group.stop]
    return projection.bias.index_select(0, order.expert[group.span])
