"""Merge an adapter into its base: open -> probe -> write -> load again and compare -> give the folder its name.

lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model dtype=bf16      # loads with transformers alone
lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model.gguf gguf=q8_0  # for llama.cpp, Ollama
lora-ft merge adapters=[runs/a,runs/b] weights=[0.7,0.3] out=both       # one adapter of several
lora-ft merge run=runs/2026-11-23_10-15-00 truncate_rank=8 out=small    # a smaller adapter

The base is never in memory as a whole: its tensors come and go one at a time. A run on a quantized base is added to
what its codes stand for or to the original weights, whichever is better on the rows held out (onto=). Where a check
fails nothing is left.
"""

import gc
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.adapters import files, loading, provenance
from lora_ft.cli import entry, overrides
from lora_ft.data.dataset import TokenRow, prepare
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation.heldout import heldout_loss
from lora_ft.exports import combine, gguf_model, merge, onto, stream, truncate, verify
from lora_ft.io import durable
from lora_ft.models.load import Base
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.training.paths import use_fast_paths
from lora_ft.training.state import evaluation_rows
from lora_ft.values import Dtype, Onto, QuantKind

log = logging.getLogger("lora_ft")

_MEASURED = "merge.json"
_TOKENS_PER_PASS = 1024


def main(cfg: config.MergeRun, invocation: entry.Invocation) -> None:
    """Write the merged model of an adapter into `out`, which is new; or one adapter of several, or a smaller one."""
    out = Path(cfg.out).expanduser()
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={cfg.out} exists already: give it a new name, merge never replaces anything")
    keep_freed_memory()
    places = [_adapter_of(place) for place in cfg.adapters] or [loading.adapter_folder(cfg.run, cfg.adapter_path)]
    cfg = loading.with_base(cfg, places[0])
    tokenizer = loading.adapter_tokenizer(places[0], cfg.model)
    if cfg.adapters:
        _combine(cfg, places, tokenizer, out)
    elif cfg.truncate_rank:
        _truncate(cfg, places[0], tokenizer, out, cfg.truncate_rank)
    else:
        _merge(cfg, places[0], tokenizer, out, invocation.overrides)


def _adapter_of(place: str) -> Path:
    """The adapter of a run folder, or an adapter's own place."""
    is_run = (Path(place).expanduser() / "config.yaml").is_file()
    return loading.adapter_folder(place if is_run else None, None if is_run else place)


def _merge(
    cfg: config.MergeRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, out: Path, typed: list[str]
) -> None:
    opened = stream.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    dtype = opened.base.model.dtype if cfg.dtype is Dtype.auto else getattr(torch, cfg.dtype.value)
    if cfg.gguf:
        dtype = torch.float32  # rounded once, by the file's own type
    target, measured = _target(cfg, adapter, tokenizer, opened, dtype, typed)
    read = opened.original if target is Onto.original else opened.trained_on
    with stream.flowing(opened.model, opened.modules, read):
        expected = verify.probe(opened.model, len(tokenizer))
    merged = merge.Merged(opened.model, read, dtype)
    if cfg.gguf:
        with durable.scratch_folder(out) as folder:
            merge.write(merged, tokenizer, folder)
            distance = verify.check(folder, expected)
            gguf_model.write(folder, out, cfg.gguf)
    else:
        with durable.staged_folder(out) as folder:
            merge.write(merged, tokenizer, folder)
            distance = verify.check(folder, expected)
            if measured:
                durable.write_json(folder / _MEASURED, measured.record())
    if measured and cfg.run:
        durable.write_json(Path(cfg.run).expanduser() / _MEASURED, measured.record())
    num_bytes = out.stat().st_size if cfg.gguf else sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stored = cfg.gguf.value if cfg.gguf else str(dtype).removeprefix("torch.")
    _say(f"merged model in {out} ({num_bytes / 1e9:.2f} GB, {stored}); its logits are {distance:.1e} away from the "
         f"adapter's, {verify.tolerance(dtype):.1e} is allowed")  # fmt: skip


def _target(
    cfg: config.MergeRun,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    opened: stream.Opened,
    dtype: torch.dtype,
    typed: list[str],
) -> tuple[Onto, onto.Measured | None]:
    """Which weights the adapter is added to, and what was measured to know it."""
    if cfg.quant.kind is QuantKind.none:
        if overrides.chosen(typed, "onto"):
            log.warning("onto=%s is without effect: the adapter's base is not quantized", cfg.onto.value)
        return Onto.dequantized, None
    if cfg.onto is not Onto.auto:
        return cfg.onto, None
    rows = _heldout_rows(cfg, tokenizer)
    if not rows:
        log.warning("no row is held out to measure on: merged onto the dequantized base, which it was trained on")
        return Onto.dequantized, None
    log.info(
        "measuring both targets on %d held-out rows; onto=dequantized or onto=original measures nothing", len(rows)
    )
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    measured = onto.measure(
        base.model,
        merge.Merged(opened.model, stream.loaded(base.model, opened.modules), dtype),
        merge.Merged(opened.model, opened.original, dtype),
        rows,
        dtype,
    )
    del base, model
    gc.collect()  # modules refer to each other in circles
    Console().print(measured.table())
    return measured.better, measured


def _heldout_rows(cfg: config.MergeRun, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The rows that train evaluated on; none where data says none, or cannot be read any more."""
    if not cfg.data.path:
        return []
    try:
        return evaluation_rows(prepare(cfg.data, tokenizer), cfg.eval_rows)[0]
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("the held-out rows cannot be read: %s", error)
        return []


def _combine(cfg: config.MergeRun, places: list[Path], tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    weights = cfg.weights or [1 / len(places)] * len(places)
    opened = stream.open_adapter(places[0], cfg.model, cfg.quant, cfg.device, tokenizer)
    combine.check(opened.base, cfg.quant, places)
    made = combine.combine(opened.model, places, weights, cfg.method, cfg.density, cfg.seed)
    how = {"method": cfg.method.value, "weights": weights, "density": cfg.density, "seed": cfg.seed}
    files.write(made.tensors, made.config, out, tokenizer, _origin(opened.base, cfg.quant, places, how))
    _say(f"adapter of rank {made.config.r} in {out}, of {len(places)} by {cfg.method.value}; its update is "
         f"{made.distance:.1%} away from their weighted sum")  # fmt: skip


def _truncate(cfg: config.MergeRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, out: Path, rank: int) -> None:
    saved = truncate.check(adapter, rank)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    found = truncate.pairs(model, loading.NAME)
    rows = _heldout_rows(cfg, tokenizer)
    if not rows:
        log.warning("no row is held out: what a rank keeps is shown by the update's norm alone")
    paths = use_fast_paths(base.model, config.Fast())
    loss = (lambda: heldout_loss(base.model, rows, paths, _TOKENS_PER_PASS).loss) if rows else None
    kept = truncate.table_of(model, loading.NAME, found, rank, loss)
    Console().print(truncate.render(kept, rank))
    small = {layer: pair.cut(rank) for layer, pair in found.items()}
    made_from = _origin(base, cfg.quant, [adapter], {"method": "truncated"})
    files.write(
        truncate.tensors(model, loading.NAME, small), truncate.settings(saved, small), out, tokenizer, made_from
    )
    _say(f"adapter of rank {rank} in {out}")


def _origin(base: Base, quant: config.Quant, adapters: list[Path], how: dict[str, Any]) -> provenance.Origin:
    """Where an adapter made of others comes from: their base, their rows where these are recorded, themselves."""
    known = [provenance.read_record(adapter) if (adapter / provenance.RECORD).is_file() else {} for adapter in adapters]
    rows = [record.get("data_sha256") for record in known]
    data = rows[0] if len(rows) == 1 else hashlib.sha256(json.dumps(rows).encode()).hexdigest() if all(rows) else None
    hashes = [hashlib.sha256((adapter / files.WEIGHTS).read_bytes()).hexdigest() for adapter in adapters]
    return provenance.Origin(base.identity, quant, data, how | {"adapter_sha256": hashes})


def _say(sentence: str) -> None:
    Console().print(sentence, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    entry.run("merge")
