"""Supervised fine-tuning: cross-entropy of the supervised tokens, with the weights of their messages."""

from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_ft.data import dataset
from lora_ft.ops.batch import Batch, LossSum
from lora_ft.ops.token_loss import Paths, token_loss_sum


class Sft:
    """The objective `sft`."""

    model_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"
    metrics: tuple[str, ...] = ()

    # Rendered and tokenized documents without groups. The function itself, which processes import without torch.
    examples = staticmethod(dataset.tokenized)

    def loss(self, model: PreTrainedModel, batch: Batch, paths: Paths) -> LossSum:
        """Return the weighted sum of cross-entropies of a batch, and the sum of the weights."""
        return LossSum(token_loss_sum(model, batch, paths), batch.weight)
