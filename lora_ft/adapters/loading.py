"""Load a base with an adapter, which is named by a run, a folder or a hub id.

run=runs/2026-11-23_10-15-00       runs/2026-11-23_10-15-00/adapter
adapter_path=./somebodys-adapter   that folder
adapter_path=owner/name            downloaded: JSON, safetensors, templates, tokenizer files, the card, nothing else

A run brings its base; an adapter made elsewhere names one, in lora_ft.json or in PEFT's own file (`with_base`).
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs, validation
from lora_ft.adapters import files, provenance
from lora_ft.errors import ConfigError, MismatchError, ResourceError
from lora_ft.io import untrusted
from lora_ft.models import resolve
from lora_ft.models.load import Base, load_base, load_tokenizer, read_tokenizer
from lora_ft.ops.allocator import keep_freed_memory

log = logging.getLogger("lora_ft")

NAME = "default"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter's folder on this machine; ConfigError where there is none, ResourceError where it must be fetched."""
    if run:
        path = runs.adapter_folder(Path(run).expanduser())
        untrusted.check_place(path, path.parent)
        return path
    path = Path(adapter_path or "").expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(adapter_path).startswith((".", "~")) or str(adapter_path).count("/") != 1:
        raise ConfigError(f"adapter_path={adapter_path}: there is no such folder, and it is no hub id (OWNER/NAME)")
    return _download(str(adapter_path))


def _download(hub_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"]))
    except errors.HFValidationError:
        raise ConfigError(f"adapter_path={hub_id} is neither a folder nor a hub id (OWNER/NAME)") from None
    except errors.RepositoryNotFoundError:
        raise ResourceError(f"adapter_path={hub_id} is not on the hub, or private: check the name, or log in") from None
    # Offline, no network, or a hub that answers with an error: the same remedy for all three.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError):  # type: ignore[attr-defined]
        raise ResourceError(
            f"adapter_path={hub_id} is not on this machine and the hub cannot be reached: "
            "download it where there is a network, and give its folder"
        ) from None
    except OSError as error:
        raise ResourceError(f"adapter_path={hub_id} cannot be stored on this machine: {error}") from None


Settings = TypeVar("Settings", config.EvalRun, config.ChatRun, config.MergeRun, config.PublishRun)


def with_base(cfg: Settings, adapter: Path, saved: LoraConfig | None = None) -> Settings:
    """Fill in the quantization that an adapter's record names and, for an adapter made elsewhere, its base.

    A setting that has a value stays as it is; `saved` is the adapter's config if it was read already. Logs which base
    was taken, and what of it cannot be checked. Raises ConfigError if the adapter names no base that could be found.
    """
    recorded = _record(adapter)
    quant = _quant(cfg.quant, adapter, recorded)
    if cfg.run:
        return replace(cfg, quant=quant)
    named = saved or files.read_config(adapter)
    tokens = cfg.model.added_tokens or (_added_tokens(adapter, named.trainable_token_indices) if recorded else [])
    if cfg.model.path:
        return replace(cfg, model=replace(cfg.model, added_tokens=tokens), quant=quant)
    if recorded:
        model = replace(_recorded_base(cfg.model, recorded["base"]), added_tokens=tokens)
    else:
        model = _named_base(cfg.model, str(named.base_model_name_or_path or ""), named.revision)
    if not model.path:
        raise ConfigError(
            f"{adapter} does not say where its base is found (it names {named.base_model_name_or_path}): "
            "add model=NAME, or model=local model.path=PLACE"
        )
    place = model.path + (f" (revision {model.revision})" if model.revision else "")
    if recorded:
        log.warning("the base is %s, as %s has it", place, adapter / provenance.RECORD)
    else:
        log.warning(
            "the base is %s, by its name alone: %s has no %s, so that nothing tells whether its weights, its "
            "quantization and its chat template are those that it was trained with", place, adapter, provenance.RECORD,
        )  # fmt: skip
    return replace(cfg, model=model, quant=quant)


def _record(adapter: Path) -> dict[str, Any] | None:
    path = adapter / provenance.RECORD
    untrusted.check_place(path, adapter)
    return provenance.read_record(adapter) if path.is_file() else None


def _recorded_base(model: config.Model, base: dict[str, Any]) -> config.Model:
    """The hub id where its commit is recorded; else the place on this machine, if it is still there; else the id."""
    named, path, revision = (str(base.get(key) or "") for key in ("id", "path", "revision"))
    if untrusted.is_hub_id(named) and revision:
        return replace(model, path=named, hub_id=named, revision=revision)
    if _is_here(path):
        return replace(model, path=path, hub_id=model.hub_id or (named if untrusted.is_hub_id(named) else None))
    return replace(model, path=named, hub_id=named) if untrusted.is_hub_id(named) else model


def _named_base(model: config.Model, named: str, revision: str | None) -> config.Model:
    if _is_here(named):
        return replace(model, path=named)
    return replace(model, path=named, revision=revision or model.revision) if untrusted.is_hub_id(named) else model


def _is_here(path: str) -> bool:
    """A place of this machine that a model is loaded from; the loader checks what lies there."""
    place = Path(path or "/nowhere")
    return path.startswith("package:") or place.is_dir() or (place.suffix == ".gguf" and place.is_file())


def _quant(given: config.Quant, adapter: Path, recorded: dict[str, Any] | None) -> config.Quant:
    """Replace each unset (None) setting by the one recorded, or by the default if there is no record."""
    kind: config.QuantKind | None = given.kind
    double: bool | None = given.double
    known = _recorded_quant(adapter, recorded) if recorded and None in (kind, double) else config.Quant()
    return config.Quant(
        known.kind if kind is None else kind, known.double if double is None else double, given.compute_dtype
    )


def _recorded_quant(adapter: Path, recorded: dict[str, Any]) -> config.Quant:
    found = recorded.get("quant")
    names = [kind.value for kind in config.QuantKind]
    if not isinstance(found, dict) or found.get("kind") not in names or not isinstance(found.get("double", True), bool):
        raise MismatchError(f"{adapter / provenance.RECORD}: quant must hold a kind of {', '.join(names)}, got {found}")
    return config.Quant(config.QuantKind(found["kind"]), found.get("double", True))


def _added_tokens(adapter: Path, rows: Any) -> list[str]:
    """The tokens that a run of ours added to its base: those whose rows its adapter trains."""
    if not rows:
        return []
    tokenizer = _own_tokenizer(adapter)
    ids = {i for matrix in (rows.values() if isinstance(rows, dict) else [rows]) for i in matrix}
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < len(tokenizer)]:
        raise MismatchError(
            f"{adapter} trains a row for token {wrong[0]}, and its tokenizer has {len(tokenizer)} tokens"
        )
    tokens: list[str] = tokenizer.convert_ids_to_tokens(sorted(ids))
    return tokens


def adapter_tokenizer(folder: Path, model: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer and template that the adapter was trained with, which lie beside it; else the base's.

    Only they give the adapter the tokens that it knows: `model.chat_template` counts where neither is there.
    """
    if not all((folder / name).is_file() for name in _TOKENIZER_FILES):
        return load_tokenizer(model)
    tokenizer = _own_tokenizer(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(replace(model, added_tokens=[])).chat_template
    return tokenizer


def _own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    untrusted.check_folder(folder)
    resolve.check_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, str(folder))
    return tokenizer


def load(cfg: config.ChatRun) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the adapter that `run` or `adapter_path` names onto its base, for inference."""
    validation.validate(cfg)
    keep_freed_memory()
    adapter = adapter_folder(cfg.run, cfg.adapter_path)
    cfg = with_base(cfg, adapter)
    tokenizer = adapter_tokenizer(adapter, cfg.model)
    _, model = open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    return model, tokenizer


def open_adapter(
    folder: Path,
    model: config.Model,
    quant: config.Quant,
    device: str,
    tokenizer: PreTrainedTokenizerBase,
    saved: LoraConfig | None = None,
) -> tuple[Base, PeftModel]:
    """Load the base and put the adapter onto it for inference, under the name `NAME`.

    `saved` is the adapter's config if it was read already.
    Raises MismatchError where the adapter was made for another base, does not fit it to the last key and
    shape, or is of a kind that cannot be told apart from its base; and what `load_base` raises.
    """
    saved = saved or files.read_config(folder)
    base = load_base(model, quant, device, tokenizer)
    provenance.check_source(folder, saved, base, quant)
    return base, files.load(base.model, folder, NAME, saved)
