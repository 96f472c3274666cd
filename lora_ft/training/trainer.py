"""The training loop: learners take turns, one optimizer step each, over one resident base.

    step:  micro-batch  loss_sum -> backward     gradients add up
           micro-batch  loss_sum -> backward
           divide by the supervised tokens of the STEP -> norm -> clip -> rate -> optimizer -> metrics -> checkpoint

The sum is divided once by the supervised tokens of all micro-batches: cutting a step into
other micro-batches changes rounding, never the gradient (A01).
"""

import contextlib
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from lora_ft import config
from lora_ft.adapters import audit
from lora_ft.data.packing import micro_batches
from lora_ft.data.sampler import derive
from lora_ft.errors import CheckpointError, Interrupted, NonFiniteError
from lora_ft.evaluation.loss import EvalLoss, eval_loss, to_batch
from lora_ft.ops.gradient_checkpointing import recompute_layers
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.training import checkpoint, logs, optimizers
from lora_ft.training.halving import Halving
from lora_ft.training.signals import Stop
from lora_ft.training.state import Evaluation, Learner

Metrics = dict[str, Any]
Observer = Callable[[Learner, Metrics], None]


class Watcher(Protocol):
    """Who follows a training from outside: an observer of each step that is told of turns and of the end, too."""

    def __call__(self, learner: Learner, metrics: Metrics) -> None: ...

    def turn(self, folder: Path | None, doing: str) -> None:
        """A turn begins, of the run of this folder, or of all where None: loading, step or end."""

    def end(self) -> None:
        """The last step is done: what follows is the outcome."""


def fit(learners: list[Learner], observe: Observer, stop: Stop | None = None) -> None:
    """Train every learner from where it stands to its end; the first failure of one is raised."""
    for _, failure in fit_each(learners, observe, stop):
        if failure:
            raise failure


def fit_each(
    learners: list[Learner],
    observe: Observer,
    stop: Stop | None = None,
    halving: Halving | None = None,
    begins: Callable[[Learner], None] = lambda _: None,
) -> Iterator[tuple[Learner, Exception | None]]:
    """Train every learner from where it stands; yields each as it ends, with what it failed of, while others wait.

    `observe` receives the metrics of each step, the evaluation before the first as step 0; `begins` is called before
    each turn. When `stop` is asked for, the step is finished, every learner saved, and Interrupted raised.
    """
    stop = stop or Stop()
    bases: dict[object, EvalLoss] = {}
    turns = {learner.name: (learner, _turns(learner, observe, bases)) for learner in learners}
    with contextlib.ExitStack() as while_steps_follow:
        while_steps_follow.enter_context(stop.between_steps())
        while turns:
            if halving:
                halving.decide([learner for learner, _ in turns.values()])
            for learner, turn in [pair for pair in turns.values() if not (halving and halving.waits(pair[0]))]:
                begins(learner)
                failure, has_ended = _advance(learner, turn)
                sound = [other for other, _ in turns.values() if not (failure and other is learner)]
                if stop.signum is not None and sound:
                    _save_and_leave(sound, stop.signum)
                if has_ended:
                    del turns[learner.name]
                    if not turns:
                        while_steps_follow.close()
                    yield learner, failure


def _advance(learner: Learner, turn: Iterator[int]) -> tuple[Exception | None, bool]:
    """One turn of a learner; what it failed of, and whether no turn follows."""
    with logs.about(learner.folder):
        try:
            return None, next(turn, None) is None
        except Exception as error:  # the learner's own: it is handed on, and the others have the base as it was
            return error, True


def _save_and_leave(learners: list[Learner], signum: int) -> NoReturn:
    for learner in learners:
        checkpoint.save(learner)
    first = learners[0]
    raise Interrupted(
        signum,
        f"stopped by {signal.Signals(signum).name} after step {first.step} of {len(first.steps)}; "
        f"go on with: lora-ft train resume={shlex.quote(str(first.folder))}",
    )


def _turns(learner: Learner, observe: Observer, bases: dict[object, EvalLoss]) -> Iterator[int]:
    """Train one learner, giving the base away after every step; yields the number of steps done.

    `bases` holds evaluations of the base, which learners that start as it hand on to each other.
    """
    first = learner.step
    while not learner.is_done:
        _activate(learner)
        metrics = _gradient(learner, audited=learner.step == first)
        if learner.step == 0 and learner.heldout:
            # The adapter is still as it was; so the first step need not wait for seconds of evaluation.
            observe(learner, {"step": 0} | _evaluate(learner, bases if learner.starts_as_base else {}))
        metrics |= _update(learner, metrics)
        if _evaluation_due(learner):
            metrics |= _evaluate(learner, {})
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
    wanted = step == len(learner.steps) or (every is not None and step % every == 0) or step in learner.rungs
    return bool(learner.heldout) and wanted


def _evaluate(learner: Learner, known: dict[object, EvalLoss]) -> Metrics:
    """Held-out loss of the adapter as it is now; the best state so far is kept in memory if it will be wanted.

    What is `known` of the same rows in the same micro-batches is not measured again, and what is measured is added.
    """
    capacity = learner.cfg.train.tokens_per_microbatch or learner.cfg.train.tokens_per_step
    decides = len(learner.heldout), capacity
    if decides not in known:
        known[decides] = eval_loss(learner.base, learner.heldout, learner.paths, capacity)
    heldout = known[decides]
    if not math.isfinite(heldout.loss):
        raise NonFiniteError(f"step {learner.step}: held-out loss {heldout.loss}")
    learner.evaluations.append(Evaluation(learner.step, heldout))
    if learner.cfg.train.keep is config.Keep.best and learner.evaluations_without_gain == 0:
        learner.best_values = learner.flat.values.clone()
    return {"heldout_loss": heldout.loss}
