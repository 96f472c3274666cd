"""Convert a GGUF file once to a folder as transformers saves it, in the user's cache.

    ~/.cache/lora_ft/models/4f1c...-1/       sha256 of the GGUF file, version of this conversion
      config.json  generation_config.json    from the metadata
      model.safetensors                      dequantized: float32 (F16 and BF16 tensors keep their type)
      tokenizer.json  tokenizer_config.json  chat_template.jinja

Dequantization is exact, so a 4-bit file becomes eight times as large.
"""

import functools
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_reader import ReaderTensor

from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import caches, durable, hashing
from lora_ft.models.families import FAMILIES, Family, family_of_gguf
from lora_ft.models.gguf import reader, rope, tokenizer

# Part of the cache's folder names. Increase it whenever a change makes the same file convert to other bytes.
VERSION = 2

_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Name in the model -> the tensors stacked in it, most often one, and its shape in the model.
Tensors = dict[str, tuple[tuple[ReaderTensor, ...], tuple[int, ...]]]


def converted(path: Path) -> tuple[Path, str]:
    """Return the transformers folder for a GGUF file, and the file's sha256; convert the file unless it is cached."""
    digest = file_sha256(path)
    folder = durable.cache_folder("models") / f"{digest}-{VERSION}"
    # A staged folder is renamed only when it is complete, so it is enough that the folder exists.
    if not folder.is_dir():
        folder = caches.writable("models") / folder.name
    if not folder.is_dir():
        source = reader.read(path)
        try:
            with durable.staged_folder(folder) as staging:
                write_folder(source, staging)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process converted the same file meanwhile
                raise ResourceError(
                    f"the converted model cannot be written to {folder.parent} ({error.strerror or error}): "
                    "free some space there, or set XDG_CACHE_HOME to another folder"
                ) from None
    return folder, digest


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file; it is hashed again only if its size, modification time or inode changes."""
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *_version: int) -> str:
    return hashing.sha256(path)


def describe(path: Path) -> tuple[Any, int]:
    """Return the config and the weights' bytes of the folder that a GGUF file is converted to, from its header."""
    source = reader.read(path)
    family = _family(source)
    config = _checked(source, lambda: _config(source, family))
    return config, sum(spec.num_bytes for spec in _specs(_tensors(source, family, config), family))


def write_folder(source: reader.GgufFile, folder: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file into an empty folder.

    Raises ConfigError for an architecture, a tensor or a rotary scaling that cannot be converted.
    """
    family = _family(source)
    config, built = _checked(source, lambda: (_config(source, family), tokenizer.build(source.metadata)))
    tensors = _tensors(source, family, config)
    specs = _specs(tensors, family)
    durable.write_tensors(folder / "model.safetensors", specs, _buffers(tensors, family, config), {"format": "pt"})
    settings = config.to_diff_dict()
    settings.pop("transformers_version", None)  # so that the same file gives the same config with every version
    durable.write_json(folder / "config.json", settings)
    durable.write_json(folder / "generation_config.json", _generation(source.metadata))
    built.model_max_length = config.max_position_embeddings
    built.save_pretrained(folder)


def _specs(tensors: Tensors, family: Family) -> list[durable.TensorSpec]:
    specs = []
    for name, (stacked, shape) in tensors.items():
        code = _dtype_code(stacked, family.offset(name.rpartition(".")[0]))
        specs.append(durable.TensorSpec(name, code, shape, prod(shape) * (4 if code == "F32" else 2)))
    return specs


def _family(source: reader.GgufFile) -> Family:
    architecture = source.metadata.get("general.architecture")
    family = family_of_gguf(architecture, has_experts=bool(source.metadata.get(f"{architecture}.expert_count")))
    if family is None:
        raise ConfigError(
            f"{source.path} has the architecture {architecture}; GGUF files can be read for "
            f"{', '.join(dict.fromkeys(f.architecture for f in FAMILIES))}: "
            "use the model's safetensors folder or hub id instead"
        )
    return family


def _checked(source: reader.GgufFile, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except KeyError as error:
        raise ConfigError(f"{source.path} lacks {error.args[0]}: the file is incomplete") from None


def _config(source: reader.GgufFile, family: Family) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    optional = {"num_key_value_heads", "head_dim"}
    values = {
        attribute: source.metadata[f"{family.architecture}.{key}"]
        for key, attribute in family.sizes.items()
        if attribute not in optional or f"{family.architecture}.{key}" in source.metadata
    }
    if lists := [name for name, value in values.items() if not isinstance(value, int | float)]:
        raise ConfigError(
            f"{source.path}: {lists[0]} differs from layer to layer, which is not supported: use the safetensors model"
        )
    if family.is_rotary:
        heads = values["num_attention_heads"]
        values = {"num_key_value_heads": heads, "head_dim": values["hidden_size"] // heads} | values
        values |= rope.settings(source, family, values["head_dim"])
    if family.has_window:
        values["sliding_window"] = source.metadata.get(f"{family.architecture}.attention.sliding_window", 4096)
    config = AutoConfig.for_model(
        family.model_type,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        vocab_size=reader.shape(source.tensors["token_embd.weight"])[0],
        **{name: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()},
        **{name: limit[0] for name, limit in family.limits.items() if isinstance(limit, tuple)}
        | {"tie_word_embeddings": _is_tied(source), **values},
    )
    for name, limit in family.limits.items():
        if callable(limit):
            setattr(config, name, limit(config)[0])
    if family.is_rotary and (divisors := source.tensors.get("rope_freqs.weight")):
        found, expected = reader.values(divisors), rope.llama3_divisors(config)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise ConfigError(f"{source.path}: rope_freqs.weight is not Llama 3's scaling: use the safetensors model")
    return config


def _is_tied(source: reader.GgufFile) -> bool:
    """Return True if the head is the embedding: the file has no output matrix, or one with the same bytes."""
    head, embedding = source.tensors.get("output.weight"), source.tensors["token_embd.weight"]
    return head is None or (head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data))


def _tensors(source: reader.GgufFile, family: Family, config: Any) -> Tensors:
    """Match the file's tensors, in their order, with all parameters of the model that the metadata describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # GGUF's name -> name and shape in the model, place among the tensors stacked in it, and their number
    expected: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, parameter in model.named_parameters():  # tied parameters appear once
        stored = family.tensor_names(name, config.num_hidden_layers) or ()
        expected |= {part: (name, tuple(parameter.shape), i, len(stored)) for i, part in enumerate(stored)}
    found: dict[str, dict[int, ReaderTensor]] = {}
    shapes = {}
    for part, tensor in source.tensors.items():
        if part in rope.TENSORS or (part == "output.weight" and config.tie_word_embeddings):
            continue  # they became rope_parameters, and the embedding
        if part not in expected:
            raise ConfigError(f"{source.path}: tensor {part} does not belong to a {family.architecture} model")
        name, shape, place, count = expected.pop(part)
        given = whole = reader.shape(tensor)
        if count > 1:
            whole = (*given[:-2], given[-2] * count, given[-1])
        if (whole[::-1] if family.is_transposed(name.rpartition(".")[0]) else whole) != shape:
            raise ConfigError(f"{source.path}: tensor {part} has shape {given}, but {name} of the model has {shape}")
        found.setdefault(name, {})[place], shapes[name] = tensor, shape
    if expected:
        raise ConfigError(f"{source.path} lacks the tensor {next(iter(expected))}: the file is incomplete")
    return {name: (tuple(parts[i] for i in sorted(parts)), shapes[name]) for name, parts in found.items()}


def _dtype_code(stacked: tuple[ReaderTensor, ...], offset: float) -> str:
    codes = {reader.dtype_code(tensor) for tensor in stacked}
    return codes.pop() if len(codes) == 1 and not offset else "F32"


def _buffers(tensors: Tensors, family: Family, config: Any) -> Iterator[memoryview]:
    for name, (stacked, shape) in tensors.items():
        module = name.rpartition(".")[0]
        offset = family.offset(module)
        read = reader.float32 if _dtype_code(stacked, offset) == "F32" else reader.values
        values = np.concatenate([read(t) for t in stacked], axis=-2) if len(stacked) > 1 else read(stacked[0])
        reorder = family.rows(module, config, stored=True)
        if family.is_transposed(module):
            values = values.T
        elif reorder:
            values = reorder(values)
        if offset:
            values = values - np.float32(offset)
        assert values.shape == shape
        yield np.ascontiguousarray(values).data.cast("B")


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of generation_config.json: the end token, and the ends of turn and message if they differ."""
    values = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
    others = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))
    ends = list(dict.fromkeys(i for i in (values["eos_token_id"], *others) if i is not None))
    return {**values, "eos_token_id": ends if len(ends) > 1 else values["eos_token_id"]}
