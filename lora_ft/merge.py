"""Merge an adapter into its base: open, probe, write, load again, compare logits, rename to the final name.

lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model dtype=bf16      # loads with transformers alone
lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model.gguf gguf=q8_0  # for llama.cpp, Ollama
lora-ft merge adapters=[runs/a,runs/b] weights=[0.7,0.3] out=both       # combine adapters into one
lora-ft merge run=runs/2026-11-23_10-15-00 truncate_rank=8 out=small    # a smaller adapter

The base is never in memory as a whole: its tensors are streamed one at a time. The adapter of a quantized run is added
to the dequantized or to the original weights, whichever is better on the eval set (base_weights=). If a check fails,
nothing is written.
"""

import gc
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, validation
from lora_ft.adapters import files, loading, provenance
from lora_ft.cli import entry
from lora_ft.data.dataset import prepare
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation.loss import eval_loss
from lora_ft.export import combine, merge_base, truncate, verify, weight_stream
from lora_ft.export import merge as merged_model
from lora_ft.export.gguf import model as gguf_model
from lora_ft.io import durable
from lora_ft.models.acceleration import accelerated
from lora_ft.models.load import Base
from lora_ft.objectives.sft import Sft
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.training.state import choose_eval
from lora_ft.values import BaseWeights, Dtype, QuantKind

log = logging.getLogger("lora_ft")

_COMPARISON = "merge.json"
_TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class MergeResult:
    """The folder or file that was written, a sentence about it, and the measurements; None if not applicable.

    distance: of a merged model's logits from the adapter's, as a share of these; of a combined adapter's update from
    the weighted sum of its sources'. comparison: of the two targets of a quantized run. ranks: of a smaller adapter.
    """

    out: Path
    summary: str
    distance: float | None = None
    comparison: merge_base.Comparison | None = None
    rank: int | None = None
    ranks: list[truncate.RankQuality] = field(default_factory=list)


def main(cfg: config.MergeRun, invocation: entry.Invocation) -> None:
    """Merge and print the result."""
    result = merge(cfg)
    console = Console()
    if result.comparison:
        console.print(result.comparison.table())
    if result.ranks and result.rank:
        console.print(truncate.render(result.ranks, result.rank))
    console.print(result.summary, markup=False, highlight=False, soft_wrap=True)


def merge(cfg: config.MergeRun) -> MergeResult:
    """Write a merged model, one adapter of several, or a smaller adapter to `cfg.out`, which must not exist.

    The base is the one that the adapter's record names where `cfg` names none. Raises ConfigError, MismatchError for
    an adapter that cannot be merged, NonFiniteError for weights that overflow, ResourceError for a full disk.
    """
    validation.validate(cfg)
    out = Path(cfg.out).expanduser()
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={cfg.out} exists already: choose a new name, merge never replaces anything")
    keep_freed_memory()
    adapters = _adapters(cfg)
    cfg = loading.with_base(cfg, adapters[0])
    tokenizer = loading.adapter_tokenizer(adapters[0], cfg.model)
    if cfg.adapters:
        return _combine(cfg, adapters, tokenizer, out)
    if cfg.truncate_rank:
        return _truncate(cfg, adapters[0], tokenizer, out, cfg.truncate_rank)
    return _merge(cfg, adapters[0], tokenizer, out)


def _adapters(cfg: config.MergeRun) -> list[Path]:
    """Return the adapter folders; each of `cfg.adapters` is a run folder or an adapter."""
    if not cfg.adapters:
        return [loading.adapter_folder(cfg.run, cfg.adapter_path)]
    is_run = {path: (Path(path).expanduser() / "config.yaml").is_file() for path in cfg.adapters}
    return [loading.adapter_folder(path if is_run[path] else None, path) for path in cfg.adapters]


def _merge(cfg: config.MergeRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, out: Path) -> MergeResult:
    opened = weight_stream.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    dtype = opened.base.model.dtype if cfg.dtype is Dtype.auto else getattr(torch, cfg.dtype.value)
    if cfg.gguf:
        gguf_model.check(Path(str(opened.base.identity.folder)), tokenizer)
        dtype = torch.float32  # rounded once, to the type of the file
    kind, comparison = _target(cfg, adapter, tokenizer, opened, dtype)
    read = opened.original if kind is BaseWeights.original else opened.trained_on
    with weight_stream.streamed(opened.model, opened.modules, read):
        expected = verify.probe(opened.model, len(tokenizer))
    merged = merged_model.MergedModel(opened.model, read, dtype)
    if cfg.gguf:
        with durable.scratch_folder(out) as folder:
            merged_model.write_folder(merged, tokenizer, folder)
            distance = verify.check(folder, expected)
            gguf_model.write(folder, out, cfg.gguf)
    else:
        with durable.staged_folder(out) as folder:
            merged_model.write_folder(merged, tokenizer, folder)
            distance = verify.check(folder, expected)
            if comparison:
                durable.write_json(folder / _COMPARISON, comparison.record())
    if comparison and cfg.run:
        durable.write_json(Path(cfg.run).expanduser() / _COMPARISON, comparison.record())
    num_bytes = out.stat().st_size if cfg.gguf else sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stored = cfg.gguf.value if cfg.gguf else str(dtype).removeprefix("torch.")
    summary = (
        f"merged model in {out} ({num_bytes / 1e9:.2f} GB, {stored}); its logits are {distance:.1e} away from the "
        f"adapter's, {verify.tolerance(dtype):.1e} is allowed"
    )
    return MergeResult(out, summary, distance, comparison)


def _target(
    cfg: config.MergeRun,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    opened: weight_stream.StreamedAdapter,
    dtype: torch.dtype,
) -> tuple[BaseWeights, merge_base.Comparison | None]:
    """Choose the weights that the adapter is added to, by a comparison if it is needed."""
    if cfg.quant.kind is QuantKind.none:
        if cfg.base_weights is not BaseWeights.auto:
            log.warning("base_weights=%s has no effect: the adapter's base is not quantized", cfg.base_weights.value)
        return BaseWeights.dequantized, None
    if cfg.base_weights is not BaseWeights.auto:
        return cfg.base_weights, None
    rows = _eval_examples(cfg, tokenizer)
    if not rows:
        log.warning("no eval rows to measure on: merging onto the dequantized base, which the adapter was trained on")
        return BaseWeights.dequantized, None
    log.info(
        "measuring both targets on %d eval rows; base_weights=dequantized or base_weights=original skips this",
        len(rows),
    )
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    reads = {
        BaseWeights.dequantized: weight_stream.loaded(base.model, opened.modules),
        BaseWeights.original: opened.original,
    }
    targets = {kind: merged_model.MergedModel(opened.model, read, dtype) for kind, read in reads.items()}
    comparison = merge_base.compare(base.model, targets, rows)
    del base, model, reads, targets
    gc.collect()  # modules refer to each other in cycles
    return comparison.better, comparison


def _eval_examples(cfg: config.MergeRun, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the eval set of the training run; an empty list if there is none or it cannot be read any more."""
    if not cfg.data.path:
        return []
    try:
        return choose_eval(prepare(cfg.data, tokenizer), cfg.eval_rows)[0]
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("the eval rows cannot be read: %s", error)
        return []


def _combine(cfg: config.MergeRun, adapters: list[Path], tokenizer: PreTrainedTokenizerBase, out: Path) -> MergeResult:
    weights = cfg.weights or [1 / len(adapters)] * len(adapters)
    opened = weight_stream.open_adapter(adapters[0], cfg.model, cfg.quant, cfg.device, tokenizer)
    combine.check(opened.base, cfg.quant, adapters)
    made = combine.combine(opened.model, adapters, weights, cfg.method, cfg.density, cfg.seed)
    how = {"method": cfg.method.value, "weights": weights, "density": cfg.density, "seed": cfg.seed}
    files.write(made.tensors, made.config, out, tokenizer, _origin(opened.base, cfg.quant, adapters, how))
    summary = (
        f"adapter of rank {made.config.r} in {out}, of {len(adapters)} by {cfg.method.value}; its update is "
        f"{made.distance:.1%} away from their weighted sum"
    )
    return MergeResult(out, summary, made.distance, rank=made.config.r)


def _truncate(
    cfg: config.MergeRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, out: Path, rank: int
) -> MergeResult:
    saved = truncate.check(adapter, rank)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    found = truncate.updates(model, loading.NAME)
    rows = _eval_examples(cfg, tokenizer)
    if not rows:
        log.warning("no eval rows: the table shows the kept share of the update's norm alone")
    with accelerated(base.model, config.Fast()) as made:

        def loss() -> float:
            return eval_loss(base.model, Sft().loss, rows, made.paths, _TOKENS_PER_PASS).loss

        ranks = truncate.compare_ranks(model, loading.NAME, found, rank, loss if rows else None)
    small = {layer: update.truncated(rank) for layer, update in found.items()}
    made_from = _origin(base, cfg.quant, [adapter], {"method": "truncated"})
    files.write(
        truncate.tensors(model, loading.NAME, small), truncate.settings(saved, small), out, tokenizer, made_from
    )
    return MergeResult(out, f"adapter of rank {rank} in {out}", rank=rank, ranks=ranks)


def _origin(base: Base, quant: config.Quant, adapters: list[Path], how: dict[str, Any]) -> provenance.Origin:
    """Record the base, the rows if all sources record them, and the hashes of the source adapters."""
    known = [provenance.read_record(adapter) if (adapter / provenance.RECORD).is_file() else {} for adapter in adapters]
    rows = [record.get("data_sha256") for record in known]
    data = rows[0] if len(rows) == 1 else hashlib.sha256(json.dumps(rows).encode()).hexdigest() if all(rows) else None
    hashes = [hashlib.sha256((adapter / files.WEIGHTS).read_bytes()).hexdigest() for adapter in adapters]
    return provenance.Origin(base.identity, quant, data, how | {"adapter_sha256": hashes})


if __name__ == "__main__":
    entry.run("merge")
