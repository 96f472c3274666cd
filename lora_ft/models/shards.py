"""Hold a part of the frozen base in each rank, and gather the weights of a layer while it computes.

    unit 0, 1, ...      a decoder layer, or the embedding and the head: its frozen tensors are views of one buffer
    each rank           keeps 1 / world_size of the bytes of each unit; the buffer is empty while nothing needs it
    forward             gather 0, 1 | compute 0 | free 0, gather 2 | compute 1 | ...
    backward            the same from the last layer down

Bytes are gathered, so a weight has the same bits as in one process, whatever its format: NF4 codes and their scales,
int8, 8-bit floats, 16 bits. The base has no gradients, so nothing is scattered back. Tensors that belong to no unit
(norms after the last layer, buffers derived from the config) are whole on every rank.

Freeing a buffer empties its storage but keeps the storage object, so every view of it shows the weights again once they
are gathered, also the views that autograd has saved.
"""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lora_ft.errors import ConfigError, LostRank
from lora_ft.models.fingerprint import frozen_tensors
from lora_ft.ops.gradient_checkpointing import recomputable_layers
from lora_ft.ops.ranks import Ranks, answered

log = logging.getLogger("lora_ft")

_ALIGNED = 64  # bytes; kernels read rows in blocks of up to 16


@dataclass
class _Unit:
    """Frozen tensors as views of one buffer, of which this rank keeps a part."""

    buffer: Tensor
    part: Tensor
    work: Any = None
    is_whole: bool = True

    def start(self) -> None:
        """Start gathering the parts of all ranks, unless it has been started."""
        if not self.is_whole and self.work is None:
            self.buffer.untyped_storage().resize_(self.buffer.nbytes)
            with answered():
                self.work = distributed.all_gather_single(self.buffer, self.part, async_op=True)

    def finish(self) -> None:
        """Wait until the buffer is whole."""
        self.start()
        if self.work is not None:
            with answered():
                self.work.wait()
            self.work, self.is_whole = None, True

    def free(self) -> None:
        if self.work is not None:
            self.finish()
        if self.is_whole and self.buffer.nbytes:
            self.buffer.untyped_storage().resize_(0)
            self.is_whole = False


@dataclass
class Shards:
    """The units of a base, in the order of a forward pass.

    whole_bytes: of the base. part_bytes: of this rank's parts. other_bytes: of what every rank has.
    """

    units: list[_Unit] = field(default_factory=list)
    whole_bytes: int = 0
    part_bytes: int = 0
    other_bytes: int = 0

    def need(self, index: int, ahead: int) -> None:
        """Make a unit whole, start gathering the one that comes next, and free all others."""
        for other, unit in enumerate(self.units):
            if other not in (index, ahead):
                unit.free()
        self.units[index].finish()
        self.units[ahead].start()

    def checksum(self) -> str:
        """Return the hash of the parts that this rank keeps."""
        digest = xxhash.xxh3_128()
        for unit in self.units:
            digest.update(unit.part.cpu().numpy())
        return digest.hexdigest()

    @property
    def held_bytes(self) -> int:
        """The bytes of the base on this rank at most: its parts, two whole units, and what is not shared out."""
        largest = sorted(unit.buffer.nbytes for unit in self.units)[-2:]
        return self.part_bytes + self.other_bytes + sum(largest)

    def __str__(self) -> str:
        return f"holds at most {_mb(self.held_bytes)} of a base of {_mb(self.whole_bytes)}: its part and two layers"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def sharded(model: PreTrainedModel, ranks: Ranks) -> Iterator[Shards | None]:
    """Keep a part of each unit of a base with its adapter attached, until the block ends; the base is empty after it.

    Yields None if the ranks do not shard. Raises ConfigError for a model without decoder layers.
    """
    if not ranks.shards:
        yield None
        return
    layers = _layers(model)
    groups = _frozen_groups(model, layers)
    made, hooks = Shards(), list[RemovableHandle]()
    made.whole_bytes = made.other_bytes = sum(tensor.nbytes for tensor in groups.pop())
    for tensors in groups:
        made.whole_bytes += sum(tensor.nbytes for tensor in tensors)
        made.units.append(_unit(tensors, ranks))
        made.part_bytes += made.units[-1].part.nbytes
    for rank, text in enumerate(ranks.gathered(str(made))):
        log.info("rank %d: %s", rank, text)
    try:
        hooks += _hooked(model, layers, made)
        yield made
    finally:
        for hook in hooks:
            hook.remove()
        for unit in made.units:
            with contextlib.suppress(LostRank):  # the error of the block is on its way
                unit.free()


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of the text path: those of a list of layers that has an adapter."""
    names = {id(module): name.rpartition(".")[0] for name, module in model.named_modules()}
    layers = recomputable_layers(model)
    adapted = {names[id(layer)] for layer in layers if any(p.requires_grad for p in layer.parameters())}
    if not adapted:
        raise ConfigError(f"dist=shard: no decoder layer of {model.config.model_type} has an adapter: set dist=ddp")
    return [layer for layer in layers if names[id(layer)] in adapted]


def _frozen_groups(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Return the frozen tensors of the embedding, of each layer, of the head, and all others.

    The head has none of its own if it shares the embedding's. A tensor of several layers is one of the others.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    owners = [ends[0], *layers, ends[1]]
    found = [{id(t): t for t in frozen_tensors(owner)} if owner is not None else {} for owner in owners]
    for key in found[0]:
        found[-1].pop(key, None)
    count = Counter(key for tensors in found for key in tensors)
    device = next(model.parameters()).device
    groups = [
        [t for key, t in tensors.items() if count[key] == 1 and t.device == device and t.nbytes] for tensors in found
    ]
    taken = {id(tensor) for tensors in groups for tensor in tensors}
    return [*groups, [tensor for tensor in frozen_tensors(model) if id(tensor) not in taken]]


def _unit(tensors: Sequence[Tensor], ranks: Ranks) -> _Unit:
    """Move tensors into one buffer, keep this rank's part of it, and free it."""
    ends = list(itertools.accumulate((-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors), initial=0))
    share = -(-ends[-1] // (ranks.world_size * _ALIGNED)) * _ALIGNED
    device = tensors[0].device if tensors else torch.device("cpu")
    buffer = torch.zeros(share * ranks.world_size, dtype=torch.uint8, device=device)
    for tensor, start in zip(tensors, ends, strict=False):
        view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor.detach())
        tensor.data = view
    unit = _Unit(buffer, buffer[ranks.rank * share :][:share].clone())
    unit.free()
    return unit


def _hooked(model: PreTrainedModel, layers: Sequence[nn.Module], shards: Shards) -> Iterator[RemovableHandle]:
    """Register the hooks that gather each unit before it is used, in forward, recomputation and backward."""
    last, embedding = len(shards.units) - 1, 0
    head = last if shards.units[last].buffer.nbytes else embedding
    for module in model.get_input_embeddings().modules():
        yield module.register_forward_pre_hook(lambda *_: shards.need(embedding, 1))
    for index, layer in enumerate(layers, 1):
        yield layer.register_forward_pre_hook(_before(shards, index))
        yield layer.register_forward_hook(_after(shards, index, head if index == len(layers) else None))


def _before(shards: Shards, index: int) -> Any:
    def need(*_: Any) -> None:
        shards.need(index, index - 1 if _in_backward() else index + 1)  # in backward, the layer is recomputed

    return need


def _after(shards: Shards, index: int, head: int | None) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if _in_backward():
            return
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: shards.need(index, index - 1))
        if head is not None:  # in training, the backward begins with this layer
            shards.need(head, index if torch.is_grad_enabled() else 1)

    return hook


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
