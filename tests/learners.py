"""Learners over tiny models and random rows, as `make_learner` makes them: any family, any dtype, float64 too.

learner = learner_on(tiny_model("llama", dtype=torch.float64), tmp_path, train=config.Train(max_steps=8))
adapter = trained(learner)               # its final values, one vector; learner.losses has a loss a step
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tiny import VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.data.dataset import Dataset
from lora_ft.data.rows import TokenRow
from lora_ft.models.load import Base, Identity
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.token_loss import choose_paths
from lora_ft.training.paths import use_fast_paths
from lora_ft.training.state import Learner, make_learner
from lora_ft.training.trainer import fit

IDENTITY = Identity(id="tiny", path="tiny", folder=None, revision=None, config_sha256="c", weights_sha256=None)
SETTINGS = {
    "adapter": config.Adapter(r=4, alpha=8),
    "train": config.Train(epochs=100, max_steps=50, tokens_per_step=60),
    "optim": config.Optim(lr=1e-3, weight_decay=0.01, schedule=config.Schedule.cosine, warmup_steps=5, clip=0.5),
}


def some_rows(num_rows: int = 12, seed: int = 0, longest: int = 30) -> list[TokenRow]:
    """Rows of random ids and lengths; about half of the tokens after a prompt are supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        length = int(generator.integers(4, longest))
        supervised = generator.random(length) < 0.6
        supervised[:2], supervised[-1] = False, True
        ids = generator.integers(4, VOCABULARY, length).astype(np.int32)
        rows.append(TokenRow(ids=ids, supervised=supervised, place=f"rows:{number + 1}"))
    return rows


class Report:
    sha256 = "d"


OFF = config.Fast(**{field.name: False for field in dataclasses.fields(config.Fast)})


def learner_on(
    model: PreTrainedModel,
    folder: Path,
    *,
    rows: list[TokenRow] | None = None,
    heldout: list[TokenRow] | None = None,
    fast: bool = True,
    name: str = "first",
    onto: object = None,
    **settings: object,
) -> Learner:
    cfg = config.TrainRun(**{**SETTINGS, **settings}, fast=config.Fast() if fast else OFF)
    if onto is None:
        switch_off_dropout(model)
    base = Base(model=model.requires_grad_(False), tokenizer=tiny_tokenizer(), identity=IDENTITY, quantized=())
    dataset = Dataset(
        train=some_rows() if rows is None else rows, heldout=heldout or [], questions=[], answers=None, report=Report()
    )
    paths = use_fast_paths(model, cfg.fast) if onto is None else choose_paths(model, cfg.fast)
    return make_learner(name, cfg, folder, base, onto or model, dataset, paths, "f")


def trained(learner: Learner) -> Tensor:
    """Train to the end; the adapter as one vector, in the order of its names."""
    fit([learner], lambda *_: None)
    return torch.cat([p.detach().flatten() for _, p in sorted(learner.parameters.items())])
