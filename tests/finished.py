"""Run folders as train writes them, made without training, with random matrices in the adapter.

run = finished_run(tmp_path, "llama", use_dora=True)     # run/config.yaml, run/adapter/..., the base and rows beside it
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import tiny_folder

from lora_ft import config, runs, validation
from lora_ft.adapters import attach, files, provenance
from lora_ft.cli import entry
from lora_ft.data.dataset import prepare
from lora_ft.models.load import Base, load_base, load_tokenizer
from lora_ft.publishing import checksums

QUESTIONS = [
    ("What is the capital of France?", "Paris."),
    ("How many legs does a spider have?", "Eight."),
    ("How many legs does an insect have?", "Six."),
    ("Translate to German: good morning.", "Guten Morgen!"),
    ("What is close to pi?", "3.14"),
    ("Who lived under the tree?", "Nobody knows."),
]


def rows_file(folder: Path, pairs: list[tuple[str, str]] = QUESTIONS) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), "utf-8")
    return path


def settings(tmp_path: Path, family: str, *, tie: bool = False, quant: str = "none", **adapter: Any) -> config.TrainRun:
    """Create a base of this family and a file of rows in `tmp_path`; return the settings of a run on them."""
    base = tmp_path / family if (tmp_path / family).is_dir() else tiny_folder(tmp_path, family, tie=tie)
    cfg = config.TrainRun()
    cfg.model.path, cfg.device = str(base), "cpu"
    cfg.model.dtype = config.Dtype.float32
    cfg.quant.kind = config.QuantKind[quant]
    cfg.data.path, cfg.data.eval_fraction = str(rows_file(tmp_path)), 0.4
    cfg.adapter = dataclasses.replace(cfg.adapter, **({"r": 4} | adapter))
    return cfg


def adapted(cfg: config.TrainRun) -> tuple[Base, PeftModel]:
    """Attach an adapter that changes the logits: none of its tensors is zero, and magnitudes are changed."""
    base = load_base(cfg.model, cfg.quant, cfg.device, load_tokenizer(cfg.model))
    tokens = base.tokenizer.convert_tokens_to_ids(cfg.model.added_tokens)
    model = attach.attach(base.model, cfg.adapter, "first", 0, tokens)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attach.trainable(model, "first").values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return base, model.eval()


def saved_adapter(tmp_path: Path, family: str, **options: Any) -> tuple[PeftModel, Path]:
    """Attach a random adapter to a tiny model; return both, and the adapter's folder beside the base's."""
    cfg = settings(tmp_path, family, **options)
    base, model = adapted(cfg)
    files.save(
        model, "first", tmp_path / "adapter", base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d")
    )
    return model, tmp_path / "adapter"


def finished_run(tmp_path: Path, family: str, *, name: str = "run", **options: Any) -> Path:
    """Create a run folder with an adapter in it; `options` are those of `settings`."""
    cfg = settings(tmp_path, family, **options)
    return saved_run(tmp_path / name, cfg)


def saved_run(folder: Path, cfg: config.TrainRun) -> Path:
    runs.create(folder, validation.to_plain(cfg), [])
    base, model = adapted(cfg)
    source = provenance.Provenance(base.identity, cfg.quant, prepare(cfg.data, base.tokenizer).report.sha256)
    files.save(model, "first", folder / "adapter", base.tokenizer, source)
    return folder


def call(command: str, *overrides: str) -> int:
    """Run a command in this process as the command line does; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        entry.run(command, [*overrides, "device=cpu"])
    return int(ended.value.code or 0)


def package(folder: Path, files: dict[str, bytes]) -> Path:
    """Create a folder of these files and their SHA256SUMS."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / checksums.FILE).write_text(checksums.render(checksums.compute(folder)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {name: (folder / name).read_bytes() for name in checksums.file_names(folder)}
