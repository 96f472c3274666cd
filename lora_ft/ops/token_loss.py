"""From packed tokens to sums of their losses, of a whole batch or of each document: how objectives call a model.

    ids [T] -> body (attention within documents) -> hidden [T, E] -> supervised rows [N, E] -> head -> sums of losses

The plain path runs the model's own forward over a dense mask and takes the loss of all logits. The fast
paths are chosen once for a model (models/acceleration.py), each exact and each switchable (`fast.*`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lora_ft.ops.batch import IGNORED, Batch
from lora_ft.ops.cross_entropy import at_least_float32, linear_cross_entropy, linear_cross_entropy_plain


@dataclass(frozen=True)
class Paths:
    """The paths chosen for a model.

    packs: documents may share a forward pass. Some families let them see each other there, and so get one at a time.
    passes_starts: the model's attention is ops/attention.py, which takes the boundaries of the documents.
    supervised_rows_only: the loss takes head and cross-entropy of the supervised positions only.
    longest_shared: documents of a batch with a longer one do not share a forward pass; None for no limit.
    """

    packs: bool
    passes_starts: bool
    supervised_rows_only: bool
    longest_shared: int | None = None

    def share(self, batch: Batch) -> bool:
        """Return whether the documents of a batch may share a forward pass."""
        longest = max(end - start for start, end in pairwise(batch.starts))
        return self.packs and (self.longest_shared is None or longest <= self.longest_shared)


PLAIN_PATHS = Paths(packs=False, passes_starts=False, supervised_rows_only=False)


def token_loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Sum of the cross-entropies of the supervised positions of a batch; a scalar in fp32 (or float64).

    `model` is the transformers model, with or without adapter layers inside.
    """
    if len(batch.counts) > 1 and not paths.share(batch):
        return document_loss_sums(model, batch, paths).sum()
    (total,) = _loss_sums(model, batch, paths, [sum(batch.counts)], [0, len(batch.ids)])
    return total


def document_loss_sums(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """The same sum for each document of the batch; [documents]. They share a forward pass if `paths` let them."""
    if not paths.share(batch):
        return torch.stack([token_loss_sum(model, document, paths) for document in batch.documents()])
    return torch.stack(_loss_sums(model, batch, paths, batch.counts, batch.starts))


def _loss_sums(
    model: PreTrainedModel, batch: Batch, paths: Paths, counts: list[int], starts: list[int]
) -> list[Tensor]:
    """Loss sums of consecutive parts of a batch, given the supervised positions and the boundaries of each part."""
    inputs = {"input_ids": batch.ids[None], "use_cache": False}
    if paths.packs:  # the positions of a document alone are the model's own, and some models take no others
        inputs["position_ids"] = batch.positions[None]
    if paths.passes_starts:
        inputs["document_starts"] = batch.starts
    if not paths.supervised_rows_only:
        logits = at_least_float32(model(**inputs).logits[0])
        return [
            cross_entropy(logits[start:end], batch.targets[start:end], ignore_index=IGNORED, reduction="sum")
            for start, end in pairwise(starts)
        ]
    hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state[0][batch.supervised]
    parts = zip(hidden.split(counts), batch.targets[batch.supervised].split(counts), strict=True)
    return [_head_loss(model.get_output_embeddings(), rows, targets) for rows, targets in parts]


def _head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    if getattr(head, "disable_adapters", False):
        # A wrapped head with its adapter off is the base's own head, and takes the base's path to the same bits.
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head.original_module
    if type(head) is nn.Linear:
        frozen = not any(p.requires_grad for p in head.parameters())
        form = linear_cross_entropy if frozen else linear_cross_entropy_plain
        return form(hidden, head.weight, head.bias, targets)
    # A LoRA on the head brings the chunked form along (models/accelerated_lora.py), where that is exact for it.
    own_form = getattr(head, "token_loss_sum", None)
    loss = own_form(hidden, targets) if own_form is not None else None
    if loss is not None:
        return loss
    # Another adapted head (modules_to_save, trained token rows) computes its logits itself.
    return cross_entropy(at_least_float32(head(hidden)), targets, reduction="sum")
