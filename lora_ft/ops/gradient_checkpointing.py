"""Activation checkpointing as a dial: recompute layers in the backward instead of keeping what they computed.

    off       nothing: fastest        every_2   every second layer
    every_1   all layers: least memory, one more forward pass
    auto      the fewest layers with which the largest micro-batch fits into the memory that is free now

Non-reentrant, so gradients reach the adapters although the frozen embedding's output needs none; the
reentrant form trained nothing in silence (peft issue 137, transformers issue 42489).

What a layer keeps depends on dtype, dropout, quantization, adapter and on every fast path, so `auto`
measures it: four forward passes of a few tokens, and the bytes that autograd holds after each.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ft.errors import ConfigError
from lora_ft.ops.batch import Batch
from lora_ft.ops.token_loss import Paths, token_loss_sum

# Part of the free memory that a run may plan with; the rest is for what a measurement of a few tokens cannot see:
# the allocator's gaps, buffers inside kernels, and on a CPU the other processes.
USABLE = 0.8
_MOST_PROBE_TOKENS = 24
_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes that a forward keeps for its backward, per token: of a layer, of one that is recomputed, of all the rest.

    `fixed` does not grow with the tokens: the optimizer's state to come.
    """

    layer: float
    recomputed_layer: float
    rest: float
    num_layers: int
    fixed: int = 0

    def peak(self, tokens: int, every: int) -> float:
        """Bytes at the start of the backward of `tokens` tokens, every_k layers recomputed (0: none).

        One layer more than those that are kept: its gradients, and what it computes again before them.
        """
        recomputed = math.ceil(self.num_layers / every) if every else 0
        kept = self.num_layers - recomputed + 1
        return self.fixed + tokens * (kept * self.layer + recomputed * self.recomputed_layer + self.rest)


def recompute_layers(model: PreTrainedModel, setting: str) -> int:
    """Set off or every_k on the decoder layers; returns how many are recomputed. `auto` is settled before."""
    layers = _layers(model)
    every = 0 if setting == "off" else int(setting.removeprefix("every_"))
    chosen = layers[::every] if every else []
    if every and not chosen:
        raise ConfigError(
            f"train.gradient_checkpointing={setting}: {model.config.model_type} has no layers that can be recomputed"
        )
    for layer in layers:
        layer.gradient_checkpointing = layer in chosen
        # preserve_rng_state (the default) replays dropout as it was in the forward.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return len(chosen)


@contextlib.contextmanager
def recomputed_layers(model: PreTrainedModel, setting: str) -> Iterator[None]:
    """Recompute layers by `setting` until the block ends; then they are as they were."""
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
    """What `auto` is for micro-batches of up to `tokens` tokens: off or every_k, and the figures behind it.

    `model` is the transformers model with the adapter inside, its parameters marked as trained or frozen.
    """
    if not _layers(model):
        return (
            "off",
            f"train.gradient_checkpointing=auto: off, {model.config.model_type} has no layers that can be recomputed",
        )
    free = available_bytes(model.device)
    if free is None:
        return "off", "train.gradient_checkpointing=auto: off, this system does not say how much memory is free"
    if tokens * _more_than_kept(model) <= USABLE * free:
        return "off", "train.gradient_checkpointing=auto: off, this needs a fraction of the free memory"
    footprint = measure(model, paths)
    every = fewest_recomputed(footprint, tokens, int(USABLE * free))
    setting = f"every_{every}" if every else "off"
    return setting, (
        f"train.gradient_checkpointing=auto: {setting}, {footprint.peak(tokens, every) / 1e9:.2f} GB "
        f"for {tokens:,} tokens "
        f"(off {footprint.peak(tokens, 0) / 1e9:.2f}, every_1 {footprint.peak(tokens, 1) / 1e9:.2f}), "
        f"{free / 1e9:.2f} GB free"
    )


def _more_than_kept(model: PreTrainedModel) -> int:
    """Bytes a token, two or three times what any path keeps: where even that fits, nothing is measured."""
    hidden = _width(model)
    inner = getattr(model.config.get_text_config(), "intermediate_size", None)  # a number a layer in some
    return 4 * len(_layers(model)) * 16 * (hidden + (inner if isinstance(inner, int) else 4 * hidden))


def fewest_recomputed(footprint: Footprint, tokens: int, budget: int) -> int:
    """0 where all can be kept, else the largest k of every_k whose peak fits into `budget` bytes, else 1."""
    dial = (0, *range(footprint.num_layers, 0, -1))
    return next((every for every in dial if footprint.peak(tokens, every) <= budget), 1)


def measure(model: PreTrainedModel, paths: Paths) -> Footprint:
    """Measure the footprint of a training step; model, settings and random state are left as they were."""
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
    # A recomputed layer keeps its input, which is one row of the hidden state a token.
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
    """Memory that this process can still take on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not sys.platform.startswith("linux"):
        return None
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_by_cgroups(membership: Path, root: Path) -> list[int]:
    """What each limit on this process's control group and the groups around it leaves (cgroup v2: line `0::/a/b`)."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    left = []
    for group in [] if own is None else [root / own, *(root / own).parents]:
        limit, current, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
        if group.is_relative_to(root) and limit.exists() and limit.read_text().strip() != "max":
            facts = dict(line.split() for line in stat.read_text().splitlines())
            # The page cache of files counts as used, and is given up before anything fails.
            left.append(int(limit.read_text()) - int(current.read_text()) + int(facts["inactive_file"]))
    return left


def _probe_tokens(model: PreTrainedModel) -> tuple[int, int]:
    """Two lengths of a short document that the model's positions hold."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", _MOST_PROBE_TOKENS)
    many = min(_MOST_PROBE_TOKENS, context)
    return max(1, many // 3), many


def _layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _width(model: PreTrainedModel) -> int:
    """Of the hidden state; configs of models with several parts name it elsewhere."""
    return int(model.get_input_embeddings().weight.shape[1])


def _bytes_kept(model: PreTrainedModel, paths: Paths, tokens: int) -> int:
    """Bytes that autograd holds after a forward of one document, parameters and buffers apart."""
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
    del loss  # until here it held the graph, so that no address was used twice
    return total
