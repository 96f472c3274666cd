"""Classification by a linear head on the last token of a text: cross-entropy of one label, or of each of several.

    text  ->  ids as tokenizer(text) gives them  ->  hidden state of the last token  ->  score  ->  a logit per class

The text is plain: no chat template, no end token. So transformers' pipelines and servers, which call the tokenizer with
the text alone, give the model the ids that it was trained on. An end token would often be the padding token as well,
which transformers' classifiers pass over when they look for the last token.

The loss of a step is divided by its examples, whatever the weights of their classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lora_ft import config
from lora_ft.classes import SEQ_CLS, Classes
from lora_ft.data import classes as found_classes
from lora_ft.data.columns import Writer
from lora_ft.data.examples import Examples, columns_of
from lora_ft.data.read import Rows
from lora_ft.data.rows import Example, Ledger, Row, RowError
from lora_ft.data.table import text_alone
from lora_ft.data.tokenize import Vocabulary
from lora_ft.errors import ConfigError
from lora_ft.models import heads
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.class_logits import class_logits, class_targets, first_targets
from lora_ft.ops.device import copied
from lora_ft.ops.token_loss import Paths
from lora_ft.values import TooLong


class Classification:
    """The objective `classification`. classes: those of the model; None until the training rows are read."""

    model_class = AutoModelForSequenceClassification
    task_type = SEQ_CLS
    metrics: tuple[str, ...] = ("accuracy",)

    def __init__(self, settings: config.Objective, classes: Classes | None = None) -> None:
        self.settings, self.classes = settings, classes
        found = classes.weights(settings.class_weights, balanced=settings.balanced) if classes else None
        self._weights = None if found is None else torch.tensor(found)

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> Examples:
        """Return a document for each row: the ids of its text, then the number of each of its classes.

        A row without a class has the number after the last one. Bad rows go into `rows.ledger`.
        """
        _check(data)
        classes = self.classes or found_classes.find({"": rows}, data, is_multi=self.settings.multi_label)
        heads.pad_token(tokenizer)
        if len(classes.names) >= len(tokenizer):  # the number of a class is an id of its document
            count = len(classes.names)
            raise ConfigError(f"{count:,} classes are too many for a vocabulary of {len(tokenizer):,} tokens")
        writer, vocabulary = Writer(), Vocabulary(tokenizer)
        writer.append(**columns_of([]))
        read = _Reader(classes, data, rows.ledger)
        for chunk in rows.rows.chunks():
            found = [(index, row, read(row)) for index, row in enumerate(chunk.rows(), chunk.first)]
            good = [(index, row, *parts) for index, row, parts in found if parts]
            ids = encoded([text for _, _, text, _ in good], vocabulary)
            made = [
                _example(row, index, own, numbers, tokenizer, rows.ledger)
                for own, (index, row, _, numbers) in zip(ids, good, strict=True)
            ]
            writer.append(**columns_of(made))
        return Examples(writer.finish(), rows.rows.sources)

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the sum of the losses of a batch's documents, with their number as its weight."""
        return self.loss_of(class_logits(model, batch, paths), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> LossSum:
        """Return the loss of logits [documents, classes]. metrics: the number of documents whose classes are right."""
        smoothing = self.settings.label_smoothing
        weights = None if self._weights is None else copied(self._weights, logits.device).to(logits.dtype)
        if self.settings.multi_label:
            targets = class_targets(batch, logits.shape[1]).to(logits.dtype)
            smoothed = targets * (1 - smoothing) + smoothing / 2
            losses = binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weights, reduction="none")
            right = ((logits > 0) == (targets > 0)).all(dim=1)
            loss = losses.mean(dim=1).sum()
        else:
            target = first_targets(batch)
            loss = cross_entropy(logits, target, weight=weights, label_smoothing=smoothing, reduction="sum")
            right = logits.argmax(dim=1) == target
        return LossSum(loss, len(batch.counts), {"accuracy": right.to(logits.dtype).sum()})


def encoded(texts: list[str], vocabulary: Vocabulary) -> list[list[int]]:
    """Return the ids of texts as `tokenizer(text)` gives them, special tokens included."""
    backend = vocabulary.tokenizer.backend_tokenizer  # without truncation and padding
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=True)]


class _Reader:
    """Reads the text of a row and the numbers of its classes; a bad row goes into the ledger, and gives None."""

    def __init__(self, classes: Classes, data: config.Data, ledger: Ledger) -> None:
        self._classes, self._data, self._ledger = classes, data, ledger

    def __call__(self, row: Row) -> tuple[str, list[int]] | None:
        classes = self._classes
        try:
            names = found_classes.labels_of(row, is_multi=classes.is_multi)
            numbers = [found_classes.index_of(name, classes) for name in names] or [len(classes.names)]
            return _text(row, self._data), numbers
        except RowError as error:
            if self._data.labels is None or error.name != "label":  # which reading has reported
                self._ledger.add_bad(row.source, error.name, error.reason, error.shown or row.answer)
            return None


def _check(data: config.Data) -> None:
    """Raise ConfigError for settings of the rows that a head cannot follow."""
    if data.system is not None:
        raise ConfigError("data.system: objective=classification reads the text alone, without a system message")
    if data.too_long is TooLong.split:
        raise ConfigError("data.too_long=split: a part of a text has no label of its own: set drop or truncate_prompt")


def _text(row: Row, data: config.Data) -> str:
    """Return the text of a row, without the words of data.prompt around it; raises RowError for another row."""
    roles = [message["role"] for message in row.messages]
    if roles != ["user", "assistant"]:
        shape = f"a chat of {len(roles)} messages" if roles else "plain text without a label"
        raise RowError(
            "row", f"must be a text and its label (data=classify: columns text and label), and is {shape}", row.answer
        )
    return text_alone(str(row.messages[0]["content"]), data.prompt)


def _example(row: Row, index: int, ids: list[int], numbers: list[int], tokenizer: Any, ledger: Ledger) -> Example:
    text = row.messages[0]["content"]
    if not ids:
        ledger.add_bad(row.source, "text", "gives no token", text)
    elif ids[-1] == tokenizer.pad_token_id:
        reason = f"ends with the padding token {tokenizer.pad_token}, which classifiers pass over"
        ledger.add_bad(row.source, "text", reason, text)
    supervised = np.arange(len(ids) + len(numbers)) >= len(ids)
    document = np.array([*ids, *numbers], dtype=np.int32)
    return Example(document, supervised, row.source, index, prompt_end=len(ids), answer_start=len(ids))
