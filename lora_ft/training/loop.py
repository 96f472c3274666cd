"""The training loop: learners take turns, one optimizer step each, over one resident base.

    step:  micro-batch  loss_sum -> backward     gradients add up
           micro-batch  loss_sum -> backward
           divide by the supervised tokens of the STEP -> norm -> clip -> rate -> optimizer -> metrics

The sum is divided once by the supervised tokens of all micro-batches: cutting a step into
other micro-batches changes rounding, never the gradient (A01).
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_ft import config
from lora_ft.adapters import audit
from lora_ft.data.order import derive
from lora_ft.data.pack import micro_batches
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation.heldout import heldout_loss, to_batch
from lora_ft.ops.recompute import recompute_layers
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.training import optimizers
from lora_ft.training.learner import Evaluation, Learner

Metrics = dict[str, Any]
Observer = Callable[[Learner, Metrics], None]


def fit(learners: list[Learner], observe: Observer) -> None:
    """Train every learner to its end; `observe` receives the metrics of each step (and of step 0's evaluation)."""
    turns = [_turns(learner, observe) for learner in learners]
    while turns:
        turns = [turn for turn in turns if next(turn, None) is not None]


def _turns(learner: Learner, observe: Observer) -> Iterator[int]:
    """Train one learner, giving the base away after every step; yields the 1-based step."""
    for step in range(len(learner.steps)):
        _activate(learner)
        metrics = _gradient(learner, step)
        if step == 0 and learner.heldout:
            # The adapter is still as it was; so the first step need not wait for seconds of evaluation.
            observe(learner, {"step": 0} | _evaluate(learner, 0))
        metrics |= _update(learner, step, metrics)
        if _evaluation_due(learner, step + 1):
            metrics |= _evaluate(learner, step + 1)
        observe(learner, metrics)
        if _out_of_patience(learner) and step + 1 < len(learner.steps):
            learner.stopped_early = True
            break
        yield step + 1
    # Before the best state comes back: that may be the very start.
    audit.check_moved(learner.start, learner.parameters)
    if learner.cfg.train.keep is config.Keep.best and learner.best_values is not None:
        learner.flat.values.copy_(learner.best_values)


def _activate(learner: Learner) -> None:
    if learner.model.active_adapter != learner.name:
        learner.model.set_adapter(learner.name)
    recompute_layers(learner.base, learner.checkpoint)
    learner.model.train()


def _gradient(learner: Learner, step: int) -> Metrics:
    """The gradient of one optimizer step over the rows planned for it; NonFiniteError where it is not finite."""
    started = time.perf_counter()
    cfg, rows = learner.cfg, [learner.rows[i] for i in learner.steps[step]]
    packed = micro_batches(rows, cfg.train.tokens_per_microbatch, cfg.train.packing and learner.paths.packs)
    supervised = sum(int((p.targets >= 0).sum()) for p in packed)
    learner.flat.gradients.zero_()
    loss = 0.0
    for micro, micro_batch in enumerate(packed):
        # Dropout draws from the global generator: seeding it here makes the draw a function of the position.
        torch.manual_seed(derive(cfg.seed, "dropout", step, micro))
        loss_sum = token_loss_sum(learner.base, to_batch(micro_batch, learner.base.device), learner.paths)
        loss_sum.backward()
        loss += float(loss_sum.detach()) / supervised
    # Divided here, in the adapter's float32: half a model's gradients would vanish in float16 before.
    learner.flat.gradients.div_(supervised)
    if step == 0:
        audit.check_gradients(learner.parameters)
    norm = optimizers.clip(learner.flat.gradients, cfg.optim.clip)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        places = ", ".join(row.place for row in rows[:5])
        raise NonFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; rows {places}{', ...' if len(rows) > 5 else ''}"
        )
    return {
        "step": step + 1,
        "loss": loss,
        "grad_norm": norm,
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "supervised_tokens": supervised,
        "micro_batches": len(packed),
        "seconds": time.perf_counter() - started,
    }


def _update(learner: Learner, step: int, gradient: Metrics) -> Metrics:
    """Let the optimizer take the step whose gradient is there; the metrics that this adds and changes."""
    started = time.perf_counter()
    rate = optimizers.learning_rate(learner.cfg.optim, step, len(learner.steps))
    optimizers.set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    seconds = gradient["seconds"] + time.perf_counter() - started
    learner.tokens += gradient["tokens"]
    learner.seconds += seconds
    learner.losses.append(gradient["loss"])
    return {"lr": rate, "seconds": seconds, "tokens_per_second": gradient["tokens"] / seconds}


def _evaluation_due(learner: Learner, step: int) -> bool:
    every = learner.cfg.train.eval_every_steps
    return bool(learner.heldout) and (step == len(learner.steps) or (every is not None and step % every == 0))


def _evaluate(learner: Learner, step: int) -> Metrics:
    """Held-out loss of the adapter as it is now; the best state so far is kept in memory if it will be wanted."""
    capacity = learner.cfg.train.tokens_per_microbatch or learner.cfg.train.tokens_per_step
    heldout = heldout_loss(learner.base, learner.heldout, learner.paths, capacity)
    if not math.isfinite(heldout.loss):
        raise NonFiniteError(f"step {step}: held-out loss {heldout.loss}")
    learner.evaluations.append(Evaluation(step, heldout))
    if learner.cfg.train.keep is config.Keep.best and learner.evaluations_without_gain == 0:
        learner.best_values = learner.flat.values.clone()
    return {"heldout_loss": heldout.loss}


def _out_of_patience(learner: Learner) -> bool:
    patience = learner.cfg.train.patience
    return patience is not None and learner.evaluations_without_gain >= patience
