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
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lora_ft.memory import results
from lora_ft.memory.costs import TRANSFER, Cost, attention_flops, kind_of, nbytes, product_flops, traffic
from lora_ft.memory.decompositions import decomposition, grouped_mm
from lora_ft.memory.parts import part_of
from lora_ft.memory.timeline import Record, Storage
from lora_ft.memory.workspaces import bytes_inside
from lora_ft.ops.device import target

_aten = torch.ops.aten
_BLOCK = 512  # CUDA's allocator rounds every tensor up to a multiple of this, and counts it so


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
        self.record = Record()
        self._in_loss = False
        self._phase = ""
        self.live: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.dispatches: Counter[str] = Counter()
        self.synchronisations: list[str] = []
        self.flops = 0
        self.peak_inside = 0
        self._total = 0
        self._owners: dict[int, tuple[int, Any]] = {}  # by storage: its number in the record, weak reference
        self._costs: Counter[tuple[Any, ...]] = Counter()
        self._boundaries: dict[int, list[int]] = {}  # values of vectors of integers that the host has copied
        self._recomputation = 0

    @property
    def phase(self) -> str:
        """Name under which operations and new storages are counted."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        if name == self._phase:
            return
        self._phase = name
        self._in_loss = name == "backward"
        self._end_recomputation()
        self.record.phases.append((len(self.record.events), name))

    @property
    def live_bytes(self) -> int:
        """Bytes that are live now."""
        return self._total

    def reset(self) -> None:
        """Forget dispatches, costs, peaks and synchronisations: the step begins. Live storages stay counted."""
        for counted in (self.peaks, self.dispatches, self.synchronisations, self.at_peak, self._costs):
            counted.clear()
        self.flops = self.peak_inside = 0
        self.record.first = len(self.record.events)

    def costs(self) -> tuple[Cost, ...]:
        """Return the operations that launch something, equal ones together."""
        return tuple(
            Cost(phase, name, str(dtype).removeprefix("torch."), flops, count_bytes, launches, count)
            for (phase, name, launches, dtype, flops, count_bytes), count in self._costs.items()
        )

    def assign(self, tensors: Iterable[Tensor], phase: str) -> None:
        """Count the storages of tensors under another phase, or for the first time."""
        for tensor in tensors:
            self._track(tensor)
            key = tensor.untyped_storage()._cdata
            storage = self.record.storages[self._owners[key][0]]
            self.live[storage.phase] -= storage.bytes
            self.live[phase] += storage.bytes
            storage.phase = phase

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of tensors: they are in another memory."""
        for tensor in tensors:
            storage = self.record.storages[self._owners[tensor.untyped_storage()._cdata][0]]
            self.live[storage.phase] -= storage.bytes
            self._total -= storage.bytes
            storage.bytes = 0

    def leave_loss(self) -> None:
        """Note that a backward has passed the loss. Until then, what it makes belongs to the loss."""
        self._in_loss = False

    def live_storages(self, phase: str) -> Iterator[tuple[int, Storage]]:
        """Yield the live storages of a phase, each with its address in torch."""
        for key, (number, _) in self._owners.items():
            if self.record.storages[number].phase == phase:
                yield key, self.record.storages[number]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        self._follow_autograd()
        given = _tensors([*args, *kwargs.values()])
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
        if func.namespace == "bitsandbytes" and on_device:
            by_others = decomposition(func, target(on_device[0].device).kind)
            if by_others is not None:
                with self:
                    return by_others(*args, **kwargs)
        if on_device and func.overloadpacket is _aten._grouped_mm:
            result = grouped_mm(func, args, kwargs)
        elif on_device and len(on_device) == len(given):
            result = results.run(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = [tensor for tensor in _tensors([result]) if tensor.is_meta]
        if made and not on_device and func.overloadpacket is _aten._to_copy and not kwargs.get("non_blocking"):
            self.synchronisations.append(f"{self.phase}: {func} from pageable memory")
        if made or on_device:
            for tensor in made:
                self._track(tensor, func)
            if made and not on_device and len(given) == 1 and given[0].dim() == 1 and given[0].dtype is torch.int32:
                self._boundaries[made[0].untyped_storage()._cdata] = given[0].tolist()
            self._count(func, args, kwargs, given, made)
        return result

    def _follow_autograd(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            self.phase = "backward"
        elif self.phase == "backward":
            self.phase = "optimizer"

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        kind = kind_of(func)
        if kind.is_free:
            return
        self.dispatches[self._phase] += 1
        flops = product_flops(kind, args)
        self.flops += flops
        if kind.is_attention:
            starts = self._documents(given)
            flops = attention_flops(kind, func, args, kwargs, starts)
            inside = bytes_inside(kind, func, args, max(1, len(starts) - 1))
            self.peak_inside = max(self.peak_inside, self._total + inside)
        dtype = next((tensor.dtype for tensor in given if tensor.is_floating_point()), (given or made)[0].dtype)
        name, moved = kind.name, traffic(kind, args, given, made)
        if func.overloadpacket is _aten._to_copy and not any(tensor.is_meta for tensor in given) and self._is_gpu():
            name, moved = TRANSFER, nbytes(made[0])
        self._costs[self._phase, name, kind.launches, dtype, flops, moved] += 1

    def _is_gpu(self) -> bool:
        return target(torch.device("meta")).kind == "cuda"

    def _documents(self, given: list[Tensor]) -> list[int]:
        """Return the boundaries of the documents that an attention is given; [] for a single document."""
        for tensor in given:
            if tensor.dim() == 1 and (found := self._boundaries.get(tensor.untyped_storage()._cdata)):
                return found
        return []

    def _read_by_host(self, func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Any:
        """Return a stand-in for what the host reads from the device by this operation; None if it reads nothing."""
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return torch.ones((), dtype=tensor.dtype).item()
        if packet is _aten._to_copy and torch.device(kwargs.get("device") or "meta").type == "cpu":
            if self._is_gpu():
                self._costs[self._phase, TRANSFER, 0, tensor.dtype, 0, nbytes(tensor)] += 1
            return torch.ones((), dtype=kwargs.get("dtype") or tensor.dtype).expand(tensor.shape)
        if packet is _aten.nonzero:  # its length is unknown: as if every element were set
            made = torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device="meta")
            self._track(made)
            return made
        return None

    def _track(self, tensor: Tensor, func: Any = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._owners:
            return
        size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK
        phase, number = self._phase, len(self.record.storages)
        self._owners[key] = number, weakref.ref(storage, lambda _: self._forget(key))
        part, recomputes = ("", False) if func is None else part_of(func, phase == "backward")
        if phase == "loss" or self._in_loss:
            part = part or "loss"
        if not recomputes:
            self._end_recomputation()
        elif not self._recomputation:
            self._recomputation = len(self.record.recomputed)
            self.record.recomputed.append(0)
        self.record.storages.append(Storage(size, tensor.dtype, phase, part, self._recomputation))
        self.record.events.append(number)
        self.live[phase] += size
        self._total += size
        self.peaks[phase] = max(self.peaks[phase], self._total)
        if self._total > sum(self.at_peak.values()):
            self.at_peak = {name: count for name, count in self.live.items() if count}

    def _forget(self, key: int) -> None:
        number, _ = self._owners.pop(key)
        self._boundaries.pop(key, None)
        self.record.events.append(~number)
        storage = self.record.storages[number]
        self.live[storage.phase] -= storage.bytes
        self._total -= storage.bytes

    def _end_recomputation(self) -> None:
        if self._recomputation:
            self.record.recomputed[self._recomputation] = len(self.record.events)
            self._recomputation = 0


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
