"""Read and write the adapter folder: PEFT's files, which any PEFT user can load, and a record to check the base.

    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in], ...
    adapter_config.json         PEFT's, with plain types in a stable order
    tokenizer.json, ...         the tokenizer of the training, with chat_template.jinja
    lora_ft.json                base hashes, quantization and data, which PEFT does not record; PEFT ignores it

Loading raises MismatchError in cases in which PEFT only warns: a missing or unexpected key, another shape, another
base or another quantization (peft issues 2566 and 2699; transformers issue 38927).
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.adapters import peft_folder, provenance, tensor_names, vocabulary
from lora_ft.adapters.attach import inject
from lora_ft.adapters.peft_folder import CONFIG, WEIGHTS
from lora_ft.classes import HEAD
from lora_ft.data import template_variables
from lora_ft.errors import MismatchError
from lora_ft.io import durable, untrusted
from lora_ft.models import tensor_files
from lora_ft.models.load import Identity

log = logging.getLogger("lora_ft")

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_METADATA = {"format": "pt"}
_HEADER_LIMIT = 10 * 2**20  # bytes: 50,000 tensors and more

# Always written. Other settings are written only if they differ from PEFT's default, so that older PEFT reads the file.
_ALWAYS = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "modules_to_save", "fan_in_fan_out", "inference_mode", "init_lora_weights", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern",
})  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter's file, sorted as in `tensor_names.Names`, by the names there."""

    own: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def in_full(self) -> dict[str, Tensor]:
        """Return an embedding and head that are trained in full (modules_to_save), by the names of the base's."""
        named = {key.removeprefix(tensor_names.PREFIX): tensor for key, tensor in self.own.items()}
        return {name: tensor for name, tensor in named.items() if vocabulary.is_end(name)}


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
        template_variables.with_defaults(tokenizer, source.template).save_pretrained(staging)
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


def load(
    model: PreTrainedModel, folder: Path, name: str, saved: LoraConfig | None = None, *, placeholders: bool = False
) -> PeftModel:
    """Attach a saved adapter to a base for inference; `saved` is the folder's config if it was read already.

    An embedding and head that the file holds whole replace the base's. `placeholders`: the base has no weights to
    compare copies with. Raises MismatchError if a key or shape differs, or if the adapter has settings that are not
    supported.
    """
    saved = saved or peft_folder.read_config(folder)
    peft_folder.check_settings(folder, saved, peft_folder.LOADED)
    contents = read_contents(folder, saved)
    if not placeholders:
        vocabulary.take(model, folder, contents.whole, contents.frozen, contents.in_full)
    try:
        with warnings.catch_warnings():
            # PEFT only warns if there is no such layer, but a parameter of experts, or the reverse.
            warnings.filterwarnings("error", message=".* were set but no", category=RuntimeWarning)
            peft_model = inject(model, saved, name)
    # PEFT raises these for a name without a layer, a row beyond the matrix, or a wrong type.
    except (ValueError, TypeError, IndexError, re.error, RuntimeWarning) as error:
        raise MismatchError(f"the adapter in {folder} does not fit this base: {error}") from error
    _set(peft_model, folder, name, contents.own)
    peft_model.eval().requires_grad_(False)
    return peft_model


def load_tensors(model: PeftModel, folder: Path, name: str, *, placeholders: bool = False) -> None:
    """Load a folder's tensors into an attached adapter; raises MismatchError if keys or shapes differ (D01)."""
    contents = read_contents(folder)
    vocabulary.refuse(folder, {key: tuple(tensor.shape) for key, tensor in contents.whole.items()})
    if not placeholders:
        vocabulary.check_copies(model, folder, contents.frozen)
    _set(model, folder, name, contents.own)


def _set(model: PeftModel, folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    _compare_shapes(_state(model, name), _shapes(tensors), folder)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def check_shapes(model: PeftModel, folder: Path, name: str) -> None:
    """Check keys and shapes as `load_tensors` does, reading only the file's header; the adapter may be on meta."""
    names, shapes = _header(folder, peft_folder.read_config(folder))
    vocabulary.refuse(folder, {name: shapes[key] for key, name in names.whole.items()})
    _compare_shapes(_state(model, name), {name: shapes[key] for key, name in names.own.items()}, folder)


def vocabulary_rows(folder: Path, saved: LoraConfig) -> int | None:
    """Return the rows of the embedding or head that an adapter's file holds whole; None if it holds neither."""
    names, shapes = _header(folder, saved)
    own = {key: name.removeprefix(tensor_names.PREFIX) for key, name in names.own.items()}
    rows = [shapes[key][0] for key, name in (own | names.whole | names.frozen).items() if vocabulary.is_end(name)]
    return max(rows, default=None)


def _header(folder: Path, saved: LoraConfig) -> tuple[tensor_names.Names, dict[str, tuple[int, ...]]]:
    shapes = shapes_of(folder)
    return tensor_names.read(folder, shapes, saved), shapes


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


@peft_folder.readable()
def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors under the file's keys, reading only the file's header."""
    return untrusted.tensor_header(folder / WEIGHTS, _HEADER_LIMIT, MismatchError).shapes


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder under PEFT's file keys, without copies of the base's weights.

    Raises MismatchError for non-finite numbers.
    """
    contents = read_contents(folder)
    return contents.own | {f"{tensor_names.PREFIX}{name}": tensor for name, tensor in contents.whole.items()}


@peft_folder.readable()
def read_contents(folder: Path, saved: LoraConfig | None = None) -> Contents:
    """Read all tensors of an adapter folder; raises MismatchError for non-finite numbers and ambiguous names."""
    saved = saved or peft_folder.read_config(folder)
    tensors = dict(_read(folder / WEIGHTS))
    names = tensor_names.read(folder, tensors, saved)
    if names.renamed:
        log.info(
            "%d of %d tensors of %s have names that a wrapper of the model made (%s): read as %s",
            len(names.renamed), len(tensors), folder, names.renamed[0], names.own[names.renamed[0]],
        )  # fmt: skip
    for key, name in names.own.items():
        if name != key and name in tensors and not torch.equal(tensors[key], tensors[name]):
            raise MismatchError(f"the file of {folder} holds {key} and {name}, which differ but are one tensor")
    kinds = (names.own, names.frozen, names.whole)
    return Contents(*({name: tensors[key] for key, name in kind.items()} for kind in kinds))


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
