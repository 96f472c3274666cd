"""Gradient checkpointing: recompute some layers in the backward instead of keeping their activations.

    off       no layer: fastest       every_2   every second layer
    every_1   all layers: least memory, one more forward pass
    auto      the fewest layers with which the largest micro-batch fits into the memory that is free now

Checkpoints are non-reentrant, so that gradients reach the adapters although the frozen embedding's output requires
none. With the reentrant form, adapters silently train nothing (peft issue 137, transformers issue 42489).

The activations of a layer depend on dtype, dropout, quantization, adapter and on every fast path, so `auto`
measures them: four forward passes of a few tokens, and the bytes that autograd holds after each.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ft.errors import ConfigError
from lora_ft.ops.batch import Batch
from lora_ft.ops.compute_copies import copies_of
from lora_ft.ops.token_loss import Paths, token_loss_sum

# Share of the free memory that a run may plan to use. The rest is for uses that a measurement of a few tokens does not
# show: gaps of the allocator, buffers inside kernels and, on a CPU, other processes.
USABLE = 0.8
_MOST_PROBE_TOKENS = 24
_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes per token that a forward keeps for its backward: of a layer, of a recomputed layer, of all other parts.

    `fixed` does not grow with the tokens: the optimizer state, which is allocated later.
    """

    layer: float
    recomputed_layer: float
    rest: float
    num_layers: int
    fixed: int = 0

    def peak(self, tokens: int, every: int) -> float:
        """Return the bytes at the start of the backward of `tokens` tokens with `every` = k of every_k (0: off).

        One layer is added to the layers that are kept: for its gradients, and its activations if it is recomputed.
        """
        recomputed = math.ceil(self.num_layers / every) if every else 0
        kept = self.num_layers - recomputed + 1
        return self.fixed + tokens * (kept * self.layer + recomputed * self.recomputed_layer + self.rest)


def recompute_layers(model: PreTrainedModel, setting: str) -> int:
    """Apply off or every_k to the decoder layers; return how many are recomputed. `settle_checkpoint` resolves auto."""
    layers = _layers(model)
    every = 0 if setting == "off" else int(setting.removeprefix("every_"))
    chosen = layers[::every] if every else []
    if every and not chosen:
        raise ConfigError(
            f"train.gradient_checkpointing={setting}: {model.config.model_type} has no layers that can be recomputed: "
            "set train.gradient_checkpointing=off"
        )
    for layer in layers:
        layer.gradient_checkpointing = layer in chosen
        # preserve_rng_state (the default) repeats the dropout masks of the forward.
        layer._gradient_checkpointing_func = partial(_checkpointed, layer)
    return len(chosen)


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    def with_copies(*given: Any) -> Any:
        with copies_of(layer):
            return forward(*given)

    return checkpoint(with_copies, *arguments, use_reentrant=False)


@contextlib.contextmanager
def recomputed_layers(model: PreTrainedModel, setting: str) -> Iterator[None]:
    """Recompute layers by `setting` until the block ends, then restore the layers' own setting."""
    layers = _layers(model)
    before = [{name: value for name, value in vars(layer).items() if name in _ATTRIBUTES} for layer in layers]
    recompute_layers(model, setting)
    try:
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in _ATTRIBUTES:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)


def settle_checkpoint(model: PreTrainedModel, paths: Paths, tokens: int) -> tuple[str, str]:
    """Resolve `auto` for micro-batches of up to `tokens` tokens: return off or every_k, and a log line with the reason.

    `model` is the transformers model with the adapter inside; its parameters are marked as trained or frozen.
    """
    every = 0
    if not _layers(model):
        reason = f"{model.config.model_type} has no layers that can be recomputed"
    elif (free := available_bytes(model.device)) is None:
        reason = "the free memory of this system is unknown"
    elif tokens * _more_than_kept(model) <= USABLE * free:
        reason = "the activations fit into the free memory"
    else:
        footprint = measure(model, paths)
        every = fewest_recomputed(footprint, tokens, int(USABLE * free))
        reason = (
            f"{footprint.peak(tokens, every) / 1e9:.2f} GB for {tokens:,} tokens "
            f"(off {footprint.peak(tokens, 0) / 1e9:.2f}, every_1 {footprint.peak(tokens, 1) / 1e9:.2f}), "
            f"{free / 1e9:.2f} GB free"
        )
    setting = f"every_{every}" if every else "off"
    return setting, f"train.gradient_checkpointing=auto: {setting}, {reason}"


def _more_than_kept(model: PreTrainedModel) -> int:
    """Return bytes per token, two or three times what any path keeps: if that fits, nothing is measured."""
    hidden = _width(model)
    inner = getattr(model.config.get_text_config(), "intermediate_size", None)  # a list, one per layer, in some models
    return 4 * len(_layers(model)) * 16 * (hidden + (inner if isinstance(inner, int) else 4 * hidden))


def fewest_recomputed(footprint: Footprint, tokens: int, budget: int) -> int:
    """Return 0 if all layers can be kept, else the largest k of every_k whose peak fits into `budget` bytes, else 1."""
    choices = (0, *range(footprint.num_layers, 0, -1))
    return next((every for every in choices if footprint.peak(tokens, every) <= budget), 1)


def measure(model: PreTrainedModel, paths: Paths) -> Footprint:
    """Measure the footprint of a training step; the model, its settings and the random state do not change."""
    layers = _layers(model)
    training = model.training
    model.train()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            few, many = _probe_tokens(model)
            slopes = []
            for setting in ("off", "every_1"):
                with recomputed_layers(model, setting):
                    slopes.append((_bytes_kept(model, paths, many) - _bytes_kept(model, paths, few)) / (many - few))
    finally:
        model.train(training)
    # A recomputed layer keeps its input, which is one row of the hidden state per token.
    recomputed = float(_width(model) * model.get_input_embeddings().weight.element_size())
    kept, every_1 = slopes
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Footprint(
        layer=(kept - every_1) / len(layers) + recomputed,
        recomputed_layer=recomputed,
        rest=max(0.0, every_1 - len(layers) * recomputed),
        num_layers=len(layers),
        fixed=2 * trained,  # two moments
    )


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if the system does not report them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not sys.platform.startswith("linux"):
        return None
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_by_cgroups(membership: Path, root: Path) -> list[int]:
    """Return the free bytes below each limit on this process's control group and its parents (cgroup v2: `0::/a/b`)."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    left = []
    for group in [] if own is None else [root / own, *(root / own).parents]:
        limit, current, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
        if group.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
            fields = dict(line.split() for line in stat.read_text().splitlines())
            # The page cache counts as used, but is freed before an allocation fails.
            left.append(int(limit.read_text()) - int(current.read_text()) + int(fields["inactive_file"]))
    return left


def _probe_tokens(model: PreTrainedModel) -> tuple[int, int]:
    """Return two lengths of a short document that fit into the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", _MOST_PROBE_TOKENS)
    many = min(_MOST_PROBE_TOKENS, context)
    return max(1, many // 3), many


def _layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _width(model: PreTrainedModel) -> int:
    """Return the hidden size, from the embedding: configs of models with several parts name it differently."""
    return int(model.get_input_embeddings().weight.shape[1])


def _bytes_kept(model: PreTrainedModel, paths: Paths, tokens: int) -> int:
    """Return the bytes that autograd holds after a forward of one document, without parameters and buffers."""
    ids = torch.zeros(tokens, dtype=torch.int64, device=model.device)
    batch = Batch(ids, torch.arange(tokens, device=model.device), ids, [0, tokens])
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = token_loss_sum(model, batch, paths)
    total = sum(kept.values())
    del loss  # it holds the graph until here, so no address was used twice
    return total
