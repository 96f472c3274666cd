"""Score labels: the log-probability of every allowed label after a prompt, with the prompt computed once.

    row of a forward pass     prompt . . . | negative <end> | positive <end> | very positive <end>
    positions                 0 1 2 ... p-1| p              | p              | p p+1
    attends to                itself         prompt, itself   prompt, itself   prompt, itself

A label's tokens see the prompt and the tokens of this label before them, and nothing of the other labels (the end token
is only predicted). So the scores are those of one forward pass for each label, at the cost of one prompt:

    tokens = rows * (prompt + labels * label)        instead of rows * labels * (prompt + label)

The probability of a label is its share: softmax over the log-probabilities of all labels.

The mask is checked once on the loaded model, against documents as in training. A model that does not follow it (a
recurrent state, positions that count from the first token of a row), and a prompt that is longer than an attention
window, get a document of prompt and label for each label.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lora_ft.data.label_prompts import LabelPrompt
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation.classification import Floats, softmax
from lora_ft.models.acceleration import plain_attention
from lora_ft.models.build import first_line
from lora_ft.models.path_choice import longest_shared
from lora_ft.models.self_check import loss_and_gradient, tolerance
from lora_ft.ops.batch import IGNORED, Batch
from lora_ft.ops.dropout import evaluating
from lora_ft.ops.logits import at_least_float32
from lora_ft.ops.token_loss import Paths, document_loss_sums

log = logging.getLogger("lora_ft")

_CHECKED = (9, (7, 3, 2, 4))  # tokens of a prompt and of labels
_MOST_DIFFERENCE = 0.02  # relative, in any dtype
_MOST_LOGITS = 1 << 26  # values of logits in memory at once


@dataclass
class LabelScorer:
    """Scores the labels of a set of prompts; the model is checked at the first call.

    tokens_per_batch: most tokens of a forward pass, if one prompt with its longest label fits.
    problem: why labels do not share the computation of their prompt; "" if they do, None before the first call.
    """

    prompts: Sequence[LabelPrompt]
    paths: Paths
    tokens_per_batch: int
    problem: str | None = None

    def probabilities(self, model: PreTrainedModel) -> Floats:
        """Return the probability of each label after each prompt, [prompts, labels]; those of a prompt sum to 1."""
        return softmax(self.scores(model))

    @torch.no_grad()
    def scores(self, model: PreTrainedModel) -> Floats:
        """Return the log-probability of each label after each prompt, [prompts, labels], in nats.

        The model's mode and attention are restored. Raises NonFiniteError for scores that are NaN or infinite.
        """
        with evaluating(model):
            if self.problem is None:
                self.problem = _problem(model, self.paths)
                if self.problem:
                    log.info("labels are scored in documents of their own: %s", self.problem)
            limit = 0 if self.problem else _longest(model)
            shared = [i for i, prompt in enumerate(self.prompts) if prompt.longest <= limit]
            alone = [i for i, prompt in enumerate(self.prompts) if prompt.longest > limit]
            scores = np.full((len(self.prompts), len(self.prompts[0].label_ids)), np.nan)
            for indices, scored in ((shared, shared_scores), (alone, document_scores)):
                if indices:
                    chosen = [self.prompts[i] for i in indices]
                    scores[indices] = scored(model, chosen, self.paths, self.tokens_per_batch)
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                "the scores of labels are not finite: weights of the base or the adapter are not finite, or too large"
            )
        return scores


def shared_scores(
    model: PreTrainedModel, prompts: Sequence[LabelPrompt], paths: Paths, tokens_per_batch: int
) -> Floats:
    """Return the scores of labels that share the computation of their prompt, in batches of similar length."""
    scores = np.zeros((len(prompts), len(prompts[0].label_ids)))
    with plain_attention(model):
        is_bool = model.config._attn_implementation == "sdpa"
        for batch in _batches(_rows(prompts, tokens_per_batch), tokens_per_batch):
            targets = [target for row, each in enumerate(batch) for target in each.targets(row)]
            found = _log_probs(model, batch, targets, paths, is_bool=is_bool)
            for target, value in zip(targets, found.tolist(), strict=True):
                scores[batch[target.row].index, target.label] += value
    return scores


@dataclass(frozen=True)
class _Target:
    """A token of a label: the row and position of a batch that predict it."""

    row: int
    position: int
    label: int
    token: int


@dataclass(frozen=True)
class _Row:
    """A prompt with consecutive labels, the first of which has number `first`; index: of the prompt."""

    index: int
    prompt: NDArray[np.int32]
    labels: Sequence[tuple[int, ...]]
    first: int

    @property
    def starts(self) -> list[int]:
        """Positions in the row at which the labels begin, and the length of the row."""
        return [*accumulate((len(label) - 1 for label in self.labels), initial=len(self.prompt))]

    def tensors(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, positions and parts (0: prompt, 1..: labels, -1: padding), each [length]."""
        ids, positions = list(self.prompt), list(range(len(self.prompt)))
        parts = [0] * len(self.prompt)
        for number, label in enumerate(self.labels, 1):
            ids += label[:-1]
            positions += range(len(self.prompt), len(self.prompt) + len(label) - 1)
            parts += [number] * (len(label) - 1)
        missing = length - len(ids)
        return (
            torch.tensor([*ids, *[0] * missing]),
            torch.tensor([*positions, *[0] * missing]),
            torch.tensor([*parts, *[-1] * missing]),
        )

    def targets(self, row: int) -> Iterator[_Target]:
        last = len(self.prompt) - 1
        for number, (label, start) in enumerate(zip(self.labels, self.starts, strict=False), self.first):
            for offset, token in enumerate(label):
                yield _Target(row, start + offset - 1 if offset else last, number, token)


def _rows(prompts: Sequence[LabelPrompt], tokens: int) -> list[_Row]:
    """Cut the labels of each prompt into rows of at most `tokens`, or twice the prompt, or one label."""
    rows = []
    for index, prompt in enumerate(prompts):
        length = len(prompt.prompt_ids)
        first, size = 0, 0
        for number, label in enumerate(prompt.label_ids):
            if size and length + size + len(label) - 1 > max(tokens, 2 * length):
                rows.append(_Row(index, prompt.prompt_ids, prompt.label_ids[first:number], first))
                first, size = number, 0
            size += len(label) - 1
        rows.append(_Row(index, prompt.prompt_ids, prompt.label_ids[first:], first))
    return rows


def _batches(rows: Sequence[_Row], tokens: int) -> Iterator[list[_Row]]:
    """Yield rows of similar length, the longest first: at most `tokens` with their padding, or one row."""
    left = sorted(rows, key=lambda row: -row.starts[-1])
    while left:
        size = max(1, tokens // left[0].starts[-1])
        yield left[:size]
        left = left[size:]


def _log_probs(
    model: PreTrainedModel, batch: Sequence[_Row], targets: Sequence[_Target], paths: Paths, *, is_bool: bool
) -> Tensor:
    """Return the log-probability of each target, [targets], by one forward pass with a dense mask."""
    length = max(row.starts[-1] for row in batch)
    columns = zip(*(row.tensors(length) for row in batch), strict=True)
    ids, positions, parts = (torch.stack(column).to(model.device) for column in columns)
    mask = _mask(parts) if is_bool else _additive(_mask(parts), model.get_input_embeddings().weight.dtype)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
    places = [target.row * length + target.position for target in targets]
    chosen, row_of = torch.tensor(places).unique(return_inverse=True)  # the labels of a prompt share its last position
    chosen = chosen.to(model.device)
    if paths.supervised_rows_only:
        hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state.flatten(0, 1)[chosen]
        head = model.get_output_embeddings()
    else:
        hidden, head = model(**inputs).logits.flatten(0, 1)[chosen], None
    tokens = torch.tensor([target.token for target in targets])
    step = max(1, _MOST_LOGITS // model.get_input_embeddings().weight.shape[0])
    found, order = [], []
    for start in range(0, len(chosen), step):
        part = hidden[start : start + step]
        logits = at_least_float32(part) if head is None else paths.logit_map(at_least_float32(head(part)))
        inside = ((row_of >= start) & (row_of < start + step)).nonzero()[:, 0]
        rows, words = ((each[inside]).to(model.device) for each in (row_of - start, tokens))
        found.append(logits[rows, words] - logits.logsumexp(1)[rows])
        order.append(inside)
    return torch.cat(found)[torch.cat(order).argsort().to(model.device)]


def _mask(parts: Tensor) -> Tensor:
    """Return which positions each position attends to, [rows, 1, length, length], given the part of each position."""
    query, key = parts[:, :, None], parts[:, None, :]
    order = torch.arange(parts.shape[1], device=parts.device)
    return (((query == key) | (key == 0)) & (order[:, None] >= order))[:, None]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def document_scores(
    model: PreTrainedModel, prompts: Sequence[LabelPrompt], paths: Paths, tokens_per_batch: int
) -> Floats:
    """Return the scores of labels in documents of prompt and label, on the paths of training."""
    scores = np.zeros((len(prompts), len(prompts[0].label_ids)))
    pairs = [(row, label) for row in range(len(prompts)) for label in range(scores.shape[1])]
    pairs.sort(key=lambda pair: -_length(prompts, pair))
    while pairs:
        size = max(1, tokens_per_batch // _length(prompts, pairs[0])) if paths.share_a_pass else 1
        batch = _documents([(prompts[row].prompt_ids, prompts[row].label_ids[label]) for row, label in pairs[:size]])
        sums = document_loss_sums(model, batch.to(model.device), paths)
        for place, value in zip(pairs[:size], sums.tolist(), strict=True):
            scores[place] = -value
        pairs = pairs[size:]
    return scores


def _length(prompts: Sequence[LabelPrompt], pair: tuple[int, int]) -> int:
    row, label = pair
    return len(prompts[row].prompt_ids) + len(prompts[row].label_ids[label])


def _documents(pairs: Sequence[tuple[NDArray[np.int32], tuple[int, ...]]]) -> Batch:
    ids = [torch.tensor([*prompt, *label]) for prompt, label in pairs]
    targets = []
    for (prompt, _), document in zip(pairs, ids, strict=True):
        shifted = torch.full_like(document, IGNORED)
        shifted[len(prompt) - 1 : -1] = document[len(prompt) :]
        targets.append(shifted)
    positions = torch.cat([torch.arange(len(document)) for document in ids])
    return Batch(torch.cat(ids), positions, torch.cat(targets), [0, *accumulate(map(len, ids))])


def _problem(model: PreTrainedModel, paths: Paths) -> str:
    """Describe the difference between shared prompts and documents for random labels of several lengths; or ""."""
    if not inspect.signature(model.forward).parameters.keys() >= {"attention_mask", "position_ids"}:
        return "the model takes no position_ids or no attention_mask"
    length, lengths = _CHECKED
    words = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 8, words // 2 + 1, (length + sum(lengths),), generator=draw).tolist()
    ends = [*accumulate(lengths, initial=length)]
    labels = [tuple(ids[start:end]) for start, end in pairwise(ends)]
    prompt = np.array(ids[:length], dtype=np.int32)
    # The row of the second prompt is padded, and its labels come in another order.
    prompts = [LabelPrompt(prompt, labels, ""), LabelPrompt(prompt[2:], labels[::-1], "")]
    try:
        expected = document_scores(model, prompts, paths, 1)
        found = shared_scores(model, prompts, paths, 1 << 10)
        if _sees_others(model, prompts[0], paths):
            return "labels of a row see each other"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if difference <= min(tolerance(model), _MOST_DIFFERENCE):
        return ""
    return f"scores of shared prompts differ by {difference:.1e}"


def _sees_others(model: PreTrainedModel, prompt: LabelPrompt, paths: Paths) -> bool:
    """Return True if the first label changes the scores of the others: in any dtype, a masked token has gradient 0."""
    [row] = _rows([prompt], 1 << 10)
    others = [target for target in row.targets(0) if target.label]
    with plain_attention(model):
        is_bool = model.config._attn_implementation == "sdpa"
        _, gradient = loss_and_gradient(model, lambda: _log_probs(model, [row], others, paths, is_bool=is_bool).sum())
    return bool(gradient[0, row.starts[0] : row.starts[1]].any())


def _longest(model: PreTrainedModel) -> int:
    """Return the length up to which a dense mask and the largest position of a pass change nothing else."""
    text = model.config.get_text_config()
    limits = [longest_shared(model), getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)]
    return min((limit for limit in limits if limit is not None), default=1 << 62)
