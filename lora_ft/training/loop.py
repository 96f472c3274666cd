"""The training loop: learners take turns, one optimizer step each, over one resident base.

    step:  micro-batch  loss_sum -> backward     gradients add up
           micro-batch  loss_sum -> backward
           divide by the supervised tokens of the STEP -> norm -> clip -> rate -> optimizer -> metrics -> checkpoint

The sum is divided once by the supervised tokens of all micro-batches: cutting a step into
other micro-batches changes rounding, never the gradient (A01).
"""

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from lora_ft import config
from lora_ft.adapters import audit
from lora_ft.data.order import derive
from lora_ft.data.pack import micro_batches
from lora_ft.errors import CheckpointError, Interrupted, NonFiniteError
from lora_ft.evaluation.heldout import heldout_loss, to_batch
from lora_ft.ops.recompute import recompute_layers
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.training import checkpoint, optimizers
from lora_ft.training.learner import Evaluation, Learner
from lora_ft.training.stop import Stop

Metrics = dict[str, Any]
Observer = Callable[[Learner, Metrics], None]


def fit(learners: list[Learner], observe: Observer, stop: Stop | None = None) -> None:
    """Train every learner from where it stands to its end; `observe` receives the metrics of each step.

    The evaluation before the first step is observed as step 0. When `stop` is asked for, the step is finished, every
    learner saved, and Interrupted raised.
    """
    turns, stop = {learner.name: _turns(learner, observe) for learner in learners}, stop or Stop()
    with stop.between_steps():
        while turns:
            for name, turn in list(turns.items()):
                if next(turn, None) is None:
                    del turns[name]
                if stop.signum is not None:
                    _save_and_leave(learners, stop.signum)


def _save_and_leave(learners: list[Learner], signum: int) -> NoReturn:
    for learner in learners:
        checkpoint.save(learner)
    first = learners[0]
    raise Interrupted(
        signum,
        f"stopped by {signal.Signals(signum).name} after step {first.step} of {len(first.steps)}; "
        f"go on with: lora-ft train resume={shlex.quote(str(first.folder))}",
    )


def _turns(learner: Learner, observe: Observer) -> Iterator[int]:
    """Train one learner, giving the base away after every step; yields the number of steps done."""
    first = learner.step
    while not learner.is_done:
        _activate(learner)
        metrics = _gradient(learner, audited=learner.step == first)
        if learner.step == 0 and learner.heldout:
            # The adapter is still as it was; so the first step need not wait for seconds of evaluation.
            observe(learner, {"step": 0} | _evaluate(learner))
        metrics |= _update(learner, metrics)
        if _evaluation_due(learner):
            metrics |= _evaluate(learner)
        observe(learner, metrics)
        if checkpoint.is_due(learner):
            checkpoint.save(learner)
        yield learner.step
    audit.check_moved(learner.start, learner.parameters)


def _activate(learner: Learner) -> None:
    if learner.model.active_adapter != learner.name:
        learner.model.set_adapter(learner.name)
    recompute_layers(learner.base, learner.checkpoint)
    learner.model.train()


def _gradient(learner: Learner, *, audited: bool) -> Metrics:
    """The gradient of the next step over the rows planned for it; NonFiniteError where it is not finite."""
    started, step = time.perf_counter(), learner.step
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
    if audited:
        audit.check_gradients(learner.parameters)
    norm = optimizers.clip(learner.flat.gradients, cfg.optim.clip)
    if not (math.isfinite(norm) and math.isfinite(loss)):
        places = ", ".join(row.place for row in rows[:5])
        raise NonFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; rows {places}{', ...' if len(rows) > 5 else ''}; "
            f"last checkpoint: {_last_checkpoint(learner)}"
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


def _last_checkpoint(learner: Learner) -> str:
    try:
        return str(checkpoint.newest(learner.folder) or "none")
    except CheckpointError:
        return "none that is valid"


def _update(learner: Learner, gradient: Metrics) -> Metrics:
    """Let the optimizer take the step whose gradient is there; the metrics that this adds and changes."""
    started = time.perf_counter()
    rate = optimizers.learning_rate(learner.cfg.optim, learner.step, len(learner.steps))
    optimizers.set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    seconds = gradient["seconds"] + time.perf_counter() - started
    learner.tokens += gradient["tokens"]
    learner.seconds += seconds
    learner.losses.append(gradient["loss"])
    return {"lr": rate, "seconds": seconds, "tokens_per_second": gradient["tokens"] / seconds}


def _evaluation_due(learner: Learner) -> bool:
    every, step = learner.cfg.train.eval_every_steps, learner.step
    return bool(learner.heldout) and (step == len(learner.steps) or (every is not None and step % every == 0))


def _evaluate(learner: Learner) -> Metrics:
    """Held-out loss of the adapter as it is now; the best state so far is kept in memory if it will be wanted."""
    capacity = learner.cfg.train.tokens_per_microbatch or learner.cfg.train.tokens_per_step
    heldout = heldout_loss(learner.base, learner.heldout, learner.paths, capacity)
    if not math.isfinite(heldout.loss):
        raise NonFiniteError(f"step {learner.step}: held-out loss {heldout.loss}")
    learner.evaluations.append(Evaluation(learner.step, heldout))
    if learner.cfg.train.keep is config.Keep.best and learner.evaluations_without_gain == 0:
        learner.best_values = learner.flat.values.clone()
    return {"heldout_loss": heldout.loss}
