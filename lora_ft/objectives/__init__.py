"""Training objectives: an objective makes examples of rows and computes the loss of a batch of them.

To add one, write a module in this folder and add a line to `OBJECTIVES`; `objective.name=NAME` then selects it.
"""

from collections.abc import Sequence
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
    """Interface of an objective. model_class: class of transformers with the right head. task_type: PEFT's name."""

    model_class: Any
    task_type: str

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> Sequence[Example]:
        """Make examples of rows, in order. Bad rows go into `rows.ledger`.

        Documents that the loss compares have the same `group`, which keeps them adjacent in one micro-batch.
        """
        ...

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the loss of a batch as a sum and its weight; the trainer divides by the total weight of a step."""
        ...


OBJECTIVES: dict[str, Objective] = {"sft": Sft()}


def find(settings: config.Objective) -> Objective:
    """Return the objective that the settings name."""
    if settings.name not in OBJECTIVES:
        raise ConfigError(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {settings.name}")
    return OBJECTIVES[settings.name]
