"""The folder that is published: all that others need to load the adapter and to check that it is the trained one.

    adapter_config.json  adapter_model.safetensors     PEFT's files, with the base's hub id
    tokenizer.json  tokenizer_config.json  chat_template.jinja
    lora_ft.json         hashes of base, data and tokenizer; how to load the base; no path of this machine
    probe.safetensors    logits, by which anybody can verify the adapter again
    loss.png             if the run recorded losses
    adapter.gguf  mlx/   with formats=[gguf,mlx]
    README.md            the model card, with the result of the verification
    SHA256SUMS           the hash of every file

The package is written from what was loaded and checked, not copied from the adapter's folder: nothing else can slip in.
The same adapter gives the same bytes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.adapters import files, provenance
from lora_ft.export import mlx
from lora_ft.export.gguf import adapter as gguf_adapter
from lora_ft.io import durable
from lora_ft.models.load import Identity
from lora_ft.publishing import card, checksums, compatibility, curve, verification
from lora_ft.publishing.training_summary import TrainingSummary
from lora_ft.publishing.verification import Verification

CARD, GGUF, MLX = "README.md", "adapter.gguf", "mlx"


@dataclass(frozen=True)
class Contents:
    """An adapter that was loaded onto its base, and the facts about both that a package holds.

    `adapter` is the folder that was loaded and `saved` its config. `loading` tells how its base is loaded on this
    machine; `public` identifies the base for others. `name` is what others load the package by. The base itself is not
    held: the process that verifies the package needs its memory.
    """

    adapter: Path
    saved: LoraConfig
    tokenizer: PreTrainedTokenizerBase
    probe: bytes
    base_config: dict[str, Any]
    quant: config.Quant
    loading: provenance.Loading
    public: Identity
    summary: TrainingSummary | None
    license: str | None
    name: str
    formats: frozenset[config.AdapterFormat]


def assemble(folder: Path, contents: Contents) -> Verification:
    """Write and verify the package; the new folder `folder` gets its name when a new process has loaded it.

    Raises MismatchError if the verification fails, and what the writers of other formats raise; nothing remains then.
    """
    elsewhere = dataclasses.replace(contents.loading, place=str(contents.public.id), revision=contents.public.revision)
    with durable.staged_folder(folder) as staging:
        contents.tokenizer.save_pretrained(staging)
        tensors = dict(sorted(files.read_tensors(contents.adapter).items()))
        fields = files.config_fields(contents.saved, contents.public)
        record = _record(contents, elsewhere, tensors)
        # Written anew, because metadata in the file of somebody else may be private.
        durable.write_bytes(staging / files.WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        durable.write_json(staging / files.CONFIG, fields)
        durable.write_json(staging / provenance.RECORD, record)
        durable.write_bytes(staging / verification.PROBE, contents.probe)
        _write_extras(staging, contents)
        verified = verification.verify(staging, contents.loading, contents.saved)
        verdicts = compatibility.verdicts(staging, contents.base_config)
        text = card.render(card.CardContents(
            contents.name, fields, record, elsewhere, contents.license, contents.summary, verdicts,
            frozenset(checksums.file_names(staging)), verified,
        ))  # fmt: skip
        durable.write_text(staging / CARD, text)
        durable.write_text(staging / checksums.FILE, checksums.render(checksums.compute(staging)))
    return verified


def _record(contents: Contents, elsewhere: provenance.Loading, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return lora_ft.json as it was saved with the adapter, if it was, with the public base and how to load it."""
    recorded = (contents.adapter / provenance.RECORD).is_file()
    kept = provenance.read_record(contents.adapter) if recorded else {"data_sha256": None}
    made = provenance.record(tensors, contents.tokenizer, provenance.Origin(contents.public, contents.quant, ""))
    base = dataclasses.asdict(contents.public) | {"folder": None}
    loading = {key: value for key, value in dataclasses.asdict(elsewhere).items() if key != "device"}
    return made | {key: kept[key] for key in made if key in kept} | {"base": base, "loading": loading}


def _write_extras(folder: Path, contents: Contents) -> None:
    if contents.summary and (drawn := curve.draw(*contents.summary.curves)):
        durable.write_bytes(folder / card.CURVE, drawn)
    if config.AdapterFormat.gguf in contents.formats:
        gguf_adapter.write(folder, contents.base_config, folder / GGUF, contents.saved)
    if config.AdapterFormat.mlx in contents.formats:
        mlx.write(folder, contents.base_config, folder / MLX, contents.saved)
