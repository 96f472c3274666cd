"""Write the package: a folder with all that others need to load the adapter and to check that it is the trained one.

    adapter_config.json  adapter_model.safetensors     PEFT's files, with the base's hub id
    tokenizer.json  tokenizer_config.json  chat_template.jinja
    lora_ft.json         hashes of base, data and tokenizer; arguments to load the base; no path of this machine
    probe.safetensors    logits, with which anybody can verify the adapter again
    loss.png             if the run recorded losses
    adapter.gguf  mlx/   with formats=[gguf,mlx]
    README.md            the model card, with the result of the verification
    SHA256SUMS           the hash of every file

The package is written from what was loaded and checked, not copied from the adapter's folder, so that it holds no other
files. The same adapter gives the same bytes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.adapters import labels as adapter_labels
from lora_ft.classes import Classes
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

    `adapter` is the folder that was loaded and `saved` its config. `loading` has the arguments that load the base on
    this machine; `public` identifies the base for others. `name` is the hub id from which others load the package, or a
    placeholder. The base itself is not held, because the process that verifies the package needs its memory.
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
    classes: Classes | None = None


def assemble(folder: Path, contents: Contents) -> Verification:
    """Write the package and verify it in a new process; `folder` exists only if the verification succeeds.

    Raises MismatchError if the verification fails, and the errors of the writers of other formats.
    """
    public_loading = dataclasses.replace(
        contents.loading, path=str(contents.public.id), revision=contents.public.revision
    )
    with durable.staged_folder(folder) as staging:
        contents.tokenizer.save_pretrained(staging)
        tensors = dict(sorted(files.read_tensors(contents.adapter).items()))
        fields = files.config_fields(contents.saved, contents.public)
        record = _record(contents, public_loading, tensors)
        # Saved again, because the metadata of the original file may be private.
        files.write_weights(staging, tensors)
        durable.write_json(staging / peft_folder.CONFIG, fields)
        durable.write_json(staging / provenance.RECORD, record)
        durable.write_bytes(staging / verification.PROBE, contents.probe)
        _write_extras(staging, contents)
        verified = verification.verify(staging, contents.loading)
        verdicts = compatibility.verdicts(staging, contents.base_config)
        text = card.render(card.CardContents(
            contents.name, fields, record, public_loading, contents.license, contents.summary, verdicts,
            frozenset(checksums.file_names(staging)), verified,
        ))  # fmt: skip
        durable.write_text(staging / CARD, text)
        durable.write_text(staging / checksums.FILE, checksums.render(checksums.compute(staging)))
    return verified


def _record(contents: Contents, public_loading: provenance.Loading, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the contents of lora_ft.json: the adapter's own record if it has one, with the public base."""
    has_record = (contents.adapter / provenance.RECORD).is_file()
    kept = provenance.read_record(contents.adapter) if has_record else {}
    template = provenance.template_of(kept)
    source = provenance.Provenance(contents.public, contents.quant, None, template=template, classes=contents.classes)
    record = provenance.record(tensors, contents.tokenizer, source)
    base = provenance.base_fields(contents.public)
    loading = {key: value for key, value in dataclasses.asdict(public_loading).items() if key != "device"}
    own = {key: kept[key] for key in (*record, *adapter_labels.KEYS) if key in kept}
    return record | own | {"base": base, "loading": loading}


def _write_extras(folder: Path, contents: Contents) -> None:
    if contents.summary and (drawn := curve.draw(*contents.summary.curves)):
        durable.write_bytes(folder / card.CURVE, drawn)
    if config.AdapterFormat.gguf in contents.formats:
        gguf_adapter.write(folder, contents.base_config, folder / GGUF)
    if config.AdapterFormat.mlx in contents.formats:
        mlx.write(folder, contents.base_config, folder / MLX)
