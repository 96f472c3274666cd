"""Merge an adapter into its base: open -> probe -> write -> load again and compare -> give the folder its name.

lora-ft merge run=runs/2026-11-23_10-15-00 out=my-model dtype=bfloat16

The folder loads with AutoModelForCausalLM.from_pretrained(out) alone. Where the check fails nothing is left.
"""

import gc
from pathlib import Path

from rich.console import Console

from lora_ft import config, durable, entry
from lora_ft.adapters import source
from lora_ft.errors import ConfigError
from lora_ft.exports import merge, verify
from lora_ft.models.load import resolve_dtype
from lora_ft.ops.allocator import keep_freed_memory


def main(cfg: config.MergeRun, invocation: entry.Invocation) -> None:
    """Write the merged model of a run, or of an adapter made elsewhere, into the new folder `out`."""
    out = Path(cfg.out).expanduser()
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={cfg.out} exists already: name a new folder, merge never replaces one")
    keep_freed_memory()
    adapter = source.adapter_folder(cfg.run, cfg.adapter_path)
    tokenizer = source.adapter_tokenizer(adapter, cfg.model)
    base, model = source.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    dtype = base.model.dtype if cfg.dtype is config.Dtype.auto else resolve_dtype(cfg.dtype, base.model.device)
    with durable.staged_folder(out) as staging:
        expected = verify.probe(model, len(tokenizer))
        merge.write(model, tokenizer, staging, dtype)
        del base, model
        gc.collect()  # modules refer to each other in circles: without this, both models would be in memory below
        distance = verify.check(staging, expected)
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    Console().print(
        f"merged model in {out} ({num_bytes / 1e9:.2f} GB, {dtype}); its logits are {distance:.1e} away from the "
        f"adapter's, {verify.tolerance(dtype):.1e} is allowed",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    entry.run("merge")
