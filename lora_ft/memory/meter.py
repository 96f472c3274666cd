"""Count what operations on the meta device would do on a real device: live bytes, launches, synchronisations.

    with Meter() as meter:
        meter.phase = "forward"
        loss = model(ids).loss            # ids and all weights are on the meta device
    meter.peak_bytes, meter.dispatches["forward"]

A storage is live from the operation that returns it until its last tensor is gone. Buffers that exist only inside of
an operation, such as workspaces of matrix products, are not seen. A value that the host reads does not exist: the
read is counted as a synchronisation, and gives ones.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_ft.ops.device import target

_aten = torch.ops.aten
_BLOCK = 512  # CUDA's allocator rounds every tensor up to a multiple of this, and counts it so

# They return memory or a view, and launch nothing.
_FREE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
         _aten._unsafe_view, _aten._reshape_alias, _aten.lift_fresh}  # fmt: skip
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1}


class HostDeviceMix(RuntimeError):
    """An operation got tensors of the host and of the device, which fails on a real device."""


class Meter(TorchDispatchMode):
    """Counts the operations on meta tensors while it is entered.

    phase: name under which operations and new storages are counted; set it at any time. What autograd's engine runs is
    in the phase "backward", and what follows it in "optimizer" until another phase is set.
    live: bytes by the phase that allocated them. peaks: most live bytes in each phase. at_peak: `live` at the overall
    peak. synchronisations: phase and name of each operation by which the host waits. flops: of matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.live: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.dispatches: Counter[str] = Counter()
        self.synchronisations: list[str] = []
        self.flops = 0
        self._total = 0
        self._owners: dict[int, tuple[str, int, Any]] = {}  # by storage: phase, bytes, weak reference

    @property
    def live_bytes(self) -> int:
        """Bytes that are live now."""
        return self._total

    def reset(self) -> None:
        """Forget dispatches, peaks and synchronisations; storages that are live stay counted."""
        for counted in (self.peaks, self.dispatches, self.synchronisations, self.at_peak):
            counted.clear()
        self.flops = 0

    def assign(self, tensors: Iterable[Tensor], phase: str) -> None:
        """Count the storages of tensors under another phase, or for the first time."""
        for tensor in tensors:
            self._track(tensor)
            key = tensor.untyped_storage()._cdata
            before, size, reference = self._owners[key]
            self.live[before] -= size
            self.live[phase] += size
            self._owners[key] = phase, size, reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._follow_autograd()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in given if tensor.is_meta]
        if on_device and (read := self._read_by_host(func, on_device[0], kwargs)) is not None:
            self.synchronisations.append(f"{self.phase}: {func}")
            return read
        if on_device and func.overloadpacket is not _aten.copy_ and any(t.dim() and not t.is_meta for t in given):
            if target(on_device[0].device).kind == "cpu":  # then host and device are one
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            else:
                raise HostDeviceMix(f"{func} in the {self.phase} got tensors of the host and of the device")
        if func.overloadpacket is _aten._to_copy and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            kwargs = {**kwargs, "device": "meta"}  # the model's own device, which the meta device stands for
        if on_device and func.overloadpacket is _aten._grouped_mm:
            result = _grouped_mm(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        if made and not on_device and func.overloadpacket is _aten._to_copy and not kwargs.get("non_blocking"):
            self.synchronisations.append(f"{self.phase}: {func} from pageable memory")
        if made or on_device:
            for tensor in made:
                self._track(tensor)
            self._count(func, args)
        return result

    def _follow_autograd(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.phase = "backward"
        elif self.phase == "backward":
            self.phase = "optimizer"

    def _count(self, func: Any, args: Any) -> None:
        packet = func.overloadpacket
        if func.is_view or packet in _FREE:
            return
        self.dispatches[self.phase] += 1
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]], args[_PRODUCTS[packet] + 1]
            self.flops += 2 * left.numel() * right.shape[-1]

    def _read_by_host(self, func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Any:
        """Return a stand-in for what the host reads from the device by this operation; None if it reads nothing."""
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return torch.ones((), dtype=tensor.dtype).item()
        if packet is _aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.ones((), dtype=kwargs.get("dtype") or tensor.dtype).expand(tensor.shape)
        if packet is _aten.nonzero:  # its length is unknown: as if every element were set
            made = torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device="meta")
            self._track(made)
            return made
        return None

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._owners:
            return
        size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK
        phase = self.phase
        self._owners[key] = phase, size, weakref.ref(storage, lambda _: self._forget(key))
        self.live[phase] += size
        self._total += size
        self.peaks[phase] = max(self.peaks[phase], self._total)
        if self._total > sum(self.at_peak.values()):
            self.at_peak = {name: count for name, count in self.live.items() if count}

    def _forget(self, key: int) -> None:
        phase, size, _ = self._owners.pop(key)
        self.live[phase] -= size
        self._total -= size


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the result of a product of experts; torch's own meta function (2.13) refuses all dtypes but bfloat16."""
    dtype = args[0].dtype
    result: Tensor = func(*(each.to(torch.bfloat16) for each in args[:2]), *args[2:], **kwargs)
    return result.to(dtype)
