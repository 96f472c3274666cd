"""Training objectives: an objective makes examples of rows and computes the loss of a batch of them.

To add one, write a module in this folder and add a line to `OBJECTIVES`; `objective.name=NAME` then selects it.

An objective with PEFT's task type SEQ_CLS trains a classifier: a base with a head, `score`, which is trained in full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.classes import HEAD, SEQ_CLS, Classes
from lora_ft.data import classes as found_classes
from lora_ft.data.read import Rows
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError
from lora_ft.objectives.classification import Classification
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths


class Objective(Protocol):
    """Interface of an objective. model_class: class of transformers with the right head. task_type: PEFT's name.

    metrics: names of the metrics of each LossSum.
    """

    model_class: Any
    task_type: str
    metrics: tuple[str, ...]

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> Sequence[Example]:
        """Make examples of rows, in order. Bad rows go into `rows.ledger`.

        Documents that the loss compares have the same `group`, which keeps them adjacent in one micro-batch.
        """
        ...

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the loss of a batch as a sum and its weight; the trainer divides by the total weight of a step."""
        ...


Make = Callable[[config.Objective, Classes | None], Objective]
"""Makes an objective of its settings, and of the classes of a classifier where they are known."""

OBJECTIVES: dict[str, Make] = {"sft": lambda settings, classes: Sft(), "classification": Classification}

Settings = TypeVar("Settings", bound="config.TrainRun")


def find(settings: config.Objective, classes: Classes | None = None) -> Objective:
    """Return the objective that the settings name; `classes` are those of a classifier."""
    if settings.name not in OBJECTIVES:
        raise ConfigError(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {settings.name}")
    return OBJECTIVES[settings.name](settings, classes)


def classifies(settings: config.Objective) -> bool:
    """Return True for an objective that trains a classifier."""
    return find(settings).task_type == SEQ_CLS


def classes_of(settings: config.Objective, rows: Mapping[str, Rows], data: config.Data) -> Classes | None:
    """Return the classes of the training rows of all sources, None for an objective without classes.

    Raises DataError for too few or too many classes, and ConfigError for settings that name no common ones.
    """
    if not classifies(settings):
        return None
    try:
        return found_classes.find(rows, data, is_multi=settings.multi_label)
    except DataError:
        for source in rows.values():
            source.ledger.raise_bad()  # the rows of the missing classes may be among them
        raise


def data_of(settings: config.Objective, data: config.Data) -> config.Data:
    """Return the settings with which rows are read: those of rows with several labels are not checked as one label.

    Raises ConfigError for a stream of rows with classes, which are not known before all rows are read.
    """
    if not classifies(settings):
        return data
    if data.stream:
        raise ConfigError(
            "data.stream=true reads rows only once they are trained on, and objective=classification counts the "
            "classes of all training rows before: set data.stream=false, or train labels as text with objective=sft"
        )
    if not settings.multi_label:
        return data
    sources = {name: {key: own[key] for key in own if key != "labels"} for name, own in data.sources.items()}
    return replace(data, labels=None, sources=sources)


def of_adapter(settings: config.Objective, classes: Classes | None) -> config.Objective:
    """Return the settings of the objective of an adapter with these classes, for one that names no run.

    Raises ConfigError for a classifier's objective and an adapter that is none.
    """
    if classes is None:
        if classifies(settings):
            raise ConfigError(f"objective={settings.name} is for classifiers, and this adapter is none: leave it out")
        return settings
    if classifies(settings):
        return replace(settings, multi_label=classes.is_multi)
    return config.Objective("classification", multi_label=classes.is_multi)


def complete(cfg: Settings) -> Settings:
    """Return the settings with what the objective adds: a classifier's head is trained in full."""
    saved = cfg.adapter.modules_to_save
    if not classifies(cfg.objective) or HEAD in saved:
        return cfg
    return replace(cfg, adapter=replace(cfg.adapter, modules_to_save=[*saved, HEAD]))
