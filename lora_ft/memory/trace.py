"""Run a training step on tensors without values, and count its memory, launches and synchronisations.

    trace_step(cfg, AutoConfig.from_pretrained(folder), [1024, 3072])
        -> StepTrace(peak_bytes=..., peak_phase="backward", dispatches={"forward": ..., ...}, ...)

It is the run's own step: quantization, adapter, fast paths, packing, objective, backward, clipping and optimizer, by
the same functions as in training, on torch's meta device, which computes shapes only. So it needs neither weights nor
a GPU: the meta device stands for one (ops/device.py). An 8B step takes about two seconds.

The bytes are those of tensors. A real process needs more: the CUDA context (about 0.5 GB), workspaces of kernels, and
gaps between tensors in the allocator.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lora_ft import config, objectives
from lora_ft.adapters import attach, targets
from lora_ft.data.dataset import Dataset, EvalPrompts, Report
from lora_ft.data.examples import Examples
from lora_ft.data.rows import Example
from lora_ft.memory.costs import Cost
from lora_ft.memory.meta_paths import as_with_values
from lora_ft.memory.meter import Meter
from lora_ft.memory.timeline import Timeline
from lora_ft.memory.twin import on_meta
from lora_ft.memory.weight_bytes import bytes_by_storage
from lora_ft.models import build, stored
from lora_ft.models.acceleration import accelerate, accelerated_lora
from lora_ft.models.cpu_embedding import keep_on_cpu
from lora_ft.models.device import dtype_on
from lora_ft.models.meta_quantize import quantize_meta
from lora_ft.ops.device import GPU, Target, standing_for, target
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.gradient_checkpointing import recomputed_layers
from lora_ft.ops.kernels import OWN, TRACED, Kernels
from lora_ft.ops.ranks import ALONE
from lora_ft.ops.token_loss import Paths
from lora_ft.training import state as training_state
from lora_ft.training.state import NAME, TrainingState
from lora_ft.training.step import Step, read
from lora_ft.training.trainer import apply_gradient, compute_gradient
from lora_ft.values import BlockKernels, Keep

_LEAST_PAGED = 100_000  # bitsandbytes does not page smaller states
PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class StepTrace:
    """Counts of one training step; all bytes are those of tensors, rounded as CUDA's allocator rounds them.

    peak_bytes: most bytes live at once. peak_phase: forward, loss, backward or optimizer. peaks: of each phase.
    at_peak: bytes live at the peak by what they belong to: base, adapter, gradient, optimizer, or the phase in which
    they were allocated ("forward" are kept activations). resident: bytes between steps, by the same names.
    loaded_bytes: bytes before the first step, without the optimizer's state.
    dispatches: operations by phase that launch at least one kernel; views and allocations are not counted.
    synchronisations: operations by which the host waits for the device. flops: of matrix products, without attention.
    timeline: live bytes over the step by term (memory/timeline.py). terms_at_peak: those at the peak; their sum is
    peak_bytes.
    base_bytes: of the frozen base by quantization or dtype, such as nf4 and bfloat16.
    costs: the work of the operations, attention included (memory/costs.py). bytes_inside: by which the buffers that
    operators make for themselves raise the peak (memory/workspaces.py). num_trainable: parameters that train.
    plain_lora_layers: adapted layers that compute as PEFT does. reasons: log lines about them.
    """

    peak_bytes: int
    peak_phase: str
    peaks: dict[str, int]
    at_peak: dict[str, int]
    resident: dict[str, int]
    loaded_bytes: int
    dispatches: dict[str, int]
    synchronisations: list[str]
    flops: int
    num_trainable: int
    timeline: Timeline
    terms_at_peak: dict[str, int]
    base_bytes: dict[str, int]
    costs: tuple[Cost, ...]
    bytes_inside: int
    plain_lora_layers: list[str]
    reasons: list[str]

    @property
    def resident_bytes(self) -> int:
        """Bytes between steps: base, adapter, gradient and optimizer state."""
        return sum(self.resident.values())


def trace_step(cfg: config.TrainRun, model_config: Any, lengths: Sequence[int], device: Target = GPU) -> StepTrace:
    """Trace a step of `cfg` on documents of these lengths, with a model of a transformers config.

    All tokens but the first of a document are supervised. `train.gradient_checkpointing` must be off or every_k.
    Without weights, the paths are those that `cfg.fast` selects; the self-check of a loaded model may refuse some.
    """
    # Weights of a bfloat16 checkpoint fit into bfloat16. Those of another one might, which only their values show.
    exact = getattr(model_config, "dtype", None) in (torch.bfloat16, "bfloat16")  # loading changes the config
    files = stored.of_config(model_config)
    exact = exact and (files is None or files.trains or files.method == "mxfp4")  # products with scales do not
    with standing_for(device), torch.random.fork_rng(devices=[]), Meter() as meter, as_with_values(lengths):
        meter.phase = "base"
        cfg = objectives.complete(cfg)
        objective = objectives.find(cfg.objective)
        network = build.on_meta(model_config, dtype_on(cfg.model.dtype, device), objective.model_class, cfg.model.path)
        with torch.device("meta"):
            token_ids = _add_tokens(network, len(cfg.model.added_tokens))
        network.requires_grad_(False).eval()
        compute = cfg.quant.compute_dtype
        dtype = network.dtype if compute is config.Dtype.auto else getattr(torch, compute.value)
        quantize_meta(network, cfg.quant, dtype)
        if cfg.model.embedding_device == "cpu":
            keep_on_cpu(network, torch.device("meta"))
        switch_off_dropout(network)
        fast = dataclasses.replace(cfg.fast, storage=cfg.fast.storage and exact)
        kept = targets.with_own_storage(network, cfg.adapter)
        made = accelerate(network, fast, _kernels(cfg, device), kept, check=False)
        meter.phase = "adapter"
        with torch.device("meta"):
            model = attach.attach(network, cfg.adapter, NAME, cfg.seed, token_ids, objective.task_type)
        with accelerated_lora(model, NAME, cfg.fast) as reasons:
            return _trace(meter, cfg, model, made.paths, lengths, reasons)


def trace_loaded(state: TrainingState, lengths: Sequence[int], gradient_checkpointing: str) -> StepTrace:
    """Trace a step of a loaded model on documents of these lengths, by the paths that it takes.

    The state does not change. An adapter that is attached and accelerated is traced as it is.
    """
    device = target(state.base.device)
    with standing_for(device), torch.random.fork_rng(devices=[]), Meter() as meter, as_with_values(lengths):
        meter.phase = "base"
        cfg = state.cfg.with_train(gradient_checkpointing=gradient_checkpointing)
        return _trace(meter, cfg, on_meta(state.model), state.paths, lengths, [])


def _trace(
    meter: Meter, cfg: config.TrainRun, model: Any, paths: Paths, lengths: Sequence[int], reasons: Sequence[str]
) -> StepTrace:
    """Trace the second step of an adapter on the meta device: the first one allocates the optimizer's state."""
    cfg = _two_steps(cfg, sum(lengths))
    # Documents that do not share a forward pass need the most if the longest is the last, whose backward is the first.
    state = training_state.new_state(cfg, Path(), model, _dataset(sorted(lengths)), paths, "")
    state.steps = [np.arange(len(lengths))] * 2
    # A paged state is in managed memory, which CUDA moves to the host when it is short. A CPU has none.
    is_paged = getattr(state.optimizer, "is_paged", False)
    if is_paged:
        cast(Any, state.optimizer).is_paged = False
    state.model.train()
    meter.assign([state.flat.values], "adapter")
    meter.assign([state.flat.gradients], "gradient")
    on_host = _copies_of_adapter(state)  # noqa: F841 - is counted until the trace ends
    loaded = meter.live_bytes
    # A step that was not computed; only the optimizer's state is wanted of it.
    apply_gradient(state, Step(1, [], {"tokens": 1}, ["loss"], state.flat.values[:0], 1.0, 1.0))
    moments: list[Any] = [value for memory in state.optimizer.state.values() for value in memory.values()]
    moments = [value for value in moments if isinstance(value, torch.Tensor) and value.is_meta]
    meter.assign(moments, "optimizer")
    if is_paged and target(state.flat.values.device).kind != "cpu":
        meter.leave_out(value for value in moments if value.numel() >= _LEAST_PAGED)
    resident = {name: count for name, count in meter.live.items() if count}
    base_bytes = bytes_by_storage(meter, model, stored.agreed(cfg.quant, stored.of_config(state.base.config)))
    meter.reset()
    plain: set[str] = set()
    with recomputed_layers(state.base, state.gradient_checkpointing), _phases(meter, state, plain):
        meter.phase = "forward"
        step = compute_gradient(state, audited=False)
        read([step], ALONE)
        apply_gradient(state, step)
    timeline = meter.record.timeline()
    peak_phase = max(PHASES, key=lambda phase: meter.peaks[phase])
    return StepTrace(
        peak_bytes=meter.peaks[peak_phase],
        peak_phase=peak_phase,
        peaks={phase: meter.peaks[phase] for phase in PHASES},
        at_peak=dict(meter.at_peak),
        resident=resident,
        loaded_bytes=loaded,
        dispatches={phase: meter.dispatches[phase] for phase in PHASES},
        synchronisations=list(meter.synchronisations),
        flops=meter.flops,
        num_trainable=state.num_trainable,
        timeline=timeline,
        terms_at_peak=timeline.at_peak,
        base_bytes=base_bytes,
        costs=meter.costs(),
        bytes_inside=max(0, meter.peak_inside - meter.peaks[peak_phase]),
        plain_lora_layers=sorted(plain),
        reasons=list(reasons),
    )


def _add_tokens(network: Any, count: int) -> list[int]:
    """Add rows for tokens to the embedding and the head, and return their numbers.

    A base may have unused rows, which real tokens take first: without a tokenizer the rows are those of the config.
    """
    rows = network.get_input_embeddings().weight.shape[0]
    if count:
        with build.quiet():
            network.resize_token_embeddings(rows + count, mean_resizing=False)
    return list(range(rows, rows + count))


def _copies_of_adapter(state: TrainingState) -> list[torch.Tensor]:
    """Return what a run keeps of its adapter's values on the host, if the host's memory is that of the device."""
    if target(state.flat.values.device).kind != "cpu":
        return []
    kept = [state.start, {"best": state.flat.values}] if state.cfg.train.keep is Keep.best else [state.start]
    return [torch.empty(value.shape, dtype=value.dtype, device="meta") for each in kept for value in each.values()]


def _kernels(cfg: config.TrainRun, device: Target) -> Kernels:
    return TRACED if device.kind == "cuda" and cfg.fast.kernels is not BlockKernels.eager else OWN


def _dataset(lengths: Sequence[int]) -> Dataset:
    train = [Example(np.zeros(n, np.int32), np.arange(n) > 0, "a document without content") for n in lengths]
    report = Report(
        format="none", rows=len(train), train_documents=len(train), eval_documents=0, left_out={}, converted={},
        truncated=0, split=0,
        duplicates=0, unused=[], train_tokens=sum(lengths), eval_tokens=0, supervised_tokens=sum(lengths) - len(train),
        longest=max(lengths), cached=False, sha256="", template_sha256=None, tokenizer_sha256="",
    )  # fmt: skip
    none = Examples.of([])
    return Dataset(Examples.of(train), none, EvalPrompts(none, [], np.zeros(0, np.bool_)), answers=None, report=report)


def _two_steps(cfg: config.TrainRun, tokens: int) -> config.TrainRun:
    """Return the settings of a run of two steps, each with all documents."""
    cfg = cfg.with_train(max_steps=2, tokens_per_step=tokens)
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, warmup_steps=0))


@contextlib.contextmanager
def _phases(meter: Meter, state: TrainingState, plain: set[str]) -> Iterator[None]:
    """Set the meter's phase by hooks until the block ends, and collect the LoRA layers that compute as PEFT does."""

    def enters(phase: str) -> None:
        if torch._C._current_graph_task_id() == -1:  # otherwise this is a layer that the backward recomputes
            meter.phase = phase

    def enters_loss(_: Any, __: Any, output: Any) -> None:
        enters("loss")
        if output[0].requires_grad:
            output[0].register_hook(lambda _: meter.leave_loss())

    from peft.tuners.lora import LoraLayer

    body = getattr(state.base, state.base.base_model_prefix)
    hooks = [
        body.register_forward_pre_hook(lambda *_: enters("forward")),
        body.register_forward_hook(enters_loss),
    ]
    for name, layer in state.model.named_modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
            # Only PEFT's own forward calls the module; the fast one reads its weight.
            hooks.append(layer.lora_A[NAME].register_forward_pre_hook(lambda *_, name=name: plain.add(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
