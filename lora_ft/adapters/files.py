"""Read and write the adapter folder: PEFT's files, which any PEFT user can load, and a record to check the base.

    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in], ...
    adapter_config.json         PEFT's, with plain types in a stable order
    tokenizer.json, ...         the tokenizer of the training, with chat_template.jinja
    lora_ft.json                base hashes, quantization and data, which PEFT does not record; PEFT ignores it

Loading raises MismatchError in cases in which PEFT only warns: a missing or unexpected key, another shape, another
base or another quantization (peft issues 2566 and 2699; transformers issue 38927).
"""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.adapters import provenance
from lora_ft.adapters.attach import inject
from lora_ft.classes import HEAD, SEQ_CLS
from lora_ft.errors import MismatchError, ResourceError, SecurityError
from lora_ft.io import durable, untrusted
from lora_ft.models import tensor_files
from lora_ft.models.load import Identity

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_METADATA = {"format": "pt"}
_HEADER_LIMIT = 10 * 2**20  # bytes: 50,000 tensors and more

# Always written. Other settings are written only if they differ from PEFT's default, so that older PEFT reads the file.
_ALWAYS = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "modules_to_save", "fan_in_fan_out", "inference_mode", "init_lora_weights", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern",
})  # fmt: skip

# Settings with which an adapter is a product of two matrices and a scale, with DoRA's magnitudes.
PLAIN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config",
    "eva_config", "runtime_config", "use_dora",
})  # fmt: skip
_LOADED = PLAIN | {
    "modules_to_save", "trainable_token_indices", "lora_bias", "ensure_weight_tying", "target_parameters",
}  # fmt: skip


def tensors_of(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's file keys, contiguous, on the CPU."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(_state(model, name).items())}


def size_of(model: PeftModel, name: str) -> int:
    """Return the size of the weights file that `save` writes, in bytes; the adapter may be on the meta device."""
    state = _state(model, name)
    header = next(tensor_files.chunks(state, _METADATA))
    return memoryview(header).nbytes + sum(tensor.nbytes for tensor in state.values())


def save(
    model: PeftModel, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, source: provenance.Provenance
) -> None:
    """Write the adapter folder atomically and read it back; raises MismatchError if the result differs (C10)."""
    write(dict(sorted(_state(model, name).items())), model.peft_config[name], folder, tokenizer, source)


def write(
    tensors: dict[str, Tensor],
    peft_config: LoraConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    source: provenance.Provenance,
) -> None:
    """Do the same as `save` for an adapter without a model: tensors under PEFT's file keys, and their config.

    Memory holds no copy of the tensors but one at a time.
    """
    with durable.staged_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        write_weights(staging, tensors)
        durable.write_json(staging / CONFIG, config_fields(peft_config, source.base))
        durable.write_json(staging / provenance.RECORD, provenance.record(tensors, tokenizer, source))
        _compare_shapes(
            tensors, untrusted.tensor_header(staging / WEIGHTS, _HEADER_LIMIT, MismatchError).shapes, folder
        )
        if [key for key, found in _read(staging / WEIGHTS) if not tensors[key].cpu().equal(found)]:
            raise MismatchError(f"the adapter in {folder}: the bytes read back differ from the bytes written")


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_model.safetensors, one tensor after the other."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    durable.write_stream(folder / WEIGHTS, tensor_files.chunks(tensors, _METADATA), size)


def config_fields(peft_config: LoraConfig, base: Identity) -> dict[str, Any]:
    """Return the fields of adapter_config.json: plain types in a stable order; the base by its id if it has one."""
    defaults = LoraConfig().to_dict()
    fields = {
        k: _plain(v)
        for k, v in peft_config.to_dict().items()
        if k in _ALWAYS or k == "peft_version" or _plain(v) != _plain(defaults.get(k))
    }
    fields |= {"base_model_name_or_path": base.id or base.path, "revision": base.revision, "inference_mode": True}
    return dict(sorted(fields.items()))


def _plain(value: Any) -> Any:
    """Convert to JSON types in a stable order: PEFT has target names in a set, whose order changes from run to run."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in sorted(value.items())}
    return getattr(value, "value", value)


def load(model: PreTrainedModel, folder: Path, name: str, saved: LoraConfig | None = None) -> PeftModel:
    """Attach a saved adapter to a base for inference; `saved` is the folder's config if it was read already.

    Raises MismatchError if a key or shape differs, or if the adapter has settings that are not supported.
    """
    saved = saved or read_config(folder)
    check_settings(folder, saved, _LOADED)
    try:
        with warnings.catch_warnings():
            # PEFT only warns if there is no such layer, but a parameter of experts, or the reverse.
            warnings.filterwarnings("error", message=".* were set but no", category=RuntimeWarning)
            peft_model = inject(model, saved, name)
    # PEFT raises these for a name without a layer, a row beyond the matrix, or a wrong type.
    except (ValueError, TypeError, IndexError, re.error, RuntimeWarning) as error:
        raise MismatchError(f"the adapter in {folder} does not fit this base: {error}") from error
    load_tensors(peft_model, folder, name)
    peft_model.eval().requires_grad_(False)
    return peft_model


def load_tensors(model: PeftModel, folder: Path, name: str) -> None:
    """Load a folder's tensors into an attached adapter; raises MismatchError if keys or shapes differ (D01)."""
    tensors = read_tensors(folder)
    _compare_shapes(_state(model, name), _shapes(tensors), folder)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def check_shapes(model: PeftModel, folder: Path, name: str) -> None:
    """Check keys and shapes as `load_tensors` does, reading only the file's header; the adapter may be on meta."""
    _compare_shapes(_state(model, name), shapes_of(folder), folder)


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


@contextlib.contextmanager
def _readable() -> Iterator[None]:
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


@_readable()
def read_fields(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json as JSON; raises MismatchError or SecurityError if the folder has no PEFT adapter."""
    path = folder / CONFIG
    if not path.is_file():
        raise MismatchError(f"{folder} is not an adapter: {CONFIG} is missing")
    if not (folder / WEIGHTS).is_file():
        raise SecurityError(f"{folder}: {WEIGHTS} is missing; other formats of weights can run code and are not read")
    untrusted.check_folder(folder)
    return untrusted.json_object(path, MismatchError)


def parse_config(folder: Path, fields: dict[str, Any]) -> LoraConfig:
    """Return the LoRA config that the fields of `folder` describe.

    Raises MismatchError for other methods than LoRA and for settings that PEFT does not have, and SecurityError for
    settings that would run code.
    """
    path = folder / CONFIG
    if fields.get("peft_type") != "LORA":
        raise MismatchError(f"{folder}: peft_type must be LORA, got {fields.get('peft_type')}")
    _refuse_code(path, fields)
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(k for k in fields if k not in known and k != "auto_mapping")
    if unknown:
        raise MismatchError(
            f"{folder}: the installed PEFT does not support {', '.join(unknown)} of {CONFIG}: update peft"
        )
    untrusted.check_types(path, fields, LoraConfig, MismatchError)
    try:
        found = LoraConfig(**{k: v for k, v in fields.items() if k in known and k not in ("peft_type", "auto_mapping")})
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


def check_settings(folder: Path, saved: LoraConfig, allowed: Collection[str], remedy: str = "") -> None:
    """Raise MismatchError for a setting outside of `allowed` that differs from PEFT's default (aLoRA, Arrow, ...)."""
    defaults = LoraConfig()
    for field in dataclasses.fields(saved):
        value = getattr(saved, field.name)
        if field.name not in allowed and value and value != getattr(defaults, field.name):
            raise MismatchError(
                f"the adapter in {folder} has {field.name}={str(value)[:80]}, so it is not a plain LoRA{remedy}"
            )


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


@_readable()
def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors under PEFT's file keys, reading only the file's header."""
    return untrusted.tensor_header(folder / WEIGHTS, _HEADER_LIMIT, MismatchError).shapes


@_readable()
def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder under PEFT's file keys; raises MismatchError for non-finite numbers."""
    return dict(_read(folder / WEIGHTS))


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file; raises MismatchError for another dtype, and at the end for non-finite numbers."""
    broken = []
    for name, tensor in tensor_files.read(path, _HEADER_LIMIT, MismatchError):
        if tensor.dtype not in _DTYPES:
            raise MismatchError(
                f"{path}: {name} has the dtype {tensor.dtype}, which must be one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
            )
        if not torch.isfinite(tensor).all():
            broken.append(name)
        yield name, tensor
    if broken:
        raise MismatchError(f"{path}: {', '.join(broken[:5])} ({len(broken)} in all) contain NaN or infinity")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _compare_shapes(tensors: dict[str, Tensor], found: dict[str, tuple[int, ...]], folder: Path) -> None:
    expected = _shapes(tensors)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [f"{k} {found[k]} instead of {s}" for k, s in expected.items() if k in found and found[k] != s]
    differences = (("missing tensors", missing), ("unexpected tensors", unexpected), ("other shapes", shapes))
    head = next((key for key in expected if key.endswith(f".{HEAD}.weight")), None)
    if head in found and found[head][0] != expected[head][0]:
        raise MismatchError(
            f"the adapter in {folder} has a head of {found[head][0]} classes, and this model has {expected[head][0]}"
        )
    problems = [f"{name}: {len(keys)}, first {', '.join(keys[:5])}" for name, keys in differences if keys]
    if problems:
        raise MismatchError(f"the adapter in {folder} does not fit this base: " + "; ".join(problems))
