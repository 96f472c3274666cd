"""Copies of float32 matrices in the 16-bit dtype of computation, made for a decoder layer at a time.

    with copied_by_layer(layers, torch.bfloat16):     each forward of a layer casts its matrices A by one launch, and B
        compute_copy(a, torch.bfloat16)               a view of that copy
    compute_copy(a, torch.bfloat16)                   elsewhere: a cast of this matrix

The optimizer has put all matrices A into one tensor, and all B (training/optimizers.py), so those of a layer follow one
another. A copy lives until the layer's forward ends, or as long as autograd keeps it. Casting at each use instead would
add 1,200 launches to a step of Llama-3.1-8B, and one copy of the whole adapter 84 MB to its peak.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_lora_ft_compute_copy"  # of a matrix
_MATRICES = "_lora_ft_matrices"  # of a decoder layer: its matrices, and the dtype of their copies


@contextlib.contextmanager
def copied_by_layer(layers: Iterable[tuple[nn.Module, list[nn.Parameter]]], dtype: torch.dtype) -> Iterator[None]:
    """Let the matrices of each layer have copies in `dtype` during its forwards, until the block ends."""
    with contextlib.ExitStack() as undo:
        for layer, matrices in layers:
            if all(matrix.dtype == dtype for matrix in matrices):
                continue
            setattr(layer, _MATRICES, (matrices, dtype))
            undo.callback(delattr, layer, _MATRICES)
            undo.callback(layer.register_forward_pre_hook(_before_forward).remove)
            undo.callback(layer.register_forward_hook(_after_forward, always_call=True).remove)
        yield


@contextlib.contextmanager
def copies_of(layer: nn.Module) -> Iterator[None]:
    """Make the copies of a layer's matrices, and drop them when the block ends. For the forward that is recomputed."""
    matrices, dtype = getattr(layer, _MATRICES, ([], None))
    _copy(matrices, dtype)
    try:
        yield
    finally:
        _forget(matrices)


def compute_copy(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix in `dtype`, without a gradient: its copy, the matrix itself, or a new cast."""
    if matrix.dtype == dtype:
        return matrix.detach()
    copy = getattr(matrix, _ATTRIBUTE, None)
    return copy if copy is not None and copy.dtype == dtype else matrix.detach().to(dtype)


def _before_forward(layer: Any, _: Any) -> None:
    is_recomputed = layer.training and getattr(layer, "gradient_checkpointing", False)
    if not is_recomputed:  # ops/gradient_checkpointing.py makes those of a recomputed layer
        _copy(*getattr(layer, _MATRICES))


def _after_forward(layer: Any, *_: Any) -> None:
    _forget(getattr(layer, _MATRICES)[0])


@torch.no_grad()
def _copy(matrices: list[nn.Parameter], dtype: torch.dtype) -> None:
    for run in _runs(matrices):
        numbers = sum(matrix.numel() for matrix in run)
        copies = run[0].as_strided((numbers,), (1,)).to(dtype).split([matrix.numel() for matrix in run])
        for matrix, copy in zip(run, copies, strict=True):
            setattr(matrix, _ATTRIBUTE, copy.view(matrix.shape))


def _forget(matrices: list[nn.Parameter]) -> None:
    for matrix in matrices:
        vars(matrix).pop(_ATTRIBUTE, None)


def _runs(matrices: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield matrices that follow one another in one tensor, together."""
    ordered = sorted(matrices, key=lambda m: (m.untyped_storage()._cdata, m.storage_offset()))
    run: list[nn.Parameter] = []
    for matrix in ordered:
        if run and not _follows(run[-1], matrix):
            yield run
            run = []
        run.append(matrix)
    if run:
        yield run


def _follows(before: Tensor, after: Tensor) -> bool:
    same = before.untyped_storage()._cdata == after.untyped_storage()._cdata
    return same and before.storage_offset() + before.numel() == after.storage_offset()
