"""Supervised fine-tuning: cross-entropy of the supervised tokens, each of the same weight."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_ft import config
from lora_ft.data import dataset
from lora_ft.data.read import Rows
from lora_ft.data.rows import Example
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths, token_loss_sum


class Sft:
    """The objective `sft`."""

    model_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> list[Example]:
        """Return the documents of rows, rendered and tokenized; each stands alone."""
        return dataset.tokenized(rows, tokenizer, data)

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the cross-entropies of a batch, to be divided by the supervised tokens of the step."""
        return LossSum(token_loss_sum(model, batch, paths), sum(batch.counts))
