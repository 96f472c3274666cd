"""The settings that save memory, from those that cost least to those that cost most.

    levers(cfg, model_config, workload, machine)
        -> [Lever("embedding", [{"model.embedding_device": "cpu"}], ...), Lever("micro-batch", ...), ...]

A lever is listed only if it has an effect on this device, is allowed with the other settings and is not set already.
The first ones change no number, or only its rounding; those with `quality` change the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_ft import config
from lora_ft.adapters.experts import expert_counts, hindrance
from lora_ft.adapters.targets import ALL_LINEAR
from lora_ft.config import Optimizer, QuantKind, TooLong
from lora_ft.memory.auto import settings_of
from lora_ft.memory.machine import Machine
from lora_ft.memory.shallow import num_layers
from lora_ft.memory.workload import Workload
from lora_ft.models.stored import of_config

Change = dict[str, Any]
"""New values by setting."""

_MULTIPLE = 64  # tokens; sizes are rounded to it
_LEAST_TOKENS = 128
_LEAST_RANK = 4


@dataclass(frozen=True, eq=False)
class Lever:
    """A way to save memory. options: from the weakest to the strongest. cost: in a few words.

    hidden: training does it by itself, because the setting is auto. quality: it changes the result of the run.
    """

    name: str
    options: tuple[Change, ...]
    cost: str
    hidden: bool = False
    quality: bool = False


def levers(cfg: config.TrainRun, model_config: Any, workload: Workload, machine: Machine) -> list[Lever]:
    """Return the levers of these settings on this machine, the cheapest first."""
    files = of_config(model_config)
    quant = None if files and files.trains else cfg.quant
    found = [
        Lever("micro-batch", tuple(_micro_batches(cfg, workload)), "the same steps in more forward passes",
              hidden=cfg.train.tokens_per_microbatch == "auto"),
        Lever("recompute", tuple(_recomputed(cfg, num_layers(model_config))), "computes some layers twice",
              hidden=cfg.train.gradient_checkpointing == "auto"),
        Lever("8-bit optimizer", tuple(_optimizers(cfg)), "rounds the optimizer's state to 8 bits", quality=True),
        Lever("int8", tuple(_quantized(quant, QuantKind.int8)), "rounds the frozen weights to 8 bits", quality=True),
        Lever("nf4", tuple(_quantized(quant, QuantKind.nf4)), "rounds the frozen weights to 4 bits", quality=True),
        Lever("rank", tuple(_ranks(cfg)), "a smaller adapter", quality=True),
        Lever("experts", tuple(_experts(cfg, model_config)), "leaves the experts frozen", quality=True),
        Lever("rows", tuple(_rows(cfg, workload)), "shorter rows", quality=True),
    ]  # fmt: skip
    if machine.target.kind == "cuda":
        found = [
            Lever("embedding", tuple(_embeddings(cfg, model_config)), "the host looks up the embedding in each pass"),
            Lever("offload", tuple(_offloads(cfg)), "moves the optimizer's state between host and GPU in each step"),
            *found,
        ]
    return [lever for lever in found if lever.options]


def longest_row(workload: Workload) -> int:
    """Return the tokens of the longest row, which a micro-batch must hold."""
    return workload.longest or max(workload.largest)


def _embeddings(cfg: config.TrainRun, model_config: Any) -> Iterator[Change]:
    # A head that shares the embedding's weight needs it on the GPU. Rows of added tokens are trained there.
    tied = model_config.get_text_config().tie_word_embeddings
    if cfg.model.embedding_device != "cpu" and not tied and not cfg.model.added_tokens:
        yield {"model.embedding_device": "cpu"}


def _offloads(cfg: config.TrainRun) -> Iterator[Change]:
    if cfg.optim.name is Optimizer.adamw and not cfg.optim.offload:
        yield {"optim.offload": True}


def _micro_batches(cfg: config.TrainRun, workload: Workload) -> Iterator[Change]:
    if cfg.train.packing:  # otherwise every row is a micro-batch of its own
        for tokens in _shrinking(sum(workload.largest), longest_row(workload)):
            yield {"train.tokens_per_microbatch": tokens}


def _recomputed(cfg: config.TrainRun, layers: int) -> Iterator[Change]:
    settings, now = settings_of(layers), cfg.train.gradient_checkpointing
    every = {"off": 0, "auto": 0}.get(now) if now in ("off", "auto") else int(now.removeprefix("every_"))
    for setting in settings[1:]:
        if not every or int(setting.removeprefix("every_")) < every:
            yield {"train.gradient_checkpointing": setting}


def _optimizers(cfg: config.TrainRun) -> Iterator[Change]:
    if cfg.optim.name is Optimizer.adamw and not cfg.optim.offload:  # on the host it takes no memory of the GPU
        yield {"optim.name": Optimizer.adamw_8bit}


def _quantized(quant: config.Quant | None, kind: QuantKind) -> Iterator[Change]:
    if quant and (quant.kind is QuantKind.none or (quant.kind is QuantKind.int8 and kind is QuantKind.nf4)):
        yield {"quant.kind": kind}


def _ranks(cfg: config.TrainRun) -> Iterator[Change]:
    adapter = cfg.adapter
    if adapter.rank_pattern or adapter.alpha_pattern or adapter.init_from:
        return
    rank = adapter.r // 2
    while rank >= _LEAST_RANK:
        alpha = {} if adapter.use_rslora else {"adapter.lora_alpha": adapter.lora_alpha * rank / adapter.r}
        yield {"adapter.r": rank, **alpha}  # the scale stays
        rank //= 2


def _experts(cfg: config.TrainRun, model_config: Any) -> Iterator[Change]:
    adapter = cfg.adapter
    chosen = ALL_LINEAR in adapter.target_modules if adapter.experts is None else adapter.experts
    if chosen and expert_counts(model_config) and not hindrance(adapter):
        yield {"adapter.experts": False}


def _rows(cfg: config.TrainRun, workload: Workload) -> Iterator[Change]:
    """Yield lengths of rows, each with a micro-batch of that size: a larger one would be as full as before."""
    how = cfg.data.too_long if cfg.data.too_long is not TooLong.error else TooLong.drop
    for tokens in _shrinking(longest_row(workload), 0):
        size = {"train.tokens_per_microbatch": tokens} if tokens < sum(workload.largest) else {}
        yield {"data.max_length": tokens, "data.too_long": how, **size}


def _shrinking(most: int, least: int) -> Iterator[int]:
    """Yield 3/4, 1/2, 3/8, 1/4 ... of a number of tokens, and at last the least."""
    floor, last, part = max(least, min(_LEAST_TOKENS, most)), most, most
    while part > floor:
        for share in (3, 2):
            tokens = part * share // 4
            tokens = tokens // _MULTIPLE * _MULTIPLE if tokens > _MULTIPLE else tokens
            if floor < tokens < last:
                yield tokens
                last = tokens
        part //= 2
    if floor < last:
        yield floor
