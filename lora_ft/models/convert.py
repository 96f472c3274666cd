"""GGUF -> the folder that transformers would have saved, made once and kept in the user's cache.

    ~/.cache/lora_ft/models/4f1c...-1/       sha256 of the GGUF file, version of this conversion
      config.json  generation_config.json    from the metadata
      model.safetensors                      dequantized: float32 (F16 and BF16 tensors stay as they are)
      tokenizer.json  tokenizer_config.json  chat_template.jinja

The weights keep every bit that the file's types hold: a 4-bit file becomes eight times as large.
Reading takes one pass: transformers' own GGUF reader parses the file three times and rebuilds a map of
names for each tensor (27 s for a model of 135 million parameters, where this takes 4).
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_ft.errors import ConfigError, ResourceError
from lora_ft.io import durable
from lora_ft.models import gguf, vocabulary

# Part of the cache's folder names: raise it when the same file would convert to other bytes.
VERSION = 1

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "blk": "model.layers",
}  # fmt: skip
_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj", "blk": "transformer.h",
}  # fmt: skip
_NAMES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}

# Key of the metadata (after the architecture) -> attribute of the config; these a file must have.
_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
}  # fmt: skip


def converted(path: Path) -> tuple[Path, str]:
    """The transformers folder for a GGUF file, and the sha256 of the file; converts it if the cache has none."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = durable.cache_folder("models") / f"{digest}-{VERSION}"
    # A staged folder gets its name only when it is whole, so existence is enough.
    if not folder.is_dir():
        source = gguf.read(path)
        try:
            with durable.staged_folder(folder) as staging:
                write_folder(source, staging)
        except OSError as error:
            if not folder.is_dir():  # else another process converted the same file meanwhile
                raise ResourceError(
                    f"the converted model cannot be written to {folder.parent} ({error.strerror or error}): "
                    "make room there, or set XDG_CACHE_HOME to a folder that has it"
                ) from None
    return folder, digest


def write_folder(source: gguf.Gguf, folder: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file into an empty folder.

    Raises ConfigError for an architecture, a tensor or a rotary scaling that would be lost in conversion.
    """
    architecture = source.metadata.get("general.architecture")
    if architecture not in _NAMES:
        raise ConfigError(
            f"{source.path} holds a model of architecture {architecture}; GGUF files can be read for "
            f"{', '.join(_NAMES)}: use the model's safetensors folder or hub id instead"
        )
    try:
        config = _config(source, architecture)
        tokenizer = vocabulary.build(source.metadata)
    except KeyError as error:
        raise ConfigError(f"{source.path} lacks {error.args[0]}") from None
    tensors = _renamed(source, architecture, config)
    _check_complete(source.path, config, tensors)
    specs = [durable.TensorSpec(name, t.code, shape, _num_bytes(t)) for name, (t, shape) in tensors.items()]
    durable.write_tensors(folder / "model.safetensors", specs, _buffers(tensors, config), {"format": "pt"})
    settings = config.to_diff_dict()
    settings.pop("transformers_version", None)  # the same file gives the same config, whoever converts it
    durable.write_json(folder / "config.json", settings)
    durable.write_json(folder / "generation_config.json", _generation(source.metadata))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _config(source: gguf.Gguf, architecture: str) -> Any:
    from transformers import AutoConfig

    def get(key: str, default: Any = None) -> Any:
        return source.metadata.get(f"{architecture}.{key}", default)

    values = {name: source.metadata[f"{architecture}.{key}"] for key, name in _SIZES.items()}
    if lists := [key for key, value in values.items() if not isinstance(value, int)]:
        raise ConfigError(f"{source.path}: {lists[0]} differs from layer to layer, which cannot be read")
    ids = {name: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
    tied = _is_tied(source)
    common = {"vocab_size": source.tensors["token_embd.weight"].shape[0], "tie_word_embeddings": tied, **ids, **values}
    if architecture == "gpt2":
        common |= {"n_inner": get("feed_forward_length"), "layer_norm_epsilon": get("attention.layer_norm_epsilon")}
        return AutoConfig.for_model("gpt2", architectures=["GPT2LMHeadModel"], **common)
    heads = values["num_attention_heads"]
    common |= {
        "intermediate_size": source.metadata[f"{architecture}.feed_forward_length"],
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", values["hidden_size"] // heads),
        "rms_norm_eps": source.metadata[f"{architecture}.attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope(source, architecture),
    }
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return AutoConfig.for_model(architecture, architectures=[classes[architecture]], **common)


_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _is_tied(source: gguf.Gguf) -> bool:
    """No output matrix means the embedding is used; some files hold the same bytes twice instead."""
    head, embedding = source.tensors.get("output.weight"), source.tensors["token_embd.weight"]
    return head is None or (head.kind == embedding.kind and np.array_equal(head.data, embedding.data))


def _rope(source: gguf.Gguf, architecture: str) -> dict[str, Any]:
    """The rotary settings; Llama 3's scaling is stored as divisors only and has to be recognized."""
    theta = source.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    kind = source.metadata.get(f"{architecture}.rope.scaling.type", "none")
    divisors = source.tensors.get("rope_freqs.weight")
    if kind == "linear" and divisors is None:
        return {"rope_type": "linear", "rope_theta": theta,
                "factor": source.metadata[f"{architecture}.rope.scaling.factor"]}  # fmt: skip
    if kind != "none":
        raise ConfigError(f"{source.path}: rotary scaling of type {kind} cannot be read: use the safetensors model")
    if divisors is None:
        return {"rope_type": "default", "rope_theta": theta}
    found = divisors.values()
    # The one published recipe (Llama 3.1 and 3.2): these constants, and the largest divisor as the factor.
    recipe = {"rope_type": "llama3", "factor": float(found.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    if not np.allclose(found, _llama3_divisors(2 * len(found), theta, recipe), rtol=1e-4):
        raise ConfigError(f"{source.path}: rope_freqs.weight is not Llama 3's scaling: use the safetensors model")
    return {**recipe, "rope_theta": theta}


def _llama3_divisors(head_dim: int, theta: float, recipe: dict[str, Any]) -> Any:
    """By what Llama 3 divides each rotary frequency: 1 for short waves, `factor` for long ones, smooth between."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = recipe["low_freq_factor"], recipe["high_freq_factor"], recipe["factor"]
    smooth = np.clip((recipe["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


Tensors = dict[str, tuple[gguf.Stored, tuple[int, ...]]]


def _renamed(source: gguf.Gguf, architecture: str, config: Any) -> Tensors:
    """Name in the model -> stored tensor and its shape in the model."""
    names, tensors = _NAMES[architecture], {}
    for tensor in source.tensors.values():
        part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if tensor.name == "rope_freqs.weight" or (tensor.name == "output.weight" and config.tie_word_embeddings):
            continue  # became rope_parameters; is the embedding
        if not part or part[2] not in names:
            raise ConfigError(f"{source.path}: tensor {tensor.name} has no place in a {architecture} model")
        prefix = f"{names['blk']}.{part[1]}." if part[1] else ""
        name = f"{prefix}{names[part[2]]}.{part[3]}"
        tensors[name] = (tensor, tensor.shape[::-1] if _is_transposed(name) else tensor.shape)
    return tensors


def _is_transposed(name: str) -> bool:
    """GPT-2's Conv1D layers keep (in, out), GGUF keeps (out, in)."""
    return bool(re.fullmatch(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight", name))


def _check_complete(path: Path, config: Any, tensors: Tensors) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones appear once
    found = {name: shape for name, (_, shape) in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"{path}: {name} has shape {found.get(name)} in the file, the metadata asks for {expected.get(name)}"
            )


def _num_bytes(tensor: gguf.Stored) -> int:
    return int(np.prod(tensor.shape)) * (4 if tensor.code == "F32" else 2)


def _buffers(tensors: Tensors, config: Any) -> Any:
    for name, (tensor, shape) in tensors.items():
        values = tensor.values()
        if _is_transposed(name):
            values = values.T
        elif config.model_type == "llama" and re.search(r"\.(q|k)_proj\.", name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = _unpermuted(values, heads)
        assert values.shape == shape
        yield np.ascontiguousarray(values).data.cast("B")


def _unpermuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rotary rows: within a head it stores (0, n/2, 1, n/2 + 1, ...)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """What ends a generation: the end token, and the end of a turn where that is another token."""
    values = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_IDS.items()}
    ends = [i for i in (values["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")) if i is not None]
    return {**values, "eos_token_id": ends if len(set(ends)) > 1 else values["eos_token_id"]}
