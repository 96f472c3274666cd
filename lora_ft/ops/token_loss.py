"""From packed tokens to sums of their losses, of a whole batch or of each document: how objectives call a model.

    ids [T] -> body (attention within documents) -> hidden [T, E] -> supervised rows [N, E] -> head -> sums of losses

The plain path runs the model's own forward over a dense mask and takes the loss of all logits; the fast
paths are chosen once for a model (`choose_paths`), each exact and each switchable (`fast.*`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.ops import attention
from lora_ft.ops.batch import IGNORED, Batch
from lora_ft.ops.cross_entropy import at_least_float32, linear_cross_entropy, linear_cross_entropy_plain

# Architectures whose fast paths are tested against the plain ones; others take the plain paths.
TESTED = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Paths:
    """The paths chosen for a model, and why a fast one was not taken.

    packs: whether documents may share a forward pass. An untested architecture may let them see each other
    there (OPT, BLOOM and Falcon do, in transformers 5.23), and so gets one at a time.
    """

    packs: bool
    passes_starts: bool
    supervised_rows_only: bool
    reasons: tuple[str, ...]


def choose_paths(model: PreTrainedModel, fast: config.Fast) -> Paths:
    """Choose the paths for this architecture and set the model's attention; the choice is for logging."""
    known = model.config.model_type in TESTED
    reasons = []
    if not known:
        what = model.config.model_type
        reasons = [f"plain paths, one row in a forward pass: {what} is not among the tested architectures"]
    reasons += [f"plain {name}: fast.{name}=false" for name in ("attention", "loss") if not getattr(fast, name)]
    if known:
        model.set_attn_implementation(attention.NAME if fast.attention else attention.PLAIN)
        if fast.attention:
            head_width = getattr(model.config, "head_dim", None) or (
                model.config.hidden_size // model.config.num_attention_heads
            )
            reasons.append("attention: {} ({})".format(*attention.choose_kernel(model.device, model.dtype, head_width)))
    return Paths(known, known and fast.attention, known and fast.loss, tuple(reasons))


def token_loss_sum(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """Sum of the cross-entropies of the supervised positions of a batch; a scalar in fp32 (or float64).

    `model` is the transformers model, with or without adapter layers inside.
    """
    if len(batch.counts) > 1 and not paths.packs:
        return document_loss_sums(model, batch, paths).sum()
    (total,) = _loss_sums(model, batch, paths, [sum(batch.counts)], [0, len(batch.ids)])
    return total


def document_loss_sums(model: PreTrainedModel, batch: Batch, paths: Paths) -> Tensor:
    """The same sum for each document of the batch; [documents]. The documents share a forward pass if `paths.packs`."""
    if not paths.packs:
        return torch.stack([token_loss_sum(model, document, paths) for document in batch.documents()])
    return torch.stack(_loss_sums(model, batch, paths, batch.counts, batch.starts))


def _loss_sums(
    model: PreTrainedModel, batch: Batch, paths: Paths, counts: list[int], starts: list[int]
) -> list[Tensor]:
    """Loss sums of consecutive parts of a batch, given the supervised positions and the boundaries of each part."""
    inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "use_cache": False}
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
    # A LoRA on the head brings the chunked form along (adapters/fast.py), where that is exact for it.
    own_form = getattr(head, "token_loss_sum", None)
    loss = own_form(hidden, targets) if own_form is not None else None
    if loss is not None:
        return loss
    # Another adapted head (modules_to_save, trained token rows) computes its logits itself.
    return cross_entropy(at_least_float32(head(hidden)), targets, reduction="sum")
