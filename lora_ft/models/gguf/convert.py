"""Convert a GGUF file once to a folder as transformers saves it, in the user's cache.

    ~/.cache/lora_ft/models/4f1c...-1/       sha256 of the GGUF file, version of this conversion
      config.json  generation_config.json    from the metadata
      model.safetensors                      dequantized: float32 (F16 and BF16 tensors keep their type)
      tokenizer.json  tokenizer_config.json  chat_template.jinja

Dequantization is exact, so a 4-bit file becomes eight times as large.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_reader import ReaderTensor

from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import durable
from lora_ft.models.families import FAMILIES, Family, deinterleave, family_of_gguf
from lora_ft.models.gguf import reader, tokenizer

# Part of the cache's folder names. Increase it whenever a change makes the same file convert to other bytes.
VERSION = 1

_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# The scaling of Llama 3.1 and 3.2, the only published one; its factor is the largest divisor in the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

Tensors = dict[str, tuple[ReaderTensor, tuple[int, ...]]]  # name in the model -> tensor, its shape in the model


def converted(path: Path) -> tuple[Path, str]:
    """Return the transformers folder for a GGUF file, and the file's sha256; convert the file unless it is cached."""
    digest = file_sha256(path)
    folder = durable.cache_folder("models") / f"{digest}-{VERSION}"
    # A staged folder is renamed only when it is complete, so it is enough that the folder exists.
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> tuple[Any, int]:
    """Return the config and the weights' bytes of the folder that a GGUF file is converted to, from its header."""
    source = reader.read(path)
    family = _family(source)
    config = _checked(source, lambda: _config(source, family))
    return config, sum(reader.num_bytes(tensor) for tensor, _ in _tensors(source, family, config).values())


def write_folder(source: reader.GgufFile, folder: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file into an empty folder.

    Raises ConfigError for an architecture, a tensor or a rotary scaling that cannot be converted.
    """
    family = _family(source)
    config, built = _checked(source, lambda: (_config(source, family), tokenizer.build(source.metadata)))
    tensors = _tensors(source, family, config)
    specs = [
        durable.TensorSpec(name, reader.dtype_code(tensor), shape, reader.num_bytes(tensor))
        for name, (tensor, shape) in tensors.items()
    ]
    durable.write_tensors(folder / "model.safetensors", specs, _buffers(tensors, family, config), {"format": "pt"})
    settings = config.to_diff_dict()
    settings.pop("transformers_version", None)  # so that the same file gives the same config with every version
    durable.write_json(folder / "config.json", settings)
    durable.write_json(folder / "generation_config.json", _generation(source.metadata))
    built.model_max_length = config.max_position_embeddings
    built.save_pretrained(folder)


def _family(source: reader.GgufFile) -> Family:
    architecture = source.metadata.get("general.architecture")
    family = family_of_gguf(architecture)
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
        values["rope_parameters"] = _rope(source, family.architecture)
    config = AutoConfig.for_model(
        family.model_type,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        vocab_size=reader.shape(source.tensors["token_embd.weight"])[0],
        tie_word_embeddings=_is_tied(source),
        **{name: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()},
        **values,
    )
    if family.is_rotary and (divisors := source.tensors.get("rope_freqs.weight")):
        found, expected = reader.values(divisors), llama3_divisors(config)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise ConfigError(f"{source.path}: rope_freqs.weight is not Llama 3's scaling: use the safetensors model")
    return config


def _is_tied(source: reader.GgufFile) -> bool:
    """Return True if the head is the embedding: the file has no output matrix, or one with the same bytes."""
    head, embedding = source.tensors.get("output.weight"), source.tensors["token_embd.weight"]
    return head is None or (head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data))


def _rope(source: reader.GgufFile, architecture: str) -> dict[str, Any]:
    """Return the rotary settings; for Llama 3's scaling the file has only the divisors, which `_config` verifies."""
    theta = source.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    kind = source.metadata.get(f"{architecture}.rope.scaling.type", "none")
    divisors = source.tensors.get("rope_freqs.weight")
    if kind == "linear" and divisors is None:
        factor = source.metadata[f"{architecture}.rope.scaling.factor"]
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise ConfigError(f"{source.path}: rotary scaling of type {kind} is not supported: use the safetensors model")
    if divisors is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "llama3", "rope_theta": theta, "factor": float(reader.values(divisors).max()), **_LLAMA3}


def llama3_divisors(config: Any) -> np.ndarray[Any, Any]:
    """Return the divisors of the rotary frequencies in transformers' Llama 3 scaling, in float32."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    divisors: np.ndarray[Any, Any] = (plain / scaled.double()).float().numpy()
    return divisors


def _tensors(source: reader.GgufFile, family: Family, config: Any) -> Tensors:
    """Match the file's tensors, in their order, with all parameters of the model that the metadata describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {}  # GGUF's name -> name and shape in the model; tied parameters appear once
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        expected[f"{family.gguf_name(module, config.num_hidden_layers)}.{leaf}"] = (name, tuple(parameter.shape))
    found: Tensors = {}
    for stored, tensor in source.tensors.items():
        if stored == "rope_freqs.weight" or (stored == "output.weight" and config.tie_word_embeddings):
            continue  # they became rope_parameters, and the embedding
        if stored not in expected:
            raise ConfigError(f"{source.path}: tensor {stored} does not belong to a {family.architecture} model")
        name, shape = expected.pop(stored)
        given = reader.shape(tensor)
        if (given[::-1] if family.is_transposed(name.rpartition(".")[0]) else given) != shape:
            raise ConfigError(f"{source.path}: tensor {stored} has shape {given}, but {name} of the model has {shape}")
        found[name] = (tensor, shape)
    if expected:
        raise ConfigError(f"{source.path} lacks the tensor {next(iter(expected))}: the file is incomplete")
    return found


def _buffers(tensors: Tensors, family: Family, config: Any) -> Iterator[memoryview]:
    for name, (tensor, shape) in tensors.items():
        module = name.rpartition(".")[0]
        values = reader.values(tensor)
        heads = family.rotary_heads(module, config)
        if family.is_transposed(module):
            values = values.T
        elif heads:
            values = deinterleave(values, heads)
        assert values.shape == shape
        yield np.ascontiguousarray(values).data.cast("B")


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of generation_config.json: the end token, and the end-of-turn token if it differs."""
    values = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
    ends = [i for i in (values["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")) if i is not None]
    return {**values, "eos_token_id": ends if len(set(ends)) > 1 else values["eos_token_id"]}
