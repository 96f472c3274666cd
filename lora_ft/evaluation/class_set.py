"""The labelled rows of an eval set, and the function that gives a model's probabilities of the labels.

    classes = label_set(prompts, ["negative", "positive"], tokenizer, data, paths, 1024)
    metrics(classes.predict(model))                 {"accuracy": 0.91, "macro_f1": 0.9, ...}

The metrics (evaluation/classification.py) see probabilities only: those of label words here, those of a classifier's
head elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lora_ft import config, metric_table, mixing
from lora_ft.data import label_prompts
from lora_ft.data.dataset import EvalPrompt
from lora_ft.data.rows import excerpt
from lora_ft.errors import DataError
from lora_ft.evaluation.classification import Floats, Predictions
from lora_ft.evaluation.label_scores import LabelScorer
from lora_ft.metric_table import Source
from lora_ft.ops.token_loss import Paths


@dataclass(frozen=True)
class ClassSet:
    """Rows with labels: `references` as in `Predictions`; probabilities: function of a model, [rows, labels]."""

    labels: Sequence[str]
    references: NDArray[np.int64] | NDArray[np.bool_]
    probabilities: Callable[[PreTrainedModel], Floats]

    def predict(self, model: PreTrainedModel) -> Predictions:
        return Predictions(self.labels, self.probabilities(model), self.references)


def label_set(
    prompts: Sequence[EvalPrompt],
    labels: Sequence[str],
    tokenizer: Any,
    data: config.Data,
    paths: Paths,
    tokens_per_batch: int,
) -> ClassSet:
    """Return prompts whose answers are labels, scored as the model's own words; `check` has found no problem."""
    made: dict[int, label_prompts.LabelPrompt] = {}
    for name, source in mixing.named(data).items():
        own = {index: prompt for index, prompt in enumerate(prompts) if prompt.part == name}
        rows, ids = [prompt.row for prompt in own.values()], [prompt.prompt_ids for prompt in own.values()]
        made |= zip(own, label_prompts.make(rows, ids, labels, tokenizer, source), strict=True)
    scorer = LabelScorer([made[index] for index in range(len(prompts))], paths, tokens_per_batch)
    references = np.array([labels.index(prompt.answer) for prompt in prompts])
    return ClassSet(labels, references, scorer.probabilities)


def labelled(prompts: Sequence[EvalPrompt], data: config.Data) -> list[EvalPrompt]:
    """Return the prompts of the sources with data.labels, or all prompts if no source has any."""
    names = {name for name, source in mixing.named(data).items() if source.labels is not None}
    return [prompt for prompt in prompts if prompt.part in names] if names else list(prompts)


def check(names: Sequence[str], prompts: Sequence[EvalPrompt], labels: Sequence[str] | None, key: str) -> None:
    """Raise DataError for metrics `names` of the setting `key` that eval rows with these prompts cannot have."""
    if names and not prompts:
        raise DataError(
            f"{key}={','.join(names)} needs rows with prompts and answers, but the eval rows are plain text"
        )
    of_classes = metric_table.of(Source.classes, names)
    if not of_classes:
        return
    wanted = f"{key}: {', '.join(of_classes)} needs labels"
    if labels is None or len(labels) < 2:
        found = "too many distinct answers for that" if labels is None else f"one answer only, {excerpt(labels[0])}"
        others = ", ".join(metric_table.of(Source.answers, list(metric_table.METRICS)))
        raise DataError(f"{wanted}, and the training rows have {found}: set data.labels, or use {others}")
    for prompt in prompts:
        if prompt.answer not in labels:
            raise DataError(
                f"{wanted}, and {prompt.source} has the answer {excerpt(prompt.answer)}, which no training row has: "
                "data.labels can name all labels"
            )
    right = {prompt.answer for prompt in prompts}
    if "auroc" in names and (len(labels) != 2 or len(right) != 2):
        reason = f"there are {len(labels)}" if len(labels) != 2 else f"all eval rows have the label {min(right)}"
        raise DataError(f"{key}: auroc needs rows of two labels, and {reason}")
