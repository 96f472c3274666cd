"""Write a merged model as one GGUF file, for llama.cpp, Ollama and their like.

    my_model/config.json        ->  llama.block_count 30, llama.rope.freq_base 100000.0, ...
    my_model/model.safetensors  ->  blk.0.attn_q.weight Q8_0 [576, 576], blk.0.attn_norm.weight F32 [576], ...
    my_model/tokenizer.json     ->  tokenizer.ggml.tokens [...], tokenizer.ggml.pre "smollm", tokenizer.chat_template

Matrices are rounded to the type asked for, norms and biases stay float32. `models/convert.py` reads the file back;
a tensor that neither would know is an error before anything is written. Keys: llama.cpp b10605, conversion/.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lora_ft.config import GgufType
from lora_ft.errors import ConfigError
from lora_ft.exports import gguf_names, gguf_tokens
from lora_ft.exports.gguf_file import Kind, Planned, Value
from lora_ft.exports.gguf_file import write as write_file
from lora_ft.io import untrusted
from lora_ft.models import locate
from lora_ft.models.load import read_tokenizer

log = logging.getLogger("lora_ft")

_KINDS = {GgufType.f32: Kind.F32, GgufType.f16: Kind.F16, GgufType.bf16: Kind.BF16, GgufType.q8_0: Kind.Q8_0}
_FILE_TYPES = {GgufType.f32: 0, GgufType.f16: 1, GgufType.q8_0: 7, GgufType.bf16: 32}  # llama.cpp's llama_ftype
_HEADER_LIMIT = 32 * 2**20  # bytes, of a file of weights
_BLOCK = 32  # numbers that share a scale in Q8_0

# Constants that checkpoints of old versions hold: causal masks, rotary frequencies.
_CONSTANTS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def check(folder: Path, tokenizer: Any) -> None:
    """Raise what `write` would of a folder's config and of this tokenizer, before the weights are merged."""
    layout = gguf_names.layout(untrusted.json_object(folder / "config.json", ConfigError))
    _sizes(layout)
    rows = max(layout.config.vocab_size, len(tokenizer))  # of added tokens as well
    gguf_tokens.metadata(tokenizer, rows, _ends(folder, tokenizer, layout.config))


def write(folder: Path, out: Path, kind: GgufType) -> None:
    """Write a folder as transformers saves it to the GGUF file `out`, its matrices of this type.

    Holds one tensor at a time. Raises ConfigError for an architecture, a setting, a tokenizer or a tensor that the
    file could not hold, and for numbers beyond float16's range where that is the type.
    """
    fields = untrusted.json_object(folder / "config.json", ConfigError)
    layout = gguf_names.layout(fields)
    tokenizer = read_tokenizer(folder, str(folder))
    places = _places(folder)
    shapes = _expected(layout, places)
    metadata: dict[str, Value] = {
        "general.architecture": layout.architecture,
        "general.type": "model",
        "general.name": out.stem,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{layout.architecture}.{key}": value for key, value in _sizes(layout).items()},
        **gguf_tokens.metadata(tokenizer, layout.config.vocab_size, _ends(folder, tokenizer, layout.config)),
    }
    divisors = _rope_divisors(layout)
    planned = [Planned("rope_freqs.weight", d.shape, Kind.F32) for d in divisors]
    planned += [_planned(layout, name, shape, _KINDS[kind]) for name, shape in shapes.items()]
    write_file(out, metadata, planned, _arrays(layout, places, shapes, divisors))


def _places(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds a tensor."""
    names = locate.weight_files(folder, {path.name for path in folder.iterdir()})
    headers = {folder / name: untrusted.tensor_header(folder / name, _HEADER_LIMIT, ConfigError) for name in names}
    return {key: path for path, header in headers.items() for key in header.shapes}


def _expected(layout: gguf_names.Layout, places: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by name, a tied one once; ConfigError where the files hold others."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(layout.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    twins = dict(model.named_parameters(remove_duplicate=False)).keys() - shapes.keys()
    constants = {name for name in places if _CONSTANTS.search(name)}
    for name in sorted(shapes.keys() ^ (places.keys() - twins - constants)):
        state = "missing in the files" if name in shapes else "not a part of the model that config.json describes"
        raise ConfigError(f"{name} is {state}")
    for name in sorted(shapes):
        module = name.rpartition(".")[0]
        if layout.name(module) is None:
            raise ConfigError(f"{module} has no place in a {layout.architecture} GGUF file")
        with safe_open(places[name], "pt") as file:
            found = tuple(file.get_slice(name).get_shape())
        if found != shapes[name]:
            raise ConfigError(f"{name} has shape {found}, config.json asks for {shapes[name]}")
    for name in sorted(twins & places.keys()):
        first = next(n for n, p in model.named_parameters() if p is model.get_parameter(name))
        if not torch.equal(_tensor(places, name), _tensor(places, first)):
            raise ConfigError(f"{name} and {first} are one matrix by config.json, and two in the files")
    return shapes


def _tensor(places: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(places[name], "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _planned(layout: gguf_names.Layout, name: str, shape: tuple[int, ...], kind: Kind) -> Planned:
    module, _, leaf = name.rpartition(".")
    if layout.architecture == "gpt2" and len(shape) == 2:
        shape = layout.weight(module, np.broadcast_to(np.float32(0), shape)).shape
    stored = f"{layout.name(module)}.{leaf}"
    if len(shape) == 1 or stored == "position_embd.weight":
        kind = Kind.F32
    elif kind is Kind.Q8_0 and shape[-1] % _BLOCK:
        log.warning("%s has rows of %d numbers, no multiple of %d: stored as F16", name, shape[-1], _BLOCK)
        kind = Kind.F16
    return Planned(stored, shape, kind)


def _arrays(
    layout: gguf_names.Layout, places: dict[str, Path], names: dict[str, Any], first: list[np.ndarray]
) -> Iterator[np.ndarray]:
    yield from first
    for name in names:
        yield layout.weight(name.rpartition(".")[0], _tensor(places, name).float().numpy())


def _sizes(layout: gguf_names.Layout) -> dict[str, Value]:
    config = layout.config
    sizes: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": _context(config),
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if layout.architecture == "gpt2":
        return sizes | {
            "feed_forward_length": config.n_inner or 4 * config.hidden_size,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return sizes | {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **_rope(config.rope_parameters, head),
    }


def _context(config: Any) -> int:
    """The longest text that llama.cpp computes as the model does: it has no sliding windows for these architectures."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if window and window < longest:
        log.warning(
            "the file says a context of %d tokens, not %d: attention slides beyond, not so there", window, longest
        )
        return int(window)
    return longest


def _rope(settings: dict[str, Any], head: int) -> dict[str, Value]:
    kind = settings.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"rotary positions of type {kind} cannot be written to GGUF; known: default, linear, llama3")
    values: dict[str, Value] = {
        "rope.dimension_count": head,
        "rope.freq_base": float(settings.get("rope_theta", 10000.0)),
    }
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    return values


def _rope_divisors(layout: gguf_names.Layout) -> list[np.ndarray]:
    """By what Llama 3's scaling divides each rotary frequency, as transformers computes them; none for other models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = getattr(layout.config, "rope_parameters", None) or {}
    if settings.get("rope_type") != "llama3":
        return []
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](layout.config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = settings["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return [(plain / scaled.double()).float().numpy()]


def _ends(folder: Path, tokenizer: Any, config: Any) -> list[int]:
    """The ids that end a generation: those of generation_config.json, else config.json's, else the tokenizer's."""
    path = folder / "generation_config.json"
    generation = untrusted.json_object(path, ConfigError) if path.is_file() else {}
    for found in (generation.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
