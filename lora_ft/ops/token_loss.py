"""Compute the loss sums of packed tokens, of a whole batch or of each document; objectives call models through this.

    ids [T] -> body (attention within documents) -> hidden [T, E] -> supervised rows [N, E] -> head -> sums of losses

A model in which packed documents would see each other (a state that runs on, positions that count from the first
token of the row) computes documents of similar length side by side, as rows that are padded on the right:

    packed   a a a a a b b b b c          side by side   a a a a a     one by one   a a a a a
                                                         b b b b .                  b b b b
                                          then           c                          c

Nothing is to the right of a causal model's token, so the padding changes no number.

The plain path runs the model's own forward with a dense mask and computes the loss from all logits. The fast
paths are chosen once per model (models/acceleration.py). Each of them is exact and has a switch (`fast.*`).
"""

from dataclasses import dataclass
from itertools import pairwise, repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_ft.ops.attention import DocumentStarts
from lora_ft.ops.batch import Batch
from lora_ft.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain, summed_cross_entropy
from lora_ft.ops.logits import PRODUCT, LogitMap, at_least_float32


@dataclass(frozen=True)
class Paths:
    """The paths chosen for a model.

    packs: documents may share a row. False for families in which packed documents would see each other.
    pads: documents may be rows side by side, padded on the right, where they do not share a row.
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
    pads: bool = False

    @property
    def share_a_pass(self) -> bool:
        """True if a forward pass may have several documents."""
        return self.packs or self.pads

    def are_short(self, batch: Batch) -> bool:
        """Return whether no document of a batch changes the rotary frequencies of others."""
        longest = max(end - start for start, end in pairwise(batch.starts))
        return self.longest_shared is None or longest <= self.longest_shared


# Documents side by side are at least this share of the longest: at most 3 of 10 tokens of a pass are padding.
_SIMILAR = 0.7

PLAIN_PATHS = Paths(packs=False, passes_starts=False, supervised_rows_only=False)


def token_loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the weighted sum of cross-entropies over the supervised positions; a scalar in fp32 (or float64).

    `model` is the transformers model, with or without adapter layers inside.
    """
    if len(batch.counts) > 1 and not (paths.packs and paths.are_short(batch)):
        return document_loss_sums(model, batch, paths).sum()
    (total,) = _loss_sums(model, batch, paths, [sum(batch.counts)], [0, batch.starts[-1]])
    return total


def document_loss_sums(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the sum of each document of the batch, [documents]; they share a forward pass if `paths` allow it."""
    if not (paths.share_a_pass and paths.are_short(batch)):
        return torch.stack([token_loss_sum(model, document, paths) for document in batch.documents()])
    if paths.packs:
        return torch.stack(_loss_sums(model, batch, paths, batch.counts, batch.starts))
    documents = batch.documents()
    sums: dict[int, Tensor] = {}
    for rows in similar_lengths([len(document.ids) for document in documents]):
        sums.update(zip(rows, _padded_loss_sums(model, [documents[i] for i in rows], paths), strict=True))
    return torch.stack([sums[i] for i in range(len(documents))])


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Group the indices of lengths: in each group the longest first, and none shorter than `_SIMILAR` of it."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[index] >= _SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _padded_loss_sums(model: PreTrainedModel, documents: list[Batch], paths: Paths) -> list[Tensor]:
    """Return the loss sums of documents that are the rows of one forward pass."""
    ids = pad_sequence([document.ids for document in documents], batch_first=True)
    supervised = torch.cat([document.supervised + row * ids.shape[1] for row, document in enumerate(documents)])
    targets = torch.cat([document.targets[document.supervised] for document in documents])
    counts = [len(document.supervised) for document in documents]
    weights = _joined([document.supervised_weights for document in documents])
    if paths.supervised_rows_only:
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        return _head_losses(head, hidden.flatten(0, 1)[supervised], targets, weights, counts, paths.logit_map)
    logits = at_least_float32(model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[supervised])
    losses = cross_entropy(logits, targets, reduction="none")
    if weights is not None:
        losses = losses * weights
    return [part.sum() for part in losses.split(counts)]


def _joined(weights: list[Tensor | None]) -> Tensor | None:
    given = [each for each in weights if each is not None]
    return torch.cat(given) if given else None


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
        weights = batch.weights
        return [
            summed_cross_entropy(
                logits[start:end], batch.targets[start:end], weights if weights is None else weights[start:end]
            )
            for start, end in pairwise(starts)
        ]
    hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state[0][batch.supervised]
    targets, head = batch.targets[batch.supervised], model.get_output_embeddings()
    return _head_losses(head, hidden, targets, batch.supervised_weights, counts, paths.logit_map)


def _head_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, counts: list[int], logit_map: LogitMap
) -> list[Tensor]:
    """Return loss sums of consecutive parts of supervised rows, given their counts."""
    of_parts = repeat(None) if weights is None else weights.split(counts)
    parts = zip(hidden.split(counts), targets.split(counts), of_parts, strict=False)
    return [_head_loss(head, rows, of_rows, each, logit_map) for rows, of_rows, each in parts]


def _head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, logit_map: LogitMap) -> Tensor:
    if getattr(head, "disable_adapters", False):
        # With its adapter disabled, a wrapped head is the base's head: take the base's path, for the same bits.
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head.original_module
    if type(head) is nn.Linear:
        frozen = not any(p.requires_grad for p in head.parameters())
        form = linear_cross_entropy if frozen else linear_cross_entropy_plain
        return form(hidden, head.weight, head.bias, targets, logit_map=logit_map, weights=weights)
    # models/accelerated_lora.py gives a head with LoRA a chunked loss, which returns None when it does not apply.
    own_form = getattr(head, "token_loss_sum", None)
    loss = own_form(hidden, targets, logit_map, weights) if own_form is not None else None
    if loss is not None:
        return loss
    # Other adapted heads (modules_to_save, trained token rows) compute their own logits.
    return summed_cross_entropy(logit_map(at_least_float32(head(hidden))), targets, weights)
