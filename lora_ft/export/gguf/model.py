"""Write a merged model as one GGUF file, for llama.cpp and the programs built on it, such as Ollama.

    my_model/config.json        ->  llama.block_count 30, llama.rope.freq_base 100000.0, ...
    my_model/model.safetensors  ->  blk.0.attn_q.weight Q8_0 [576, 576], blk.0.attn_norm.weight F32 [576], ...
    my_model/tokenizer.json     ->  tokenizer.ggml.tokens [...], tokenizer.ggml.pre "smollm", tokenizer.chat_template

Matrices are rounded to the requested type, norms and biases stay float32. `models/gguf/convert.py` reads the file back.
An unknown tensor is an error before anything is written. Keys: llama.cpp b10605, conversion/.
"""

import itertools
import logging
from pathlib import Path
from typing import Any

from lora_ft.errors import ConfigError
from lora_ft.export import verify
from lora_ft.export.gguf import rope, writer
from lora_ft.export.gguf import tokenizer as gguf_tokenizer
from lora_ft.export.gguf.layout import Layout, layout_of
from lora_ft.export.gguf.writer import Kind, PlannedTensor, Value
from lora_ft.io import untrusted
from lora_ft.models.load import read_tokenizer
from lora_ft.values import GgufType

log = logging.getLogger("lora_ft")

_KINDS = {GgufType.f32: Kind.F32, GgufType.f16: Kind.F16, GgufType.bf16: Kind.BF16, GgufType.q8_0: Kind.Q8_0}
_FILE_TYPES = {GgufType.f32: 0, GgufType.f16: 1, GgufType.q8_0: 7, GgufType.bf16: 32}  # llama.cpp's llama_ftype
_BLOCK = 32  # numbers that share a scale in Q8_0
_FULL = ("wpe.weight", "mlp.gate.weight")  # positions, and routers, whose rounding would choose other experts


def check(folder: Path, tokenizer: Any) -> None:
    """Raise the ConfigError that `write` would raise for a folder's config and this tokenizer, before a merge."""
    layout = layout_of(untrusted.json_object(folder / "config.json", ConfigError))
    _sizes(layout)
    rows = max(layout.config.vocab_size, len(tokenizer))  # of added tokens as well
    gguf_tokenizer.metadata(tokenizer, rows, _ends(folder, tokenizer, layout.config))


def write(folder: Path, out: Path, kind: GgufType) -> None:
    """Write a merged model's folder to the GGUF file `out`, its matrices rounded to type `kind`.

    Raises ConfigError for an architecture, a setting, a tokenizer or a tensor that the format cannot express and for
    numbers beyond the range of the type, MismatchError if tensors are missing.
    """
    layout = layout_of(untrusted.json_object(folder / "config.json", ConfigError))
    tokenizer = read_tokenizer(folder, str(folder))
    weights = dict(verify.load(folder).named_parameters())  # tied ones once
    metadata: dict[str, Value] = {
        "general.architecture": layout.family.architecture,
        "general.type": "model",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{layout.family.architecture}.{key}": value for key, value in _sizes(layout).items()},
        **gguf_tokenizer.metadata(
            tokenizer, layout.config.vocab_size, _ends(folder, tokenizer, layout.config), out.stem
        ),
    }
    divisors = rope.described(layout, _head(layout.config))[1]
    tensors = [PlannedTensor(name, array.shape, Kind.F32) for name, array in divisors.items()]
    for name, weight in weights.items():
        tensors += _planned(layout, name, tuple(weight.shape), _KINDS[kind])
    arrays = (
        array for name, weight in weights.items() for array in layout.arrays(name, weight.detach().float().numpy())
    )
    writer.write(out, metadata, tensors, itertools.chain(divisors.values(), arrays))


def _planned(layout: Layout, name: str, shape: tuple[int, ...], kind: Kind) -> list[PlannedTensor]:
    shape = layout.shape(name, shape)
    if len(shape) == 1 or name.endswith(_FULL):
        kind = Kind.F32
    elif kind is Kind.Q8_0 and shape[-1] % _BLOCK:
        log.warning("%s is stored as F16: its rows of %d numbers are not a multiple of %d", name, shape[-1], _BLOCK)
        kind = Kind.F16
    return [PlannedTensor(stored, shape, kind) for stored in layout.tensors(name)]


def _sizes(layout: Layout) -> dict[str, Value]:
    config, head = layout.config, _head(layout.config)
    derived = {
        "max_position_embeddings": _context(layout),
        "head_dim": head,
        "n_inner": getattr(config, "n_inner", None) or 4 * config.hidden_size,
    }
    sizes: dict[str, Value] = {
        key: derived.get(attribute) or getattr(config, attribute) for key, attribute in layout.family.sizes.items()
    }
    if missing := next((layout.family.sizes[key] for key, value in sizes.items() if value is None), None):
        raise ConfigError(f"llama.cpp needs a number for {missing} of {layout.family.model_type}, but config.json of "
                          "the base has none")  # fmt: skip
    sizes |= {"vocab_size": config.vocab_size, **layout.family.constants}
    if layout.family.has_window:
        sizes["attention.sliding_window"] = config.sliding_window
    if layout.family.is_rotary:
        sizes |= {"attention.value_length": head, **rope.described(layout, head)[0]}
    return sizes


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(layout: Layout) -> int:
    """Return the longest context for which llama.cpp computes the same; it ignores most families' sliding windows."""
    config = layout.config
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if window and window < longest and not layout.family.has_window:
        log.warning(
            "context of the GGUF file: %d tokens, not %d, because llama.cpp ignores the sliding window", window, longest
        )
        return int(window)
    return longest


def _ends(folder: Path, tokenizer: Any, config: Any) -> list[int]:
    """Return the ids that end a generation, from generation_config.json, else config.json, else the tokenizer."""
    path = folder / "generation_config.json"
    generation = untrusted.json_object(path, ConfigError) if path.is_file() else {}
    for found in (generation.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
