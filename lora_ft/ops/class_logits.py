"""Compute the logits of a classifier for packed documents: one row of logits for each document.

    document   ids of the text, then its classes as further ids, which are the targets of the text's last token

    ids        great  film   !   1        bad   3   0          classes 1, and 3 and 0
    targets     .      .     1   .         3    0   .
    read                     x             x                   the head reads the token before the first class

Nothing is to the right of a causal model's token, so the ids of the classes change no number.

The plain path runs the model's own forward on the text alone. The fast paths run the body on packed documents, or on
rows side by side, and the head on the tokens that are read.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_ft.ops.attention import DocumentStarts
from lora_ft.ops.batch import Batch
from lora_ft.ops.device import copied
from lora_ft.ops.logits import at_least_float32
from lora_ft.ops.token_loss import Paths, similar_lengths


def class_logits(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the logits [documents, classes] of a batch, in at least float32; each document has a target."""
    if not paths.supervised_rows_only:
        return torch.cat([_plain(model, document, paths) for document in batch.documents()])
    if paths.packs and (len(batch.counts) == 1 or paths.are_short(batch)):
        return _head(model, _packed(model, batch, paths))
    if paths.pads and paths.are_short(batch):
        return _head(model, _side_by_side(model, batch))
    return torch.cat([_head(model, _packed(model, document, paths)) for document in batch.documents()])


def class_targets(batch: Batch, classes: int) -> Tensor:
    """Return the targets [documents, classes]: 1 for a class of the document, else 0. Targets above are no class."""
    device = batch.ids.device
    documents = torch.repeat_interleave(torch.arange(len(batch.counts)), torch.tensor(batch.counts))
    targets = batch.targets[batch.supervised].clamp(max=classes)
    found = torch.zeros((len(batch.counts), classes + 1), device=device)
    found[copied(documents, device), targets] = 1.0
    return found[:, :classes]


def first_targets(batch: Batch) -> Tensor:
    """Return the first target of each document, [documents]."""
    return batch.targets[_read(batch)]


def _read(batch: Batch) -> Tensor:
    """Return the index of the token of each document that the head reads: its first one with a target."""
    if all(count == 1 for count in batch.counts):
        return batch.supervised
    first = torch.tensor([0, *accumulate(batch.counts)][:-1])
    return batch.supervised[copied(first, batch.ids.device)]


def _plain(model: PreTrainedModel, document: Batch, paths: Paths) -> Tensor:
    """Run the model's own forward on the text of one document."""
    length = document.starts[-1] - document.counts[0]
    inputs = {"input_ids": document.ids[None, :length], "use_cache": False}
    if paths.passes_starts:
        inputs["document_starts"] = DocumentStarts([0, length])
    return at_least_float32(model(**inputs).logits)


def _packed(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Return the hidden states that are read, [documents, E], of documents in one row."""
    ids = batch.ids if paths.packs else batch.ids[: batch.starts[-1]]
    inputs = {"input_ids": ids[None], "use_cache": False}
    if paths.packs:
        inputs["position_ids"] = batch.positions[None]
    if paths.passes_starts:
        inputs["document_starts"] = DocumentStarts(batch.all_starts if paths.packs else batch.starts)
    hidden: Tensor = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state[0]
    return hidden[_read(batch)]


def _side_by_side(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the same of documents of similar length as rows, padded on the right."""
    documents = batch.documents()
    found: dict[int, Tensor] = {}
    for rows in similar_lengths([end - start for start, end in pairwise(batch.starts)]):
        ids = pad_sequence([documents[i].ids for i in rows], batch_first=True)
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        read = torch.cat([_read(documents[i]) + row * ids.shape[1] for row, i in enumerate(rows)])
        found.update(zip(rows, hidden.flatten(0, 1)[read], strict=True))
    return torch.stack([found[i] for i in range(len(documents))])


def _head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return at_least_float32(model.score(hidden))
