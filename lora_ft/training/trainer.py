"""The training loop: optimizer steps of one adapter on a frozen base.

    step:  micro-batch  loss sum -> backward     gradients add up
           micro-batch  loss sum -> backward
           divide by the weight of the STEP -> norm -> clip -> read -> rate -> optimizer -> metrics -> checkpoint

The objective gives loss sums and weights; for sft the weight is the number of supervised tokens. The gradient is
divided once, by the weight of all micro-batches: cutting a step into other micro-batches changes rounding, never the
gradient (A01). So a step that ran out of memory is repeated in smaller ones if train.on_oom=shrink.

`read` is the one place where the host waits for the device. With train.log_every_steps above 1 several steps are read
together, after their optimizer steps and before an evaluation or a checkpoint.
"""

import contextlib
import logging
import math
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from lora_ft import config, runs
from lora_ft.adapters import audit
from lora_ft.data.packing import micro_batches
from lora_ft.data.rows import Example
from lora_ft.data.sampler import derive
from lora_ft.errors import CheckpointError, Interrupted, LostRank, NonFiniteError
from lora_ft.evaluation.loss import EvalLoss, eval_loss
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.gradient_checkpointing import recomputed_layers
from lora_ft.training import checkpoint, optimizers
from lora_ft.training.callbacks import Callback, Callbacks, Metrics
from lora_ft.training.metrics import gpu_memory
from lora_ft.training.out_of_memory import repeated
from lora_ft.training.signals import Stop
from lora_ft.training.state import Evaluation, TrainingState
from lora_ft.training.step import Step, read

log = logging.getLogger("lora_ft")


def fit(
    state: TrainingState,
    callbacks: Sequence[Callback] = (),
    stop: Stop | None = None,
    until: int | None = None,
    base_losses: dict[object, EvalLoss] | None = None,
) -> None:
    """Train from the state's step to the end of the run, or until `until` steps are done, then evaluate and save.

    `base_losses` caches eval losses of the bare base, keyed by rows and batch size; adapters that start equal to their
    base share them. When `stop` receives a signal, the step is finished, the state saved, and Interrupted raised; also
    if another rank receives one. If another rank is lost, the state before the step is saved, and LostRank raised.
    """
    stop, callback = stop or Stop(), Callbacks(callbacks)
    base_losses = {} if base_losses is None else base_losses
    state.model.train()
    first = state.step
    state.agree_to_stop()
    with (
        stop.between_steps(),
        recomputed_layers(state.base, state.gradient_checkpointing),
        _saved_if_a_rank_is_lost(state),
    ):
        while not (state.is_done or (until is not None and state.step >= until)):
            _step(state, callback, base_losses, until, audited=state.step == first)
            state.agree_to_stop()
            if state.ranks.any(stop.signum is not None):
                _write_unread(state, callback)
                _save_and_leave(state, stop.signum or signal.SIGTERM)
    if state.is_done:
        audit.check_moved(state.start, state.parameters)


def _step(
    state: TrainingState,
    callback: Callbacks,
    base_losses: dict[object, EvalLoss],
    until: int | None,
    *,
    audited: bool,
) -> None:
    """Take one optimizer step, then evaluate, write metrics, call callbacks and save a checkpoint where due."""
    step = compute_gradient(state, audited=audited)
    together = _steps_per_read(state)
    if together == 1:
        read([step], state.ranks)
        step.is_skipped = state.loss_scale is not None and state.loss_scale.skips(
            step.number, step.loss, step.grad_norm
        )
        _check_finite(state, step)
    if state.step == 0 and state.eval_examples:
        # The gradient does not change the adapter: evaluating here delays the update, not the first forward pass.
        _evaluate_apart(state, callback, base_losses if state.starts_as_base else {})
    apply_gradient(state, step)
    state.unread.append(step)
    is_evaluated = bool(state.eval_examples) and (_evaluation_is_due(state) or state.step == until)
    if not (is_evaluated or state.step % together == 0 or checkpoint.is_due(state) or state.step == until):
        return
    _write_unread(state, callback, is_evaluated=is_evaluated)
    if state.is_done and state.eval_examples and not is_evaluated:
        _evaluate_apart(state, callback, {})  # a callback has stopped the run: its last step is evaluated too
    if checkpoint.is_due(state) or state.step == until:
        callback.on_checkpoint(state, checkpoint.save(state))


def _steps_per_read(state: TrainingState) -> int:
    # In float16 the values decide whether the optimizer takes the step.
    return 1 if state.loss_scale else state.cfg.train.log_every_steps


def _write_unread(state: TrainingState, callback: Callbacks, *, is_evaluated: bool = False) -> None:
    """Read the unread steps, write their metrics and call callbacks; `is_evaluated`: evaluate after the last one.

    Raises NonFiniteError for the first step that is not finite; the lines of those before it are written.
    """
    read(state.unread, state.ranks)
    memory = gpu_memory(state.base.device)
    while state.unread:
        step, is_last = state.unread[0], len(state.unread) == 1
        _check_finite(state, step)
        metrics = step.metrics() | memory
        if state.loss_scale:
            metrics["skipped"] = len(state.loss_scale.skipped)
        if is_last and is_evaluated:
            metrics |= _evaluate(state, {})
        del state.unread[0]
        state.losses.append(step.loss)
        state.tokens += step.facts["tokens"]
        state.seconds += step.seconds
        # JSON has neither NaN nor infinity, which a skipped step may have.
        left_out = [name for name, value in metrics.items() if step.is_skipped and not math.isfinite(value)]
        _append(state, {name: metrics[name] for name in metrics if name not in left_out})
        callback.on_step(state, metrics)
        if is_last and is_evaluated:
            callback.on_evaluate(state, metrics)
    state.agree_to_stop()


def _evaluate_apart(state: TrainingState, callback: Callbacks, known: dict[object, EvalLoss]) -> None:
    """Evaluate outside of a step's own metrics: the result has a line of its own in metrics.jsonl."""
    metrics = {"step": state.step} | _evaluate(state, known)
    _append(state, metrics)
    callback.on_evaluate(state, metrics)


def _append(state: TrainingState, metrics: Metrics) -> None:
    if state.ranks.is_main:
        runs.append_metrics(state.folder, metrics)


def _save_and_leave(state: TrainingState, signum: int) -> NoReturn:
    checkpoint.save(state)
    name, steps = signal.Signals(signum).name, len(state.steps)
    raise Interrupted(signum, f"stopped by {name} after step {state.step} of {steps}; {_continuation(state)}")


def _continuation(state: TrainingState) -> str:
    return f"continue with: lora-ft train resume={shlex.quote(str(state.folder))}"


@contextlib.contextmanager
def _saved_if_a_rank_is_lost(state: TrainingState) -> Iterator[None]:
    """Save the state if another rank is lost in the block: until a step's gradient is complete, nothing has changed."""
    try:
        yield
    except LostRank as error:
        if state.ranks.is_main and state.step and not state.unread:
            checkpoint.save(state)
        raise LostRank(f"{error} after step {state.step} of {len(state.steps)}; {_continuation(state)}") from error


def compute_gradient(state: TrainingState, *, audited: bool) -> Step:
    """Compute the gradient of the next step, summed over ranks, divided and clipped; the device is not waited for."""
    started, index = time.perf_counter(), state.step
    examples = state.documents()
    packed, parts = repeated(state, partial(loss_sums, state, examples))
    scale = _scale_of(state)
    state.ranks.sum(state.flat.gradients)
    (weight,) = state.ranks.totals([sum(part.weight for part in parts)])
    # Divided here, in the adapter's float32: a loss divided before backward would underflow in float16.
    state.flat.gradients.div_(weight * scale)
    if audited:
        audit.check_gradients(state.parameters)
    norm = optimizers.clip(state.flat.gradients, state.cfg.optim.max_grad_norm)
    names = ["loss", *state.objective.metrics]
    sums = [part.sum if name == "loss" else part.metrics[name] for name in names for part in parts]
    facts = {
        "rows": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "supervised_tokens": sum(sum(batch.counts) for batch in packed),
        "micro_batches": len(packed),
    }
    facts |= _supervised_by_source(state, index, examples)
    if state.tokens_per_microbatch not in (None, state.cfg.train.tokens_per_microbatch):  # of auto, ranks, or shrunk
        facts["tokens_per_microbatch"] = state.tokens_per_microbatch
    return Step(
        number=index + 1,
        sources=[example.source for example in examples],
        facts=facts,
        names=names,
        values=torch.stack([*(sums or [torch.zeros_like(norm)] * len(names)), norm]),
        weight=weight,
        seconds=time.perf_counter() - started,
    )


def loss_sums(state: TrainingState, examples: Sequence[Example]) -> tuple[list[Batch], list[LossSum]]:
    """Add the gradients of this rank's micro-batches of the next step, whose examples are given, from zero.

    Returns the micro-batches of the whole step, and the loss sums of those of this rank.
    """
    packed = micro_batches(examples, state.tokens_per_microbatch, state.packs)
    scale = _scale_of(state)
    state.flat.gradients.zero_()
    parts: list[LossSum] = []
    for micro, counts in state.ranks.share([len(batch.ids) for batch in packed]):
        # Dropout uses the global generator: seeding it here makes its masks a function of step and micro-batch.
        torch.manual_seed(derive(state.cfg.seed, "dropout", state.step, micro))
        part = state.objective.loss(state.base, packed[micro].to(state.base.device), state.paths)
        (part.sum * (scale if counts else 0.0)).backward()
        if counts:
            parts.append(part.detach())
    return packed, parts


def _scale_of(state: TrainingState) -> float:
    return state.loss_scale.at(state.step + 1) if state.loss_scale else 1.0


def _supervised_by_source(state: TrainingState, step: int, examples: Sequence[Example]) -> dict[str, int]:
    """Return the supervised tokens of each source in a step; empty without data.sources."""
    if state.mix is None:
        return {}
    counts = state.mix.counts(state.steps[step], [int(example.supervised.sum()) for example in examples])
    return {f"supervised_tokens/{name}": int(count) for name, count in counts.items()}


def _check_finite(state: TrainingState, step: Step) -> None:
    """Raise NonFiniteError if the loss or gradient of a step is not finite and the step is not skipped."""
    if step.is_skipped or (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
        return
    sources = ", ".join(step.sources[:5] + ["..."] * (len(step.sources) > 5))
    raise NonFiniteError(
        f"step {step.number}: loss {step.loss}, gradient norm {step.grad_norm}; rows {sources}; "
        f"last checkpoint: {_last_checkpoint(state)}"
    )


def _last_checkpoint(state: TrainingState) -> str:
    try:
        return str(checkpoint.newest(state.folder) or "none")
    except CheckpointError:
        return "none is valid"


def apply_gradient(state: TrainingState, step: Step) -> None:
    """Set the learning rate and take the optimizer step, unless it is skipped."""
    started = time.perf_counter()
    step.lr = optimizers.learning_rate(state.cfg.optim, state.step, len(state.steps))
    optimizers.set_learning_rate(state.optimizer, step.lr)
    if step.is_skipped:
        if state.ranks.is_main:
            log.warning("step %d is skipped: loss %s, gradient norm %s", step.number, step.loss, step.grad_norm)
    else:
        state.optimizer.step()
    step.seconds += time.perf_counter() - started


def _evaluation_is_due(state: TrainingState) -> bool:
    every, step = state.cfg.train.eval_every_steps, state.step
    return step == len(state.steps) or (every is not None and step % every == 0)


def _evaluate(state: TrainingState, known: dict[object, EvalLoss]) -> Metrics:
    """Evaluate the current adapter; with train.keep=best, copy its values if they are the best so far.

    A result in `known`, of the same rows and metrics in the same micro-batches, is not measured again; others are
    added.
    """
    capacity = state.tokens_per_microbatch or state.cfg.train.tokens_per_step
    key = len(state.eval_examples), capacity, *state.task.names, state.cfg.train.max_new_tokens
    if key not in known:
        chosen = state.eval_examples, state.paths, capacity, state.eval_sources
        measured = eval_loss(state.base, state.objective.loss, *chosen, state.ranks)
        if not math.isfinite(measured.loss):
            raise NonFiniteError(f"step {state.step}: eval loss {measured.loss}")
        # Ranks may differ in the last bits of a score, and must agree on the best one.
        known[key] = replace(measured, metrics=measured.metrics | state.ranks.agreed(state.task(state.base)))
    measured = known[key]
    state.evaluations.append(Evaluation(state.step, measured))
    if state.cfg.train.keep is config.Keep.best and state.evaluations_without_gain == 0:
        state.best_values = state.flat.values.to("cpu", copy=True)
    of_sources = {f"eval_loss/{name}": loss for name, loss in measured.losses.items()}
    return {"eval_loss": measured.loss, **of_sources, **{f"eval_{name}": v for name, v in measured.metrics.items()}}
