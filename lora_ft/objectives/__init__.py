"""Objectives: what an adapter is trained for. An objective makes examples of rows, and the loss of a batch of them.

A new objective is a module of this folder and a line in `OBJECTIVES`; `objective=NAME` then chooses it.
"""

from typing import Any, Protocol

from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.data.read import Rows
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths


class Objective(Protocol):
    """The interface of an objective. model_class: of transformers, with its head. task_type: of PEFT."""

    model_class: Any
    task_type: str

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> list[Example]:
        """Make examples of rows, in the order of the rows; a fault of a row goes into `rows.ledger`.

        Documents that the loss compares have the same `group`: they stay in one micro-batch, next to each other.
        """
        ...

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the loss of a batch as a sum with its weight; the trainer divides by the weight of a whole step."""
        ...


OBJECTIVES: dict[str, Objective] = {"sft": Sft()}


def find(settings: config.Objective) -> Objective:
    """Return the objective that the settings name."""
    if settings.name not in OBJECTIVES:
        raise ConfigError(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {settings.name}")
    return OBJECTIVES[settings.name]
