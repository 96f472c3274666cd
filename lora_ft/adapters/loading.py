"""Load a base with the adapter of a run, a folder or a hub id.

run=runs/2026-11-23_10-15-00       runs/2026-11-23_10-15-00/adapter
adapter_path=./somebodys-adapter   that folder
adapter_path=owner/name            downloaded: only JSON, safetensors, templates, tokenizer files and the card

A run records its base. Any other adapter names one, in lora_ft.json or in PEFT's own file (`with_base`).
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs, validation
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.classes import HEAD, SEQ_CLS, Classes, from_record, listed, unnamed
from lora_ft.data.template_variables import with_defaults
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.io import untrusted
from lora_ft.models import resolve
from lora_ft.models.load import Base, load_base, load_tokenizer, read_tokenizer

log = logging.getLogger("lora_ft")

NAME = "default"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """Return the adapter's folder on this machine; download it if `adapter_path` is a hub id.

    Raises ConfigError if there is no such folder, and ResourceError if the download fails.
    """
    if run:
        path = runs.adapter_folder(Path(run).expanduser())
        untrusted.check_place(path, path.parent)
        return path
    path = Path(adapter_path or "").expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(adapter_path).startswith((".", "~")) or str(adapter_path).count("/") != 1:
        raise ConfigError(f"adapter_path={adapter_path}: there is no such folder, and it is not a hub id (OWNER/NAME)")
    return resolve.download("adapter_path", str(adapter_path), None, _DOWNLOADED)


Settings = TypeVar("Settings", config.EvalRun, config.ChatRun, config.MergeRun, config.PublishRun)


def with_base(cfg: Settings, adapter: Path, saved: LoraConfig | None = None) -> Settings:
    """Fill in unset settings of an adapter's base: its quantization, and without a run also its model.

    `saved` is the adapter's config if it was read already. Logs the base, and a warning if it cannot be verified.
    Raises ConfigError if the adapter does not name a base that can be found.
    """
    recorded = _record(adapter)
    quant = _quant(cfg.quant, adapter, recorded)
    if cfg.run:
        return replace(cfg, quant=quant)
    named = saved or peft_folder.read_config(adapter)
    tokens = cfg.model.added_tokens or (_added_tokens(adapter, named.trainable_token_indices) if recorded else [])
    if cfg.model.path:
        return replace(cfg, model=replace(cfg.model, added_tokens=tokens), quant=quant)
    if recorded:
        model = replace(_recorded_base(cfg.model, recorded["base"]), added_tokens=tokens)
    else:
        model = _named_base(cfg.model, str(named.base_model_name_or_path or ""), named.revision)
    if not model.path:
        raise ConfigError(
            f"{adapter} names no base that can be found ({named.base_model_name_or_path}): "
            "set model=NAME, or model=local model.path=PATH"
        )
    source = model.path + (f" (revision {model.revision})" if model.revision else "")
    if recorded:
        log.warning("base: %s, recorded in %s", source, adapter / provenance.RECORD)
    else:
        log.warning(
            "base: %s, identified only by its name: %s has no %s, so its weights, quantization and chat template "
            "may differ from those of the training", source, adapter, provenance.RECORD,
        )  # fmt: skip
    return replace(cfg, model=model, quant=quant)


def _record(adapter: Path) -> dict[str, Any] | None:
    path = adapter / provenance.RECORD
    untrusted.check_place(path, adapter)
    return provenance.read_record(adapter) if path.is_file() else None


def _recorded_base(model: config.Model, base: dict[str, Any]) -> config.Model:
    """Return the recorded hub id and commit; else the recorded path if it still exists; else the hub id."""
    named, path, revision = (str(base.get(key) or "") for key in ("id", "path", "revision"))
    hub_id = named if untrusted.is_hub_id(named) else None
    if hub_id and revision:
        return replace(model, path=hub_id, hub_id=hub_id, revision=revision)
    if _is_here(path):
        return replace(model, path=path, hub_id=model.hub_id or hub_id)
    return replace(model, path=hub_id, hub_id=hub_id) if hub_id else model


def _named_base(model: config.Model, named: str, revision: str | None) -> config.Model:
    if _is_here(named):
        return replace(model, path=named)
    return replace(model, path=named, revision=revision or model.revision) if untrusted.is_hub_id(named) else model


def _is_here(path: str) -> bool:
    """Return True for a path on this machine from which a model may be loaded; the loader checks its contents."""
    local = Path(path or "/nowhere")
    return path.startswith("package:") or local.is_dir() or (local.suffix == ".gguf" and local.is_file())


def _quant(given: config.Quant, adapter: Path, recorded: dict[str, Any] | None) -> config.Quant:
    """Replace each unset (None) setting by the recorded one, or by the default if there is no record."""
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
        raise MismatchError(
            f"{adapter / provenance.RECORD}: quant must be an object with a kind ({', '.join(names)}) and double "
            f"(true or false), got {found}: the file is damaged, take the adapter from its source again"
        )
    return config.Quant(config.QuantKind(found["kind"]), found.get("double", True))


def _added_tokens(adapter: Path, rows: Any) -> list[str]:
    """Return the tokens that a run of lora_ft added to its base: those whose rows its adapter trains."""
    if not rows:
        return []
    tokenizer = _own_tokenizer(adapter)
    ids = {i for matrix in (rows.values() if isinstance(rows, dict) else [rows]) for i in matrix}
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < len(tokenizer)]:
        raise MismatchError(
            f"{adapter} trains the embedding row of token {wrong[0]}, but its tokenizer has {len(tokenizer)} tokens: "
            "they do not belong together"
        )
    tokens: list[str] = tokenizer.convert_ids_to_tokens(sorted(ids))
    return tokens


def classes_of(folder: Path, saved: LoraConfig) -> Classes | None:
    """Return the classes of an adapter folder whose task is a classification, None for another task.

    An adapter without a record names no classes: they get the names that transformers gives them. Raises MismatchError
    for an adapter without a head, and for a head that has not one row for each class.
    """
    if saved.task_type != SEQ_CLS:
        return None
    shapes = files.shapes_of(folder)
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith(f".{HEAD}.weight")), None)
    if rows is None:
        raise MismatchError(
            f"the adapter in {folder} is a classifier (task_type={SEQ_CLS}) without a head named {HEAD}"
        )
    recorded = (_record(folder) or {}).get("classifier")
    if recorded is None:
        return unnamed(rows)
    found = from_record(recorded, str(folder / provenance.RECORD))
    if len(found.names) != rows:
        raise MismatchError(
            f"the adapter in {folder} has a head of {rows} classes, but its record names {len(found.names)}: "
            f"{listed(found.names)}"
        )
    return found


def check_generates(folder: Path, saved: LoraConfig, what: str, instead: str) -> None:
    """Raise ConfigError if an adapter is a classifier, of which `what` needs a language model."""
    if saved.task_type == SEQ_CLS:
        raise ConfigError(
            f"{folder} is a classifier: its head gives a probability to each class and writes no text, which {what} "
            f"needs: {instead}"
        )


def adapter_tokenizer(folder: Path, model: config.Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer and chat template saved with the adapter; if they are missing, those of the base.

    The adapter was trained with them, so `model.chat_template` is used only if the adapter has no tokenizer. Variables
    of the template that the adapter's record sets are its defaults.
    """
    variables = provenance.template_of(_record(folder) or {})
    if not all((folder / name).is_file() for name in _TOKENIZER_FILES):
        return with_defaults(load_tokenizer(model), variables)
    tokenizer = _own_tokenizer(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(replace(model, added_tokens=[])).chat_template
    return with_defaults(tokenizer, variables)


def _own_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    untrusted.check_folder(folder)
    resolve.check_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, str(folder))
    return tokenizer


def load(cfg: config.ChatRun) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the adapter that `run` or `adapter_path` names onto its base, for inference."""
    validation.validate(cfg)
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
    """Load the base with the adapter for inference, under the name `NAME`.

    `saved` is the adapter's config if it was read already. Raises MismatchError if the adapter was trained on another
    base, if a key or shape differs, or if the adapter changes the base's own weights; and the errors of `load_base`.
    """
    saved = saved or peft_folder.read_config(folder)
    classes, rows = classes_of(folder, saved), files.vocabulary_rows(folder, saved)
    base = load_base(model, quant, device, tokenizer, classes=classes, rows=rows)
    provenance.check_source(folder, saved, base, quant)
    return base, files.load(base.model, folder, NAME, saved)
