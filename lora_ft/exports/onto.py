"""Which weights a quantized run's adapter is better added to: measured on held-out rows, before any is written.

                              loss        KL    nats per token
    attached adapter        2.0870               on the quantized base that it was trained on
    merged onto dequantized 2.0871    0.0002     that base's weights, as its codes have them
    merged onto original    2.0790    0.0105     the weights that were quantized     <- taken

The lower loss wins. Where the losses differ by less than noise (two standard errors of the mean difference, token by
token), the lower KL(attached || merged) does: the model that is more like the one that was trained and evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from lora_ft.data.dataset import TokenRow
from lora_ft.data.packing import micro_batches
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation.loss import to_batch
from lora_ft.exports import stream
from lora_ft.exports.merge import Merged
from lora_ft.ops.token_loss import IGNORED, TESTED
from lora_ft.values import Onto

_TOKENS_PER_PASS = 1024  # their logits are held of two models at a time: 0.4 GB for a vocabulary of 49,152


@dataclass(frozen=True)
class Target:
    """A merged model: loss in nats per token, and KL of its distributions from the attached adapter's."""

    loss: float
    kl: float


@dataclass(frozen=True)
class Measured:
    """What was measured on `tokens` supervised tokens of `rows` rows, and the target that came out better.

    Losses below `noise` apart count as equal. dtype: of the merged weights.
    """

    better: Onto
    attached_loss: float
    dequantized: Target
    original: Target
    noise: float
    tokens: int
    rows: int
    dtype: str

    def record(self) -> dict[str, Any]:
        """As merge.json holds it."""
        return {"onto": self.better.value} | {k: v for k, v in asdict(self).items() if k != "better"}

    def table(self) -> Table:
        """As a person reads it."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for header in ("", "loss", "KL", ""):
            table.add_column(header, justify="right" if header else "left")
        table.add_row("attached adapter", f"{self.attached_loss:.4f}", "", "nats per token")
        for onto, target in ((Onto.dequantized, self.dequantized), (Onto.original, self.original)):
            taken = f"taken: {self._reason()}" if onto is self.better else ""
            table.add_row(f"merged onto {onto.value}", f"{target.loss:.4f}", f"{target.kl:.4f}", taken)
        return table

    def _reason(self) -> str:
        apart = abs(self.dequantized.loss - self.original.loss)
        return "lower loss" if apart > self.noise else f"closer to the adapter, losses within noise ({self.noise:.4f})"


def measure(
    attached: PreTrainedModel, dequantized: Merged, original: Merged, rows: Sequence[TokenRow], dtype: torch.dtype
) -> Measured:
    """Compare both merged models with the adapter attached to its quantized base, on that base's device.

    `attached` is in memory; the merged models are not, but flow through it layer by layer. Raises NonFiniteError.
    """
    merged = {onto: _Flowing(tensors, attached.device) for onto, tensors in
              ((Onto.dequantized, dequantized), (Onto.original, original))}  # fmt: skip
    own: list[Tensor] = []
    losses: dict[Onto, list[Tensor]] = {onto: [] for onto in merged}
    divergence = dict.fromkeys(merged, 0.0)
    for expected, found in _log_probs(attached, merged, rows):
        own.append(expected.loss)
        for onto, each in found:
            losses[onto].append(each.loss)
            divergence[onto] += _divergence(expected.log_probs, each.log_probs)
    base = torch.cat(own)
    both = {onto: torch.cat(parts) for onto, parts in losses.items()}
    num = len(base)
    if not all(torch.isfinite(loss).all() for loss in (base, *both.values())):
        raise NonFiniteError("a held-out loss is not finite: the weights of the base or of the adapter are broken")
    targets = {onto: Target(float(loss.mean()), max(0.0, divergence[onto] / num)) for onto, loss in both.items()}
    difference = both[Onto.original] - both[Onto.dequantized]
    noise = 2 * float(difference.std()) / num**0.5 if num > 1 else float("inf")
    return Measured(
        better=better(targets, noise), attached_loss=float(base.mean()), dequantized=targets[Onto.dequantized],
        original=targets[Onto.original], noise=noise, tokens=num, rows=len(rows),
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def better(targets: dict[Onto, Target], noise: float) -> Onto:
    """The target of lower loss; of losses within `noise`, that of lower KL."""
    apart = abs(targets[Onto.original].loss - targets[Onto.dequantized].loss)
    return min(targets, key=lambda onto: targets[onto].loss if apart > noise else targets[onto].kl)


@dataclass(frozen=True)
class _Scored:
    """Log-probabilities [N, V] at supervised positions in float32, and the losses [N] of their targets in float64."""

    log_probs: Tensor
    loss: Tensor


class _Flowing:
    """A merged model that is called like one in memory."""

    def __init__(self, tensors: Merged, device: torch.device) -> None:
        self._model, self._tensors = tensors.plain.eval(), tensors
        self._modules = stream.hollow(self._model, device)

    def __call__(self, **inputs: Any) -> Any:
        with stream.flowing(self._model, self._modules, self._tensors.__getitem__):
            return self._model(**inputs)


@torch.no_grad()
def _log_probs(
    attached: PreTrainedModel, merged: dict[Onto, _Flowing], rows: Sequence[TokenRow]
) -> Iterator[tuple[_Scored, Iterator[tuple[Onto, _Scored]]]]:
    capacity = max([_TOKENS_PER_PASS, *(len(row.ids) for row in rows)])
    for packed in micro_batches(rows, capacity, attached.config.model_type in TESTED):
        batch = to_batch(packed, attached.device)
        inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "use_cache": False}
        supervised = (batch.targets != IGNORED).nonzero()[:, 0]
        targets = batch.targets[supervised]

        def scored(model: Any, inputs: Any = inputs, rows: Tensor = supervised, targets: Tensor = targets) -> _Scored:
            log_probs = log_softmax(model(**inputs).logits[0][rows].float(), dim=-1)
            return _Scored(log_probs, -log_probs.gather(1, targets[:, None])[:, 0].double().cpu())

        yield scored(attached), ((onto, scored(model)) for onto, model in merged.items())


def _divergence(expected: Tensor, found: Tensor) -> float:
    """KL(expected || found), summed over positions."""
    return float((expected.exp() * (expected - found)).sum(dim=-1).double().sum())
