"""The training state of one adapter: parameters, optimizer, planned steps, losses, evaluations, best values.

with attached(cfg, folder, base, dataset, ...) as state:     adapter on the base, before its first step
    checkpoint.resume(state)                                 restored from its newest checkpoint, if any
    trainer.fit(state)
# the adapter is detached; the base is unchanged
"""

import contextlib
import gc
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config, metric_table, objectives, validation
from lora_ft.adapters import attach, audit, files, init, peft_folder, provenance
from lora_ft.data import labels
from lora_ft.data.dataset import Dataset, EvalPrompt
from lora_ft.data.examples import Examples
from lora_ft.data.groups import grouped
from lora_ft.data.mixed_dataset import Mix, mix_of, sources_of
from lora_ft.data.packing import largest_micro_batch, longest_group
from lora_ft.data.rows import Example
from lora_ft.data.sampler import MixedOrder, derive, epoch_order
from lora_ft.data.steps import Steps
from lora_ft.data.streamed import Stream
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.metric_table import LOSS
from lora_ft.models.acceleration import accelerated_lora
from lora_ft.models.load import Base
from lora_ft.objectives import Objective
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.ops.token_loss import Paths
from lora_ft.training import limits, loss_scale, optimizers
from lora_ft.training.step import Step
from lora_ft.training.task_metrics import TaskMetrics, task_metrics

log = logging.getLogger("lora_ft")

NAME = "default"  # PEFT's name of the adapter


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation after `step` optimizer steps; `result.metrics` has the metrics of train.eval_metrics."""

    step: int
    result: EvalLoss

    def value(self, metric: str) -> float:
        """Return a metric by its name, the loss included."""
        return self.result.loss if metric == LOSS else self.result.metrics[metric]

    def cost(self, metric: str) -> float:
        """Return a number that is lower for a better evaluation."""
        return metric_table.cost(metric, self.value(metric))


@dataclass
class TrainingState:
    """State of one adapter's training; `steps` lists the examples of every optimizer step by index.

    inputs: hashes of the settings, the data, the base and the adapter's shapes. start, best_values: copies on the CPU
    of the first values, and of those of the best evaluation with train.keep=best. loss_scale: None unless the base
    computes in float16. gradient_checkpointing, tokens_per_microbatch: those of the settings, where memory/auto.py
    replaces auto; tokens_per_microbatch is None until then. unread: steps done whose values are still on the device.
    shrinks: how often an out-of-memory error has halved tokens_per_microbatch. predicted_peak_bytes: None if the run
    was not traced. stream: the training rows if they are streamed; `examples` are then those of its first block, and
    `steps` those of a run on them. A checkpoint stores the optimizer, `flat.values`, the loss scale,
    tokens_per_microbatch, the position of the stream and the fields with a default but the second and the last; no step
    is unread then.
    """

    cfg: config.TrainRun
    folder: Path
    model: PeftModel
    paths: Paths
    objective: Objective
    examples: Examples
    eval_examples: Examples
    eval_prompts: list[EvalPrompt]
    eval_sources: dict[str, range]
    mix: Mix | None
    task: TaskMetrics
    steps: Sequence[NDArray[np.int64]]
    parameters: dict[str, nn.Parameter]
    start: dict[str, Tensor]
    gradient_checkpointing: str
    tokens_per_microbatch: int | None
    flat: optimizers.Flat
    optimizer: torch.optim.Optimizer
    num_trainable: int
    inputs: dict[str, str]
    loss_scale: loss_scale.LossScale | None
    ranks: Ranks = ALONE
    stream: Stream | None = None
    unread: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_values: Tensor | None = None
    tokens: int = 0
    seconds: float = 0.0
    stopped_by: str | None = None
    shrinks: int = 0
    predicted_peak_bytes: int | None = None

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses) + len(self.unread)

    @property
    def is_done(self) -> bool:
        """True after the last step, when `train.patience` is exhausted, or when a stop was requested."""
        is_stopped = self.stopped_by is not None and self.step > 0
        return self.step == len(self.steps) or self._out_of_patience or is_stopped

    def documents(self) -> list[Example]:
        """Return the examples of the next step."""
        if self.stream:
            return self.stream.step(self.step)
        return [self.examples[i] for i in self.steps[self.step]]

    def values_hash(self) -> str:
        """Return the hash of the current values of the trained parameters."""
        return xxhash.xxh3_128(self.flat.values.detach().cpu().numpy()).hexdigest()

    @property
    def longest(self) -> int:
        """Number of tokens that a micro-batch must be able to hold: those of the longest group of training examples."""
        return longest(self.cfg, self.examples)

    def request_stop(self, reason: str) -> None:
        """End the run after the current step (or the first); `stopped_by` in result.json is the reason."""
        self.stopped_by = self.stopped_by or reason

    def agree_to_stop(self) -> None:
        """Take over a stop that a callback has requested: only the main rank has callbacks."""
        if self.ranks.any(self.stopped_by is not None):
            self.stopped_by = self.ranks.agreed(self.stopped_by)

    @property
    def stopped_early(self) -> bool:
        """True if the run ended before its planned steps."""
        return self.is_done and self.step < len(self.steps)

    def take_kept_state(self) -> None:
        """Set the adapter to the state that `train.keep` selects. Call it after the last step."""
        if self.best_values is not None:
            self.flat.values.copy_(self.best_values)

    @property
    def _out_of_patience(self) -> bool:
        patience = self.cfg.train.patience
        return patience is not None and self.evaluations_without_gain >= patience

    @property
    def packs(self) -> bool:
        """True if a micro-batch has several rows."""
        return self.cfg.train.packing and self.paths.share_a_pass

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model with the adapter layers inside."""
        base: PreTrainedModel = self.model.get_base_model()
        return base

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation by train.best_metric, the first of equals."""
        return min(self.evaluations, key=lambda e: e.cost(self.cfg.train.best_metric), default=None)

    @property
    def evaluations_without_gain(self) -> int:
        """Number of evaluations since the best one."""
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) if self.best else 0

    @property
    def starts_as_base(self) -> bool:
        """True if the model equals its base, bit for bit, before the first step."""
        if objectives.classifies(self.cfg.objective):  # the base has no head of its own
            return False
        adapter = self.cfg.adapter
        trains_more = adapter.use_dora or adapter.modules_to_save or self.cfg.model.added_tokens
        return not (trains_more or adapter.init_from or init.find(adapter.init).changes_base)

    @property
    def measured(self) -> tuple[EvalLoss | None, EvalLoss | None]:
        """Eval losses of the base and of the kept state; None if not evaluated."""
        first, last = self.evaluations[:1], self.evaluations[-1:]
        kept = [self.best] if self.cfg.train.keep is config.Keep.best else last
        base = next((e.result for e in first if e.step == 0 and self.starts_as_base), None)
        is_best = self.cfg.train.keep is config.Keep.best  # then the adapter has the values of the best evaluation
        return base, next((e.result for e in kept if e and (is_best or e.step == self.step)), None)


@contextlib.contextmanager
def attached(
    cfg: config.TrainRun,
    folder: Path,
    base: Base,
    dataset: Dataset,
    paths: Paths,
    base_fingerprint: str,
    ranks: Ranks = ALONE,
) -> Iterator[TrainingState]:
    """Attach an adapter to the base and yield its training state; detach it when the block ends, also after an error.

    Raises MismatchError if `adapter.init_from` does not fit this base or this adapter's shape.
    """
    stream = _stream(cfg, base.tokenizer, dataset)
    try:
        model = _attach(cfg, base, dataset)
        with accelerated_lora(model, NAME, cfg.fast) as reasons:
            for reason in reasons:
                log.info(reason)
            state = new_state(cfg, folder, model, dataset, paths, base_fingerprint, base.tokenizer, ranks)
            state.stream = stream
            yield state
    finally:
        if stream:
            stream.close()
        attach.detach(base.model)
        # The modules of an adapter form reference cycles, which only the garbage collector frees.
        gc.collect()


def _stream(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> Stream | None:
    if dataset.eval_rows is None:
        return None
    make_examples, tokens = objectives.find(cfg.objective).examples, cfg.train.tokens_per_step
    data = labels.of_stream(cfg.data, dataset.answers)
    return Stream(data, tokenizer, make_examples, cfg.seed, tokens, dataset.eval_rows)


def _attach(cfg: config.TrainRun, base: Base, dataset: Dataset) -> PeftModel:
    limits.check_added_tokens(cfg.model, base.tokenizer, dataset.train)
    token_ids = base.tokenizer.convert_tokens_to_ids(list(cfg.model.added_tokens))
    model = attach.attach(
        base.model,
        objectives.complete(cfg).adapter,
        NAME,
        derive(cfg.seed, "adapter"),
        token_ids,
        objectives.find(cfg.objective).task_type,
    )
    init.find(cfg.adapter.init).apply(model, NAME, dataset.train)
    if cfg.adapter.init_from:
        source = Path(cfg.adapter.init_from)
        provenance.check_source(source, peft_folder.read_config(source), base, cfg.quant)
        peft_folder.check_same_method(source, model.peft_config[NAME])
        files.load_tensors(model, source, NAME)
    return model


def new_state(
    cfg: config.TrainRun,
    folder: Path,
    model: PeftModel,
    dataset: Dataset,
    paths: Paths,
    base_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ranks: Ranks = ALONE,
) -> TrainingState:
    """Return the training state, before the first step, of an adapter that is attached."""
    eval_examples, eval_prompts, eval_sources = choose_eval(dataset, cfg.train.eval_rows)
    mix = mix_of(dataset, cfg.data)
    steps = plan_steps(dataset.train, cfg.train, cfg.seed, mix)
    limits.check_lengths(dataset.train, eval_examples, model.get_base_model(), cfg)
    limits.check_warmup(cfg.optim, len(steps))
    parameters = attach.trainable(model, NAME)
    num_trainable = audit.check_trainable(model, NAME, parameters)
    flat = optimizers.flatten(parameters)
    return TrainingState(
        cfg=cfg,
        folder=folder,
        model=model,
        paths=paths,
        objective=objectives.find(cfg.objective, dataset.classes),
        examples=dataset.train,
        eval_examples=eval_examples,
        eval_prompts=eval_prompts,
        eval_sources=eval_sources,
        mix=mix,
        task=task_metrics(cfg, dataset, eval_examples, eval_prompts, tokenizer, paths),
        steps=steps,
        parameters=parameters,
        start={n: p.detach().to("cpu", copy=True) for n, p in parameters.items()},
        flat=flat,
        optimizer=optimizers.build(flat, cfg.optim),
        num_trainable=num_trainable,
        inputs={
            "settings": _sha256(validation.lasting(cfg)),
            "data": dataset.report.sha256,
            "base": base_fingerprint,
            "adapter": _sha256([[n.replace(f".{NAME}", ""), list(p.shape)] for n, p in parameters.items()]),
        },
        loss_scale=_loss_scale(model, paths, dataset.train, steps, cfg),
        gradient_checkpointing=cfg.train.gradient_checkpointing,
        tokens_per_microbatch=_tokens_per_microbatch(cfg, dataset.train, ranks),
        ranks=ranks,
    )


def share_of_step(cfg: config.TrainRun, examples: Sequence[Example], ranks: Ranks) -> int | None:
    """Return the tokens of a micro-batch of which a full step has one for each rank; None in one process."""
    if ranks.world_size == 1:
        return None
    return max(longest(cfg, examples), -(-cfg.train.tokens_per_step // ranks.world_size))


def _tokens_per_microbatch(cfg: config.TrainRun, examples: Sequence[Example], ranks: Ranks) -> int | None:
    if cfg.train.tokens_per_microbatch is None:
        return share_of_step(cfg, examples, ranks)
    return cfg.train.microbatch_limit


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _loss_scale(
    model: PeftModel, paths: Paths, examples: Examples, steps: Steps, cfg: config.TrainRun
) -> loss_scale.LossScale | None:
    """Return the loss scale of a base that computes in float16, None for other bases, which need none."""
    dtypes = {p.dtype for p in model.parameters()}
    dtypes |= {getattr(module, "compute_dtype", None) for module in model.modules()}  # of quantized layers
    if torch.float16 not in dtypes:
        return None
    packs, limit = cfg.train.packing and paths.share_a_pass, cfg.train.microbatch_limit
    if cfg.data.stream:
        return loss_scale.for_tokens(limit or max(cfg.train.tokens_per_step, cfg.data.max_length))
    return loss_scale.for_tokens(sum(largest_micro_batch(examples, steps, limit, packs)))


def longest(cfg: config.TrainRun, examples: Sequence[Example]) -> int:
    """Return the number of tokens of the longest group, in a stream of the longest that may come."""
    found = longest_group(examples)
    return max(found, cfg.data.max_length) if cfg.data.stream else found


class EvalChoice(NamedTuple):
    """Eval examples, the prompts of their rows, and the indices of the examples of each source, if there are any."""

    examples: Examples
    prompts: list[EvalPrompt]
    sources: dict[str, range]


def choose_eval(dataset: Dataset, number: int) -> EvalChoice:
    """Choose `number` groups of eval examples of each source, and the prompts of their rows.

    The choice does not depend on `seed`: runs that differ in their seed are compared on the same examples.
    """
    chosen, sources, count = [np.zeros(0, np.int64)], dict[str, range](), 0
    for name, part in dataset.named_parts.items():
        groups = grouped(dataset.eval[part.eval.start : part.eval.stop])
        chosen.append(groups.members_of(epoch_order(len(groups), 0, 0)[:number]) + part.eval.start)
        if len(chosen[-1]):
            sources[name] = range(count, count := count + len(chosen[-1]))
    examples = dataset.eval.select(np.concatenate(chosen))
    return EvalChoice(examples, dataset.eval_prompts.of_rows(examples.rows), sources if dataset.parts else {})


def plan_steps(examples: Sequence[Example], train: config.Train, seed: int, mix: Mix | None = None) -> Steps:
    """Plan the optimizer steps of a run, each as indices of examples, as a pure function of its arguments.

    The examples of a group are in one step.
    """
    groups = grouped(examples)
    epochs = train.epochs if train.max_steps is None else None
    order = None
    if mix:
        # More tokens than all steps together can have: the rest of a long epoch is not planned.
        longest_step = max(train.tokens_per_step, int(groups.lengths.max()))
        most_tokens = train.max_steps * longest_step if train.max_steps else None
        order = MixedOrder(sources_of(Examples.of(examples), groups, mix), mix.until, seed, most_tokens)
    return Steps(groups, train.tokens_per_step, seed, epochs, train.max_steps, order)
