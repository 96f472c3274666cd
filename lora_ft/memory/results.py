"""Results of operations on the meta device, computed once for each kind of arguments: a model repeats its layers.

    run(func, args, kwargs)  ->  func(*args, **kwargs), or tensors of the shapes that it had for such arguments before

Shape, strides and dtype of the results depend on those of the tensors that are given and on the other arguments. What
the meta device computes in Python for most operations takes five times as long as looking it up. An operation that
changes its first argument in place, and only that, is skipped; one that aliases anything else always runs.
"""

import functools
from typing import Any

import torch
from torch import Tensor

_Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

# By operator and arguments: a result for each tensor, and the type that holds them, None for a single one.
_known: dict[Any, tuple[type | None, list[_Made]]] = {}
_in_place: set[Any] = set()  # operators and arguments that leave shape and storage of the first argument


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation on tensors that are all on the meta device."""
    aliases = _aliases(func)
    if aliases is None:
        return func(*args, **kwargs)
    try:
        key = func, _kind(args), tuple((name, _kind(value)) for name, value in kwargs.items())
        found = _known.get(key)
        if aliases and key in _in_place:
            return args[0]
    except TypeError:  # an argument that cannot be compared
        return func(*args, **kwargs)
    if aliases:
        before = _kind(args[0]), args[0].untyped_storage()._cdata
        result = func(*args, **kwargs)
        if result is args[0] and before == (_kind(result), result.untyped_storage()._cdata):
            _in_place.add(key)
        return result
    if found is None:
        result = func(*args, **kwargs)
        if (described := _described(result)) is not None:
            _known[key] = described
        return result
    holder, made = found
    tensors = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made]
    return tensors[0] if holder is None else holder(tensors)


@functools.cache
def _aliases(func: Any) -> bool | None:
    """Return False for an operation that aliases nothing, True for one in place, None for another one."""
    given, made = func._schema.arguments, func._schema.returns
    aliased = [each.alias_info is not None for each in (*given, *made)]
    if made and not any(aliased):
        return False
    in_place = len(made) == 1 and aliased == [True, *[False] * (len(given) - 1), True]
    return True if in_place and func.overloadpacket is not torch.ops.aten.set_ else None


def _kind(value: Any) -> Any:
    """Return what a result depends on of an argument. 1, 1.0 and True are equal, but not to an operation."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return type(value), value


def _described(result: Any) -> tuple[type | None, list[_Made]] | None:
    """Return what to make again; None for a result that is not only of tensors with memory of their own."""
    tensors = list(result) if isinstance(result, list | tuple) else [result]
    if type(result) not in (Tensor, tuple, list) or not all(type(tensor) is Tensor for tensor in tensors):
        return None
    made = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]
    again = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made]
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    if len(storages) < len(tensors) or sizes != [tensor.untyped_storage().nbytes() for tensor in again]:
        return None
    return (None if isinstance(result, Tensor) else type(result)), made
