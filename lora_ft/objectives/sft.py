"""Supervised fine-tuning: cross-entropy of the supervised tokens, all with the same weight."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_ft import config
from lora_ft.data import dataset
from lora_ft.data.examples import Examples
from lora_ft.data.read import Rows
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths, token_loss_sum


class Sft:
    """The objective `sft`."""

    model_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"

    def examples(self, rows: Rows, tokenizer: Any, data: config.Data) -> Examples:
        """Return the rendered and tokenized documents of rows, without groups."""
        return dataset.tokenized(rows, tokenizer, data)

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the sum of cross-entropies of a batch, with the number of supervised tokens as its weight."""
        return LossSum(token_loss_sum(model, batch, paths), sum(batch.counts))
