"""Training states on tiny models and random rows, for any family and dtype, made by `attached`.

state = state_on(tiny_model("llama", dtype=torch.float64), tmp_path, train=config.Train(max_steps=8))
adapter = trained(state)                 # the final adapter as one vector; state.losses has a loss per step
detach(state)                            # removes the adapter from the base
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tiny import VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.data.dataset import Dataset, EvalPrompts
from lora_ft.data.examples import Examples
from lora_ft.data.rows import Example
from lora_ft.memory import auto
from lora_ft.models.acceleration import accelerate
from lora_ft.models.load import Base, Identity
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.training.callbacks import Callback
from lora_ft.training.state import TrainingState, attached
from lora_ft.training.trainer import fit

IDENTITY = Identity(id="tiny", path="tiny", folder=None, revision=None, config_sha256="c", weights_sha256=None)
SETTINGS = {
    "adapter": config.Adapter(r=4, lora_alpha=8),
    "train": config.Train(epochs=100, max_steps=50, tokens_per_step=60),
    "optim": config.Optim(
        lr=1e-3, weight_decay=0.01, schedule=config.Schedule.cosine, warmup_steps=5, max_grad_norm=0.5
    ),
}


def some_rows(num_rows: int = 12, seed: int = 0, longest: int = 30) -> list[Example]:
    """Return rows of random ids and lengths, 60 % of whose tokens after the first two are supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        length = int(generator.integers(4, longest))
        supervised = generator.random(length) < 0.6
        supervised[:2], supervised[-1] = False, True
        ids = generator.integers(4, VOCABULARY, length).astype(np.int32)
        rows.append(Example(ids=ids, supervised=supervised, source=f"rows:{number + 1}"))
    return rows


class Report:  # the only field of a dataset's report that training reads
    sha256 = "d"


OFF = config.Fast(**{field.name: False for field in dataclasses.fields(config.Fast)})


def state_on(
    model: PreTrainedModel,
    folder: Path,
    *,
    examples: list[Example] | None = None,
    eval_examples: list[Example] | None = None,
    fast: bool = True,
    settle: bool = True,
    classes: Classes | None = None,
    ranks: Ranks = ALONE,
    **settings: object,
) -> TrainingState:
    """Attach an adapter to a model and return the training state; the adapter stays until `detach`."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config.TrainRun(**{**SETTINGS, **settings}, fast=config.Fast() if fast else OFF)
    switch_off_dropout(model)
    base = Base(model=model.requires_grad_(False), tokenizer=tiny_tokenizer(), identity=IDENTITY, quantized=())
    dataset = Dataset(
        train=Examples.of(some_rows() if examples is None else examples),
        eval=Examples.of(eval_examples or []),
        eval_prompts=EvalPrompts(Examples.of([]), [], np.zeros(0, np.bool_)),
        answers=None,
        report=Report(),
        classes=classes,
    )
    context = attached(cfg, folder, base, dataset, accelerate(model, cfg.fast).paths, "f", ranks)
    state = context.__enter__()
    if settle:
        auto.settle(state)
    state.context = context  # keeps the adapter attached after this function returns
    return state


def detach(state: TrainingState) -> None:
    state.context.__exit__(None, None, None)


class Observer(Callback):
    """Collects the metrics of each step and calls `then(state, metrics)`."""

    def __init__(self, then: Callable[[TrainingState, dict], object] = lambda *_: None) -> None:
        self.seen: list[dict] = []
        self._then = then

    def on_step(self, state: TrainingState, metrics: dict) -> None:
        self.seen.append(metrics)
        self._then(state, metrics)

    def on_evaluate(self, state: TrainingState, metrics: dict) -> None:
        if metrics["step"] == 0:
            self.on_step(state, metrics)


def trained(state: TrainingState, until: int | None = None) -> Tensor:
    """Train to the end or to step `until`; return the adapter as one vector, sorted by parameter name."""
    fit(state, until=until)
    return torch.cat([p.detach().flatten() for _, p in sorted(state.parameters.items())])
