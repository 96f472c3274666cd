"""The folder that is published: what others need to load the adapter, and to see that it is the one that was trained.

    adapter_config.json  adapter_model.safetensors     PEFT's, the base by its hub id
    tokenizer.json  tokenizer_config.json  chat_template.jinja
    lora_ft.json         hashes of base, data and tokenizer; how the base is loaded; no path of this machine
    probe.safetensors    logits, by which anybody can prove the adapter again
    loss.png  adapter.gguf  mlx/                        where there are losses; with also=[gguf,mlx]
    README.md  SHA256SUMS                               the card, which holds the proof; and the hash of every file

It is made of what was loaded and checked, not of files that lay in the adapter's folder: nothing else can come along.
The same adapter gives the same bytes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.adapters import files, provenance
from lora_ft.adapters.loading import adapter_tokenizer
from lora_ft.errors import MismatchError
from lora_ft.exports import gguf_adapter, mlx
from lora_ft.io import durable
from lora_ft.models.load import Identity, resolve_device
from lora_ft.models.locate import locate
from lora_ft.models.meta_model import load_skeleton
from lora_ft.publishing import card, curve, lint, proof, sums
from lora_ft.publishing.proof import Proof
from lora_ft.publishing.story import Story

CARD, GGUF, MLX = "README.md", "adapter.gguf", "mlx"


@dataclass(frozen=True)
class Contents:
    """What a package is made of: an adapter that was loaded onto its base, and what is told of them.

    `adapter` is the folder that was loaded, `loading` how its base is loaded on this machine; `public` names the base
    for others, and nothing of this machine. `name` is by what they will load the package. The base is not held: the
    process that proves the package needs its memory.
    """

    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    probe: bytes
    base_config: dict[str, Any]
    quant: config.Quant
    loading: provenance.Loading
    public: Identity
    story: Story | None
    license: str | None
    name: str
    also: tuple[config.Also, ...]


def assemble(place: Path, contents: Contents) -> Proof:
    """Make the package in the new folder `place`, which gets its name when a fresh process has loaded and proven it.

    Raises MismatchError where that fails, and what the writers of other formats raise; nothing is left then.
    """
    elsewhere = dataclasses.replace(contents.loading, place=str(contents.public.id), revision=contents.public.revision)
    with durable.staged_folder(place) as staging:
        contents.tokenizer.save_pretrained(staging)
        tensors = dict(sorted(files.read_tensors(contents.adapter).items()))
        fields = files.config_fields(files.read_config(contents.adapter), contents.public)
        record = _record(contents, elsewhere, tensors)
        # Written anew: metadata of a stranger's file stay behind.
        durable.write_bytes(staging / files.WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        durable.write_json(staging / files.CONFIG, fields)
        durable.write_json(staging / provenance.RECORD, record)
        durable.write_bytes(staging / proof.PROBE, contents.probe)
        _write_extras(staging, contents)
        proven = proof.prove(staging, contents.loading)
        verdicts = lint.lint(staging, contents.base_config)
        subject = card.Subject(
            contents.name, fields, record, elsewhere, contents.license, contents.story, verdicts,
            frozenset(sums.names(staging)), proven,
        )  # fmt: skip
        durable.write_text(staging / CARD, card.render(subject))
        durable.write_text(staging / sums.SUMS, sums.render(sums.measured(staging)))
    return proven


def _record(contents: Contents, elsewhere: provenance.Loading, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """lora_ft.json as it was when lora_ft saved the adapter, if it did; the base by its id, and how to load it."""
    recorded = (contents.adapter / provenance.RECORD).is_file()
    kept = provenance.read_record(contents.adapter) if recorded else {"data_sha256": None}
    made = provenance.record(tensors, contents.tokenizer, provenance.Origin(contents.public, contents.quant, ""))
    base = dataclasses.asdict(contents.public) | {"folder": None}
    loading = {key: value for key, value in dataclasses.asdict(elsewhere).items() if key != "device"}
    return made | {key: kept[key] for key in made if key in kept} | {"base": base, "loading": loading}


def _write_extras(folder: Path, contents: Contents) -> None:
    if contents.story and (drawn := curve.draw(*contents.story.curves)):
        durable.write_bytes(folder / card.CURVE, drawn)
    if config.Also.gguf in contents.also:
        gguf_adapter.write(folder, contents.base_config, folder / GGUF)
    if config.Also.mlx in contents.also:
        mlx.write(folder, contents.base_config, folder / MLX)


def loading(folder: Path, model: config.Model, quant: config.Quant, device: str) -> provenance.Loading:
    """How an adapter's base is loaded from where it lies on this machine, as the folder's record says, if it has one.

    A record is a stranger's: MismatchError where it says what lora_ft never writes, or where this is another base.
    """
    told = provenance.read_record(folder).get("loading") if (folder / provenance.RECORD).is_file() else None
    told = told if isinstance(told, dict) else {}
    quantization = told.get("quantization")
    compute = quantization.get("bnb_4bit_compute_dtype") if isinstance(quantization, dict) else None
    try:
        model = dataclasses.replace(model, dtype=config.Dtype(told.get("dtype", model.dtype.value)))
        quant = dataclasses.replace(quant, compute_dtype=config.Dtype(compute or quant.compute_dtype.value))
    except ValueError as error:
        raise MismatchError(f"{folder / provenance.RECORD} does not say how its base is loaded: {error}") from None
    place = locate(model)  # with its weights, which a skeleton does not fetch
    base = load_skeleton(model, quant, device, adapter_tokenizer(folder, model))
    provenance.check_source(folder, files.read_config(folder), base, quant)
    made = provenance.loading(base, quant, model)
    return dataclasses.replace(made, place=str(place.folder), revision=None, device=str(resolve_device(device)))
