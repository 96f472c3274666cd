"""From what the command line names to a model with its adapter: a run, a folder, or a hub id.

run=runs/2026-11-23_10-15-00       runs/2026-11-23_10-15-00/adapter
adapter_path=./somebodys-adapter   that folder
adapter_path=owner/name            downloaded: JSON, safetensors, templates and tokenizer files, nothing else
"""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_ft import config, foreign, runs
from lora_ft.adapters import files, origin
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.models import locate
from lora_ft.models.load import Base, load_base, load_tokenizer, read_tokenizer

NAME = "default"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter's folder on this machine; ConfigError where there is none, ResourceError where it must be fetched."""
    if run:
        path = runs.adapter_folder(Path(run).expanduser())
        foreign.check_place(path, path.parent)
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


def adapter_tokenizer(folder: Path, model: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer and template that the adapter was trained with, which lie beside it; else the base's.

    Only they give the adapter the tokens that it knows: `model.chat_template` counts where neither is there.
    """
    if not all((folder / name).is_file() for name in _TOKENIZER_FILES):
        return load_tokenizer(model)
    foreign.check_folder(folder)
    locate.check_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, str(folder))
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(replace(model, added_tokens=[])).chat_template
    return tokenizer


def open_adapter(
    folder: Path, model: config.Model, quant: config.Quant, device: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Base, PeftModel]:
    """Load the base and put the adapter onto it for inference, under the name `NAME`.

    Raises MismatchError where the adapter was made for another base, does not fit it to the last key and
    shape, or is of a kind that cannot be told apart from its base; and what `load_base` raises.
    """
    saved = files.read_config(folder)
    base = load_base(model, quant, device, tokenizer)
    origin.check_source(folder, saved, base, quant)
    return base, files.load(base.model, folder, NAME)
