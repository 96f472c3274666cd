"""Collect the contents of a package from the settings of `publish`: base, license, adapter and training summary."""

import dataclasses
import gc
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_ft import config, runs
from lora_ft.adapters import files, loading, peft_folder, provenance
from lora_ft.config import QuantKind
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.io import untrusted
from lora_ft.models.device import resolve_device
from lora_ft.models.load import Identity
from lora_ft.models.meta_model import load_meta_model
from lora_ft.models.resolve import locate
from lora_ft.models.stored import agreed
from lora_ft.publishing import pissa_to_lora, secret_scan, training_summary, verification
from lora_ft.publishing.package import Contents

HUB = "hf:"
_WITHOUT_FORMATS = "leave out formats; PEFT and transformers load the package"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def contents(cfg: config.PublishRun, adapter: Path, saved: LoraConfig, work: Path) -> Contents:
    """Load the adapter in folder `adapter`, with config `saved`, onto its base, and collect the package's contents.

    Raises ConfigError, before anything is loaded, if the base has no hub id or the hub requires a license and none is
    known.
    """
    base_id, license_name = _base_id(cfg, adapter, saved), _license(cfg)
    if cfg.formats:
        loading.check_generates(adapter, saved, f"formats=[{cfg.formats[0].value}]", _WITHOUT_FORMATS)
    files_of_base = locate(cfg.model, weights=False).stored
    if files_of_base and not files_of_base.trains:
        raise ConfigError(
            f"the files of the base hold its weights in {files_of_base.method}, which lora_ft dequantizes exactly: "
            "transformers and PEFT alone would compute with other weights, so an adapter of this base cannot be "
            "verified: merge it (lora-ft merge), or train it on the model in 16 bits"
        )
    if pissa_to_lora.changes_base(saved):
        if agreed(cfg.quant, files_of_base).kind is not QuantKind.none:
            raise MismatchError(
                f"{adapter}: with init_lora_weights={saved.init_lora_weights} an adapter of a quantized base cannot be "
                "converted to a LoRA of the unchanged base"
            )
        pissa_to_lora.convert(adapter, saved, work / "converted")
        adapter = work / "converted"
        saved = peft_folder.read_config(adapter)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer, saved)
    found = Contents(
        adapter=adapter,
        saved=saved,
        tokenizer=tokenizer,
        probe=verification.make_probe(model, tokenizer),
        base_config=_json_config(base.identity.folder),
        quant=cfg.quant,
        loading=_resized(provenance.loading(base, cfg.quant, cfg.model), adapter, saved, base.identity.folder),
        public=_public(base.identity, base_id, saved),
        summary=training_summary.read(Path(cfg.run).expanduser()) if cfg.run else None,
        license=license_name,
        name=cfg.to.removeprefix(HUB) if cfg.to.startswith(HUB) else "PATH_OF_THIS_FOLDER",
        formats=frozenset(cfg.formats),
        classes=loading.classes_of(adapter, saved),
    )
    del base, model
    gc.collect()  # modules form reference cycles; the process that verifies the package needs the memory of the base
    return found


def _base_id(cfg: config.PublishRun, adapter: Path, saved: LoraConfig) -> str:
    """Return the hub id by which others find the base; raises ConfigError if only a path of this machine is known."""
    named = saved.base_model_name_or_path
    found = (
        cfg.model.hub_id or locate(cfg.model, weights=False).id or (named if untrusted.is_public_id(named) else None)
    )
    if not found:
        raise ConfigError(
            f"the base of {adapter} is known only by a path of this machine ({cfg.model.path or named}), where others "
            "cannot find it: add model.hub_id=OWNER/NAME, the base's id on the hub"
        )
    if not untrusted.is_hub_id(found):
        raise ConfigError(f"model.hub_id must be a hub id, OWNER/NAME, got {found}")
    return found


def _license(cfg: config.PublishRun) -> str | None:
    """Return license=, or the base's own license; raises ConfigError if the hub requires one and none is known."""
    stated = cfg.license or training_summary.license_of(cfg.model, locate(cfg.model, weights=False).folder)
    if not stated and cfg.to.startswith(HUB):
        raise ConfigError("the base states no license, and the hub requires one: add license=NAME (apache-2.0, mit)")
    if stated and not _LICENSE.fullmatch(stated):
        raise ConfigError(f"license must be a name that the hub knows, such as apache-2.0 or mit, got {stated}")
    return stated


def _public(base: Identity, base_id: str, saved: LoraConfig) -> Identity:
    """Return the base under its hub id, or under the name of a file in a package that others can install."""
    revision = base.revision or (saved.revision if saved.base_model_name_or_path == base_id else None)
    path = base.path if base.path.startswith("package:") else base_id
    return dataclasses.replace(base, id=base_id, path=path, folder=None, revision=revision)


def local_paths(cfg: config.PublishRun, adapter: Path, work: Path) -> set[str]:
    """Return the paths of this machine that no published file may name."""
    stored = runs.read_config(Path(cfg.run).expanduser()) if cfg.run else {}
    known = [group.get("path") for name in ("model", "data") if isinstance(group := stored.get(name), dict)]
    base = locate(cfg.model, weights=False).folder
    return secret_scan.local_paths(adapter, cfg.run, cfg.model.path, base, work, *known)


def base_config(model: config.Model) -> dict[str, Any] | None:
    """Return the config.json of the base, or None if the settings name no base."""
    return _json_config(locate(model, weights=False).folder) if model.path else None


def _json_config(folder: str | None) -> dict[str, Any]:
    return untrusted.json_object(Path(str(folder)) / "config.json", ConfigError)


def base_loading(folder: Path, saved: LoraConfig, cfg: config.PublishRun) -> provenance.Loading:
    """Return the arguments that load the base of an adapter folder from this machine, according to the folder's record.

    Raises MismatchError for a record with invalid values, since anybody may have written it, or for another base.
    """
    record = provenance.read_record(folder).get("loading") if (folder / provenance.RECORD).is_file() else None
    record = record if isinstance(record, dict) else {}
    quantization = record.get("quantization")
    compute = quantization.get("bnb_4bit_compute_dtype") if isinstance(quantization, dict) else None
    try:
        model = dataclasses.replace(cfg.model, dtype=config.Dtype(record.get("dtype", cfg.model.dtype.value)))
        quant = dataclasses.replace(cfg.quant, compute_dtype=config.Dtype(compute or cfg.quant.compute_dtype.value))
    except ValueError as error:
        raise MismatchError(f"{folder / provenance.RECORD}: its field loading is invalid: {error}") from None
    identity = locate(model)  # downloads the weights, unlike load_meta_model
    tokenizer, classes = loading.adapter_tokenizer(folder, model), loading.classes_of(folder, saved)
    rows = files.vocabulary_rows(folder, saved)
    base = load_meta_model(model, quant, cfg.device, tokenizer, classes=classes, rows=rows)
    provenance.check_source(folder, saved, base, quant)
    arguments = provenance.loading(base, quant, model)
    device = str(resolve_device(cfg.device))
    arguments = dataclasses.replace(arguments, path=str(identity.folder), revision=None, device=device)
    return _resized(arguments, folder, saved, identity.folder)


def _resized(
    arguments: provenance.Loading, adapter: Path, saved: LoraConfig, base_folder: str | None
) -> provenance.Loading:
    """Return the arguments with the rows of the embedding, if the adapter's file holds a resized one."""
    described = _json_config(base_folder)
    in_base = described.get("text_config", described).get("vocab_size")
    rows = files.vocabulary_rows(adapter, saved)
    return arguments if rows in (None, in_base) else dataclasses.replace(arguments, rows=rows)
