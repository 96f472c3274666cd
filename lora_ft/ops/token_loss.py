"""Compute the loss sums of packed tokens, of a whole batch or of each document; objectives call models through this.

    ids [T] -> body (attention within documents) -> hidden [T, E] -> supervised rows [N, E] -> head -> sums of losses

The plain path runs the model's own forward with a dense mask and computes the loss from all logits. The fast
paths are chosen once per model (models/acceleration.py). Each of them is exact and has a switch (`fast.*`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lora_ft.ops.attention import DocumentStarts
from lora_ft.ops.batch import IGNORED, Batch
from lora_ft.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from lora_ft.ops.logits import PRODUCT, LogitMap, at_least_float32


@dataclass(frozen=True)
class Paths:
    """The paths chosen for a model.

    packs: documents may share a forward pass. False for families in which packed documents would see each other.
    passes_starts: the model's attention is ops/attention.py, which takes the boundaries of the documents.
    supervised_rows_only: head and cross-entropy are computed for the supervised positions only.
    longest_shared: a batch with a document longer than this runs one document at a time; None for no limit.
    logit_map: the function from the product with the head to the logits, for supervised_rows_only.
    """

    packs: bool
    passes_starts: bool
    supervised_rows_only: bool
    longest_shared: int | None = None
    logit_map: LogitMap = PRODUCT

    def share(self, batch: Batch) -> bool:
        """Return whether the documents of a batch may share a forward pass."""
        longest = max(end - start for start, end in pairwise(batch.starts))
        return self.packs and (self.longest_shared is None or longest <= self.longest_shared)


PLAIN_PATHS = Paths(packs=False, passes_starts=False, supervised_rows_only=False)


def token_loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the sum of cross-entropies over the supervised positions of a batch; a scalar in fp32 (or float64).

    `model` is the transformers model, with or without adapter layers inside.
    """
    if len(batch.counts) > 1 and not paths.share(batch):
        return document_loss_sums(model, batch, paths).sum()
    (total,) = _loss_sums(model, batch, paths, [sum(batch.counts)], [0, batch.starts[-1]])
    return total


def document_loss_sums(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the sum of each document of the batch, [documents]; they share a forward pass if `paths` allow it."""
    if not paths.share(batch):
        return torch.stack([token_loss_sum(model, document, paths) for document in batch.documents()])
    return torch.stack(_loss_sums(model, batch, paths, batch.counts, batch.starts))


def _loss_sums(
    model: PreTrainedModel, batch: Batch, paths: Paths, counts: list[int], starts: list[int]
) -> list[Tensor]:
    """Return loss sums of consecutive parts of a batch, given the supervised counts and the boundaries of the parts."""
    ids = batch.ids if paths.packs else batch.ids[: batch.starts[-1]]  # padding is a document of a pack
    inputs = {"input_ids": ids[None], "use_cache": False}
    if paths.packs:  # for a single document the model makes its own positions, and some models accept no others
        inputs["position_ids"] = batch.positions[None]
    if paths.passes_starts:
        inputs["document_starts"] = DocumentStarts(batch.all_starts if paths.packs else batch.starts)
    if not paths.supervised_rows_only:
        logits = at_least_float32(model(**inputs).logits[0])
        return [
            cross_entropy(logits[start:end], batch.targets[start:end], ignore_index=IGNORED, reduction="sum")
            for start, end in pairwise(starts)
        ]
    hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state[0][batch.supervised]
    parts = zip(hidden.split(counts), batch.targets[batch.supervised].split(counts), strict=True)
    return [_head_loss(model.get_output_embeddings(), rows, targets, paths.logit_map) for rows, targets in parts]


def _head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, logit_map: LogitMap) -> Tensor:
    if getattr(head, "disable_adapters", False):
        # With its adapter disabled, a wrapped head is the base's head: take the base's path, for the same bits.
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head.original_module
    if type(head) is nn.Linear:
        frozen = not any(p.requires_grad for p in head.parameters())
        form = linear_cross_entropy if frozen else linear_cross_entropy_plain
        return form(hidden, head.weight, head.bias, targets, logit_map=logit_map)
    # models/accelerated_lora.py gives a head with LoRA a chunked loss, which returns None when it does not apply.
    own_form = getattr(head, "token_loss_sum", None)
    loss = own_form(hidden, targets, logit_map) if own_form is not None else None
    if loss is not None:
        return loss
    # Other adapted heads (modules_to_save, trained token rows) compute their own logits.
    return cross_entropy(logit_map(at_least_float32(head(hidden))), targets, reduction="sum")
