"""Choose the weights that a quantized run's adapter is added to, by the loss on the eval set.

                              loss        KL    nats per token
    attached adapter        2.0870               on the quantized base that it was trained on
    merged onto dequantized 2.0871    0.0002     the dequantized weights of that base
    merged onto original    2.0790    0.0105     the weights before quantization     <- chosen

The lower loss wins. If the losses differ by less than noise (two standard errors of the mean difference per token),
the lower KL(attached || merged) wins: the model that is closer to the one that was trained and evaluated.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.classes import MULTI_LABEL
from lora_ft.data.packing import longest_group, micro_batches
from lora_ft.data.rows import Example
from lora_ft.errors import NonFiniteError
from lora_ft.export.merge import MergedModel
from lora_ft.export.weight_stream import streamed, use_placeholders
from lora_ft.models import heads
from lora_ft.models.acceleration import accelerated
from lora_ft.ops.batch import Batch
from lora_ft.ops.class_logits import class_logits, class_targets, first_targets
from lora_ft.ops.token_loss import PLAIN_PATHS
from lora_ft.values import BaseWeights

_OFF: dict[str, Any] = {field.name: False for field in fields(config.Fast) if field.type is bool}
_PLAIN = config.Fast(**_OFF)
_TOKENS_PER_PASS = 1024  # logits of two models are in memory: 0.4 GB for a vocabulary of 49,152


@dataclass(frozen=True)
class Target:
    """Loss of a merged model and KL(attached || merged), in nats per token; per row for a classifier."""

    loss: float
    kl: float


@dataclass(frozen=True)
class Comparison:
    """The losses on `tokens` supervised tokens of `rows` rows, and the better target.

    Losses that differ by less than `noise` count as equal. `dtype` is the merged weights'. Of a classifier, `tokens`
    are decisions: rows, or classes of all rows if a row may have several.
    """

    better: BaseWeights
    attached_loss: float
    dequantized: Target
    original: Target
    noise: float
    tokens: int
    rows: int
    dtype: str
    unit: str = "nats per token"

    def record(self) -> dict[str, Any]:
        """Return the contents of merge.json."""
        return {"base_weights": self.better.value} | {k: v for k, v in asdict(self).items() if k != "better"}

    def table(self) -> Table:
        """Return the table for the terminal."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for header in ("", "loss", "KL", ""):
            table.add_column(header, justify="right" if header else "left")
        table.add_row("attached adapter", f"{self.attached_loss:.4f}", "", self.unit)
        for kind, target in ((BaseWeights.dequantized, self.dequantized), (BaseWeights.original, self.original)):
            chosen = f"chosen: {self._reason()}" if kind is self.better else ""
            table.add_row(f"merged onto {kind.value}", f"{target.loss:.4f}", f"{target.kl:.4f}", chosen)
        return table

    def _reason(self) -> str:
        difference = abs(self.dequantized.loss - self.original.loss)
        if difference > self.noise:
            return "lower loss"
        return f"closer to the adapter, losses within noise ({self.noise:.4f})"


@torch.no_grad()
def compare(
    attached: PreTrainedModel, targets: dict[BaseWeights, MergedModel], examples: Sequence[Example]
) -> Comparison:
    """Compare both merged models with the adapter attached to its quantized base, on that base's device.

    The merged models are computed layer by layer, so that the device holds the quantized base only. Raises
    NonFiniteError if a loss is not finite.
    """
    attached_losses: list[Tensor] = []
    merged_losses: dict[BaseWeights, list[Tensor]] = {kind: [] for kind in targets}
    divergence = dict.fromkeys(targets, 0.0)
    capacity = max(_TOKENS_PER_PASS, longest_group(examples))
    with accelerated(attached, _PLAIN) as made:
        packs = made.paths.packs and made.paths.longest_shared is None
    with contextlib.ExitStack() as stack:
        for merged in targets.values():
            use_placeholders(merged.plain.eval(), attached.device)
            stack.enter_context(streamed(merged.plain, merged.__getitem__))
        log_probs = _of_classes if heads.is_classifier(attached) else _of_tokens
        for packed in micro_batches(examples, capacity, packs):
            batch = packed.to(attached.device)
            expected, loss = log_probs(attached, batch)
            attached_losses.append(loss)
            for kind, merged in targets.items():
                found, loss = log_probs(merged.plain, batch)
                merged_losses[kind].append(loss)
                divergence[kind] += float((expected.exp() * (expected - found)).sum(dim=-1).double().sum())
    base = torch.cat(attached_losses)
    both = {kind: torch.cat(losses) for kind, losses in merged_losses.items()}
    num = len(base)
    if not all(torch.isfinite(loss).all() for loss in (base, *both.values())):
        raise NonFiniteError("an eval loss is not finite: the weights of the base or of the adapter are broken")
    measured = {kind: Target(float(loss.mean()), max(0.0, divergence[kind] / num)) for kind, loss in both.items()}
    difference = both[BaseWeights.original] - both[BaseWeights.dequantized]
    noise = 2 * float(difference.std()) / num**0.5 if num > 1 else float("inf")
    return Comparison(
        better=better(measured, noise), attached_loss=float(base.mean()), dequantized=measured[BaseWeights.dequantized],
        original=measured[BaseWeights.original], noise=noise, tokens=num, rows=len(examples),
        dtype=str(targets[BaseWeights.original].dtype).removeprefix("torch."),
        unit="nats per decision" if log_probs is _of_classes else "nats per token",
    )  # fmt: skip


def better(targets: dict[BaseWeights, Target], noise: float) -> BaseWeights:
    """Return the target of lower loss, or of lower KL if the losses differ by at most `noise`."""
    difference = abs(targets[BaseWeights.original].loss - targets[BaseWeights.dequantized].loss)
    return min(targets, key=lambda kind: targets[kind].loss if difference > noise else targets[kind].kl)


def _of_tokens(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N, V] at supervised positions in float32, and the losses [N] in float64 on the CPU."""
    output = model(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False)
    log_probs = log_softmax(output.logits[0][batch.supervised].float(), dim=-1)
    return log_probs, -log_probs.gather(1, batch.targets[batch.supervised, None])[:, 0].double().cpu()


def _of_classes(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the same for the classes of each document [N, classes]; if a row may have several, for each [N, 2]."""
    logits = class_logits(model, batch, PLAIN_PATHS)
    if model.config.problem_type == MULTI_LABEL:
        targets = class_targets(batch, logits.shape[1]).long().flatten()
        log_probs = torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=-1).flatten(0, 1)
    else:
        targets, log_probs = first_targets(batch), log_softmax(logits, dim=-1)
    return log_probs, -log_probs.gather(1, targets[:, None])[:, 0].double().cpu()
