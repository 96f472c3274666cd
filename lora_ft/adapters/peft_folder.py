"""Read the settings of an adapter folder as any version of PEFT writes them, or say which other program wrote it.

read_config(folder)     LoraConfig(r=8, target_modules={"q_proj", "v_proj"}, ...)

Settings that the installed PEFT does not have are ignored if they are null, false or empty: they change nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig

from lora_ft.classes import SEQ_CLS
from lora_ft.errors import MismatchError, ResourceError, SecurityError
from lora_ft.io import untrusted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Settings with which an adapter is a product of two matrices and a scale, with DoRA's magnitudes.
PLAIN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config",
    "eva_config", "runtime_config", "use_dora",
})  # fmt: skip
LOADED = PLAIN | {
    "modules_to_save", "trainable_token_indices", "lora_bias", "ensure_weight_tying", "target_parameters",
}  # fmt: skip

_NOT_READ = ("auto_mapping", "runtime_config")  # PEFT ignores them when it reads a file
_NEEDED = ("peft_type", "r", "lora_alpha")
_MLX, _MLX_FIELDS = "adapters.safetensors", ("lora_parameters", "fine_tune_type")
_PICKLES = (".bin", ".pt", ".pth")


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Explain a PermissionError: safetensors' own writer makes files that only their owner can read (issue 782)."""
    try:
        yield
    except PermissionError as error:
        raise ResourceError(
            f"{error.filename} cannot be read by this user: ask its owner to run chmod a+r {error.filename}"
        ) from None


def read_config(folder: Path) -> LoraConfig:
    """Read the LoRA config of an adapter folder; raises the errors of `read_fields` and `parse_config`."""
    return parse_config(folder, read_fields(folder))


@readable()
def read_fields(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json as JSON; raises MismatchError or SecurityError if the folder has no PEFT adapter."""
    path = folder / CONFIG
    check_present(folder)
    untrusted.check_folder(folder)
    return untrusted.json_object(path, MismatchError)


def check_present(folder: Path) -> None:
    """Raise MismatchError or SecurityError unless a folder holds PEFT's two files; says what it holds instead."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if {CONFIG, WEIGHTS} <= names:
        return
    if _MLX in names:
        raise MismatchError(
            f"{folder} is an adapter of MLX (its weights are in {_MLX}), not of PEFT: {_mlx_remedy(folder)}"
        )
    if pickles := sorted(name for name in names if name.endswith(_PICKLES) and name.startswith("adapter_model")):
        raise SecurityError(
            f"{folder}: {WEIGHTS} is missing, and {pickles[0]} is a pickle, which can run code: "
            f"{pickle_remedy(folder, pickles[0])}"
        )
    if CONFIG not in names:
        raise MismatchError(f"{folder} is not an adapter: {CONFIG} is missing{_found_instead(folder, names)}")
    raise SecurityError(f"{folder}: {WEIGHTS} is missing; other formats of weights can run code and are not read")


def pickle_remedy(folder: Path, name: str) -> str:
    """Return the command that writes a pickle of tensors as safetensors without running code from it."""
    return (
        'convert it, which runs no code from it: python -c "import torch, safetensors.torch as s; '
        f"t = torch.load(r'{folder / name}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, r'{folder / WEIGHTS}', "
        "{'format': 'pt'})\""
    )


def _mlx_remedy(folder: Path) -> str:
    if (folder.parent / WEIGHTS).is_file():
        return f"use {folder.parent}, which holds the same adapter for PEFT"
    return (
        f"fuse it into its base with MLX (mlx_lm.fuse --model BASE --adapter-path {folder} --save-path FUSED) and use "
        "the result as a model: model=local model.path=FUSED"
    )


def _found_instead(folder: Path, names: Collection[str]) -> str:
    """Return a hint if the folder holds adapters further down, or a whole model."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if "config.yaml" in names and "adapter" in inside:
        return f"; it is a run folder: use run={folder}"
    if inside:
        return f"; the adapters are in {', '.join(inside[:5])}: name one of these folders"
    if "config.json" in names:
        return f"; it holds a whole model: use model=local model.path={folder}"
    return ""


def parse_config(folder: Path, fields: dict[str, Any]) -> LoraConfig:
    """Return the LoRA config that the fields of `folder` describe.

    Raises MismatchError for other methods than LoRA and for settings that PEFT does not have, and SecurityError for
    settings that would run code.
    """
    path = folder / CONFIG
    if fields.get("peft_type") != "LORA":
        if any(name in fields for name in _MLX_FIELDS):
            raise MismatchError(f"{folder} is an adapter of MLX, not of PEFT: {_mlx_remedy(folder)}")
        raise MismatchError(f"{folder}: peft_type must be LORA, got {fields.get('peft_type')}")
    _refuse_code(path, fields)
    meant = _meaningful(path, fields)
    untrusted.check_types(path, meant, LoraConfig, MismatchError)
    try:
        found = LoraConfig(**{name: value for name, value in meant.items() if name != "peft_type"})
        ranks = [found.r, *(found.rank_pattern or {}).values()]
    except (TypeError, ValueError, AttributeError, ImportError) as error:  # ImportError: scipy, for LoftQ
        raise MismatchError(f"{path}: {error}") from error
    if wrong := [rank for rank in ranks if type(rank) is not int or rank < 1]:
        raise MismatchError(f"{path}: a rank must be an integer of at least 1, got {wrong[0]!r}")
    alphas = [found.lora_alpha, *(found.alpha_pattern or {}).values()]
    if wrong := [alpha for alpha in alphas if type(alpha) not in (int, float) or not math.isfinite(alpha)]:
        raise MismatchError(f"{path}: an alpha must be a finite number, got {wrong[0]!r}")
    if (highest := max(ranks)) > (folder / WEIGHTS).stat().st_size:  # otherwise PEFT would allocate such matrices
        raise MismatchError(f"{path}: rank {highest} is larger than {WEIGHTS} has bytes")
    return found


def _meaningful(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that PEFT has, without null and false where that is no value of theirs.

    Raises MismatchError for other fields, unless they are null, false or empty.
    """
    defaults = {field.name: getattr(_DEFAULTS, field.name) for field in dataclasses.fields(LoraConfig)}
    unknown = {k: v for k, v in fields.items() if k not in defaults and k not in _NOT_READ and not _is_unset(v)}
    if unknown:
        given = ", ".join(f"{name}={str(value)[:80]}" for name, value in sorted(unknown.items()))
        raise MismatchError(
            f"{path} has {given}, which the installed PEFT ({peft.__version__}) does not have: the adapter may "
            "compute otherwise. Update peft, or load it with the program that wrote it"
        )
    return {
        name: value
        for name, value in fields.items()
        if name in defaults
        and name not in _NOT_READ
        and not ((value is None or value is False) and not defaults[name] and name not in _NEEDED)
        and not (value is None and name not in _NEEDED)
    }


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def check_settings(folder: Path, saved: LoraConfig, allowed: Collection[str], remedy: str = "") -> None:
    """Raise MismatchError for a setting outside of `allowed` that differs from PEFT's default (aLoRA, Arrow, ...)."""
    for name, value in other_settings(saved, allowed).items():
        raise MismatchError(f"the adapter in {folder} has {name}={str(value)[:80]}, so it is not a plain LoRA{remedy}")


def other_settings(saved: LoraConfig, allowed: Collection[str]) -> dict[str, Any]:
    """Return the settings outside of `allowed` that differ from PEFT's default."""
    values = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    return {k: v for k, v in values.items() if k not in allowed and v and v != getattr(_DEFAULTS, k)}


def _refuse_code(path: Path, fields: dict[str, Any]) -> None:
    """Raise SecurityError for settings by which PEFT imports a class by name: auto_mapping, and Megatron's."""
    mapping = fields.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and str(library).partition(".")[0] not in ("transformers", "peft"):
        raise SecurityError(f"{path}: auto_mapping asks to import {str(library)[:80]}")
    if fields.get("megatron_config") is not None:
        raise SecurityError(f"{path}: megatron_config asks to import {str(fields.get('megatron_core'))[:80]}")


def check_same_method(folder: Path, attached: LoraConfig) -> None:
    """Raise MismatchError unless a saved adapter has the rank, alpha, rsLoRA and DoRA of the attached one (A15)."""
    saved = read_config(folder)
    tasks = str(saved.task_type), str(attached.task_type)
    if SEQ_CLS in tasks and tasks[0] != tasks[1]:
        raise MismatchError(
            f"adapter.init_from={folder} was trained for the task {tasks[0]}, and this run trains {tasks[1]}: one of "
            "them is a classifier"
        )
    names = ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "r")
    problems = [
        f"{n} {getattr(saved, n)} instead of {getattr(attached, n)}"
        for n in names
        if getattr(saved, n) != getattr(attached, n)
    ]
    if problems:
        raise MismatchError(f"adapter.init_from={folder} has {', '.join(problems)}: set the same values in adapter")


_DEFAULTS = LoraConfig()
