"""Merge an adapter into its base: load, measure, write, load the result again, compare logits.

lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model dtype=bf16      # loads with plain transformers
lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model.gguf gguf=q8_0  # for llama.cpp, Ollama
lora-ft merge adapters=[runs/a,runs/b] weights=[0.7,0.3] out=both       # combine adapters into one
lora-ft merge run=runs/2026-11-23_10-15-00 truncate_rank=8 out=small    # a smaller adapter

The adapter of a quantized run is added to the dequantized or to the original weights, whichever has the lower loss on
the eval set (base_weights=). If a check fails, nothing is written.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, mixing, objectives, validation
from lora_ft.adapters import files, loading, peft_folder, provenance
from lora_ft.cli import entry
from lora_ft.data.mixed_dataset import prepare
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation.loss import eval_loss
from lora_ft.export import combine, merge_base, truncate, verify
from lora_ft.export.gguf import model as gguf_model
from lora_ft.export.merge import MergedModel, check, write_folder
from lora_ft.export.weight_stream import use_placeholders
from lora_ft.io import durable
from lora_ft.models.acceleration import accelerated
from lora_ft.models.device import resolve_device, resolve_dtype, selected
from lora_ft.models.load import Base, load_base
from lora_ft.models.meta_model import load_meta_model
from lora_ft.models.resolve import locate
from lora_ft.training.state import choose_eval
from lora_ft.values import BaseWeights, Dtype, QuantKind

log = logging.getLogger("lora_ft")

_COMPARISON = "merge.json"
_AS_FOLDER = "leave out gguf, and transformers or vLLM loads the folder as a classifier"
_TOKENS_PER_PASS = 1024


@dataclass(frozen=True)
class MergeResult:
    """The folder or file that was written, a sentence about it, and the measurements; None if not applicable.

    distance: relative distance of a merged model's logits from the adapter's, or of a combined adapter's update from
    the weighted sum of its sources' updates. comparison: of the base weights of a quantized run. rank, ranks: of a
    smaller adapter, and the loss at each rank.
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

    If `cfg` names no base, the base is the one that the adapter's record names. Raises ConfigError, MismatchError for
    an adapter that cannot be merged, NonFiniteError for weights that overflow, ResourceError for a full disk.
    """
    validation.validate(cfg)
    out = Path(cfg.out).expanduser()
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={cfg.out} exists already, and merge never replaces anything: choose a new name")
    adapters = _adapters(cfg)
    cfg = loading.with_base(cfg, adapters[0])
    saved = peft_folder.read_config(adapters[0])
    if cfg.gguf:
        loading.check_generates(adapters[0], saved, "llama.cpp", _AS_FOLDER)
    classes = loading.classes_of(adapters[0], saved)
    cfg = replace(cfg, objective=objectives.of_adapter(cfg.objective, classes))
    objective = objectives.find(cfg.objective, classes)
    tokenizer = loading.adapter_tokenizer(adapters[0], cfg.model)
    with selected(resolve_device(cfg.device)):
        if cfg.adapters:
            return _combine(cfg, adapters, tokenizer, out)
        if cfg.truncate_rank:
            return _truncate(cfg, adapters[0], objective, tokenizer, out, cfg.truncate_rank)
        return _merge(cfg, adapters[0], objective, tokenizer, out)


def _adapters(cfg: config.MergeRun) -> list[Path]:
    """Return the adapter folders; each of `cfg.adapters` is a run folder or an adapter."""
    if not cfg.adapters:
        return [loading.adapter_folder(cfg.run, cfg.adapter_path)]
    is_run = {path: (Path(path).expanduser() / "config.yaml").is_file() for path in cfg.adapters}
    return [loading.adapter_folder(path if is_run[path] else None, path) for path in cfg.adapters]


def _merge(
    cfg: config.MergeRun,
    adapter: Path,
    objective: objectives.Objective,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
) -> MergeResult:
    check(adapter, peft_folder.read_config(adapter))
    base_dtype = resolve_dtype(cfg.model.dtype, resolve_device(cfg.device))
    dtype = base_dtype if cfg.dtype is Dtype.auto else getattr(torch, cfg.dtype.value)
    if cfg.gguf:
        gguf_model.check(Path(str(locate(cfg.model, weights=False).folder)), tokenizer)
        dtype = torch.float32  # rounded once, to the type of the file
    merged, expected, comparison = _merged_model(cfg, adapter, objective, tokenizer, dtype)
    # A GGUF file is made from the verified folder, which is then removed.
    with durable.scratch_folder(out) if cfg.gguf else durable.staged_folder(out) as folder:
        write_folder(merged, tokenizer, folder)
        merged.release()
        distance, allowed = verify.check(folder, expected)
        if cfg.gguf:
            gguf_model.write(folder, out, cfg.gguf)
        elif comparison:
            durable.write_json(folder / _COMPARISON, comparison.record())
    if comparison and cfg.run:
        durable.write_json(Path(cfg.run).expanduser() / _COMPARISON, comparison.record())
    num_bytes = out.stat().st_size if cfg.gguf else sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stored = cfg.gguf.value if cfg.gguf else str(dtype).removeprefix("torch.")
    summary = (
        f"merged model in {out} ({num_bytes / 1e9:.2f} GB, {stored}); its logits are {distance:.1e} away from the "
        f"adapter's, {allowed:.1e} is allowed"
    )
    return MergeResult(out, summary, distance, comparison)


def _merged_model(
    cfg: config.MergeRun,
    adapter: Path,
    objective: objectives.Objective,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> tuple[MergedModel, verify.Probe, merge_base.Comparison | None]:
    """Return the merged model, the attached adapter's logits, and the comparison of base weights if it was needed."""
    kinds, rows = _candidates(cfg, objective, tokenizer)
    models = {kind: _attached(cfg, adapter, tokenizer, kind) for kind in kinds}
    merged = {kind: MergedModel(model, dtype) for kind, model in models.items()}
    comparison, kind = None, kinds[0]
    if len(kinds) > 1:
        comparison = merge_base.compare(models[BaseWeights.dequantized].get_base_model(), merged, rows)
        kind = comparison.better
    return merged[kind], verify.probe(models[kind], len(tokenizer)), comparison


def _candidates(
    cfg: config.MergeRun, objective: objectives.Objective, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[BaseWeights], Sequence[Example]]:
    """Return the base weights to choose from, and the eval rows to compare them on."""
    files = locate(cfg.model, weights=False).stored
    if files and files.trains:
        if cfg.base_weights is BaseWeights.original:
            raise ConfigError(
                f"base_weights=original: the files of this base hold its weights in {files.kind.value} "
                f"({files.method}), and there are no others: leave out base_weights"
            )
        return [BaseWeights.dequantized], []
    if cfg.quant.kind is QuantKind.none:
        if cfg.base_weights is not BaseWeights.auto:
            log.warning("base_weights=%s has no effect: the adapter's base is not quantized", cfg.base_weights.value)
        return [BaseWeights.original], []
    if cfg.base_weights is not BaseWeights.auto:
        return [cfg.base_weights], []
    rows = _eval_examples(cfg, objective, tokenizer)
    if not rows:
        log.warning(
            "no eval rows to compare the base weights on: the adapter is added to the dequantized weights, "
            "which it was trained on"
        )
        return [BaseWeights.dequantized], []
    log.info(
        "comparing dequantized and original weights on %d eval rows; base_weights=dequantized or base_weights=original "
        "skips this",
        len(rows),
    )
    return [BaseWeights.dequantized, BaseWeights.original], rows


def _attached(cfg: config.MergeRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, kind: BaseWeights) -> PeftModel:
    """Load the adapter onto its quantized base, or onto the original weights, which are kept on the CPU."""
    if kind is BaseWeights.dequantized:
        return loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)[1]
    dtype = Dtype(str(resolve_dtype(cfg.model.dtype, resolve_device(cfg.device))).removeprefix("torch."))
    if dtype is Dtype.float16:  # which CPUs do not compute in
        dtype = Dtype.float32
    saved = peft_folder.read_config(adapter)
    classes, rows = loading.classes_of(adapter, saved), files.vocabulary_rows(adapter, saved)
    base = load_base(replace(cfg.model, dtype=dtype), config.Quant(), "cpu", tokenizer, classes=classes, rows=rows)
    provenance.check_source(adapter, saved, base, cfg.quant)
    return files.load(base.model, adapter, loading.NAME, saved)


def _eval_examples(
    cfg: config.MergeRun, objective: objectives.Objective, tokenizer: PreTrainedTokenizerBase
) -> Sequence[Example]:
    """Return the eval set of the training run; empty if the run had no eval set or it can no longer be read."""
    if not mixing.has_rows(cfg.data):
        return []
    try:
        data = objectives.data_of(cfg.objective, cfg.data)
        return choose_eval(prepare(data, tokenizer, objective.examples), cfg.eval_rows)[0]
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("the eval rows cannot be read: %s", error)
        return []


def _combine(cfg: config.MergeRun, adapters: list[Path], tokenizer: PreTrainedTokenizerBase, out: Path) -> MergeResult:
    weights = cfg.weights or [1 / len(adapters)] * len(adapters)
    meta_model = load_meta_model(cfg.model, cfg.quant, cfg.device, tokenizer)
    base = replace(meta_model, identity=locate(cfg.model))  # with the hashes of its weights
    combine.check(base, cfg.quant, adapters)
    use_placeholders(base.model)
    model = files.load(base.model, adapters[0], loading.NAME, placeholders=True)
    combined = combine.combine(model, adapters, weights, cfg.method, cfg.density, cfg.seed)
    how = {"method": cfg.method.value, "weights": weights, "density": cfg.density, "seed": cfg.seed}
    files.write(combined.tensors, combined.config, out, tokenizer, _origin(base, cfg.quant, adapters, how))
    summary = (
        f"adapter of rank {combined.config.r} in {out}, of {len(adapters)} by {cfg.method.value}; its update is "
        f"{combined.distance:.1%} away from their weighted sum"
    )
    return MergeResult(out, summary, combined.distance, rank=combined.config.r)


def _truncate(
    cfg: config.MergeRun,
    adapter: Path,
    objective: objectives.Objective,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rank: int,
) -> MergeResult:
    saved = truncate.check(adapter, rank)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    found = truncate.updates(model, loading.NAME)
    rows = _eval_examples(cfg, objective, tokenizer)
    if not rows:
        log.warning("no eval rows: the table shows only how much of the update's norm each rank keeps")
    with accelerated(base.model, config.Fast()) as made:

        def loss() -> float:
            return eval_loss(base.model, objective.loss, rows, made.paths, _TOKENS_PER_PASS).loss

        ranks = truncate.compare_ranks(model, loading.NAME, found, rank, loss if rows else None)
    small = {layer: update.truncated(rank) for layer, update in found.items()}
    origin = _origin(base, cfg.quant, [adapter], {"method": "truncated"})
    tensors, settings = truncate.tensors(model, loading.NAME, small), truncate.settings(saved, small)
    files.write(tensors, settings, out, tokenizer, origin)
    return MergeResult(out, f"adapter of rank {rank} in {out}", rank=rank, ranks=ranks)


def _origin(base: Base, quant: config.Quant, adapters: list[Path], how: dict[str, Any]) -> provenance.Provenance:
    """Return the base, the rows if all sources record them, and the hashes of the source adapters."""
    known = [provenance.read_record(adapter) if (adapter / provenance.RECORD).is_file() else {} for adapter in adapters]
    rows = [record.get("data_sha256") for record in known]
    data = rows[0] if len(rows) == 1 else hashlib.sha256(json.dumps(rows).encode()).hexdigest() if all(rows) else None
    hashes = [hashlib.sha256((adapter / peft_folder.WEIGHTS).read_bytes()).hexdigest() for adapter in adapters]
    classes = loading.classes_of(adapters[0], peft_folder.read_config(adapters[0]))
    labels = list(classes.names) if classes else None
    made_from, template = how | {"adapter_sha256": hashes}, provenance.template_of(known[0])
    return provenance.Provenance(base.identity, quant, data, made_from, template, labels, classes)


if __name__ == "__main__":
    entry.run("merge")
