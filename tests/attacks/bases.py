"""Attacks by base models, as folders and GGUF files: code to run, files outside the folder, and huge sizes."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from attacks import Attack, Paths
from lora_ft import config
from lora_ft.errors import ConfigError, LoraFtError, SecurityError
from lora_ft.models.load import load_base


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def header(path: Path, text: str, data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file with any header."""
    encoded = text.encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def tensor(begin: int, end: int, shape: str) -> str:
    return f'{{"dtype": "F32", "shape": {shape}, "data_offsets": [{begin}, {end}]}}'


HEADERS: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": lambda p: header(p, "{}", length=2**63),
    "overlapping tensors": lambda p: header(
        p, f'{{"a": {tensor(0, 8, "[2]")}, "b": {tensor(4, 12, "[2]")}}}', bytes(12)
    ),
    "a negative offset": lambda p: header(p, f'{{"a": {tensor(-4, 4, "[2]")}}}', bytes(4)),
    "a shape of 2^64 numbers": lambda p: header(p, f'{{"a": {tensor(0, 4, "[4294967296, 4294967296]")}}}', bytes(4)),
    "a shape that overflows": lambda p: header(p, f'{{"a": {tensor(0, 16, f"[{2**62 + 1}, 4]")}}}', bytes(16)),
    "a name twice": lambda p: header(p, f'{{"a": {tensor(0, 4, "[1]")}, "a": {tensor(0, 4, "[1]")}}}', bytes(4)),
    "bytes that belong to no tensor": lambda p: header(p, f'{{"a": {tensor(0, 4, "[1]")}}}', b"PK\3\4" * 2),
    "a header that is a list": lambda p: header(p, "[1, 2]"),
}  # fmt: skip


def large_header(path: Path, num_bytes: int) -> None:
    header(path, "{}", length=num_bytes)
    os.truncate(path, num_bytes + 8)  # a sparse file, which uses no disk space


def _load(paths: Paths) -> object:
    return load_base(config.Model(path=str(paths.folder), dtype=config.Dtype.float32), config.Quant(), "cpu")


def _load_gguf(paths: Paths) -> object:
    return load_base(config.Model(path=str(paths.folder / "model.gguf")), config.Quant(), "cpu")


def _pickled(*names: str) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        (paths.folder / "model.safetensors").unlink()
        for name in names:
            (paths.folder / name).write_bytes(paths.pickle())

    return build


def _code(file: str, **fields: object) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        paths.plant_code(paths.folder / "evil.py")
        change(paths.folder / file, **fields)

    return build


def _settings(**fields: object) -> Callable[[Paths], None]:
    return lambda paths: change(paths.folder / "config.json", **fields)


def _index(name: str, file: str = "model.safetensors.index.json", **fields: object) -> Callable[[Paths], None]:
    """Write a sharded index that names one shard; `{outside}` in the name is the folder outside."""

    def build(paths: Paths) -> None:
        (paths.folder / "model.safetensors").rename(paths.folder / "kept.safetensors")
        shard = name.format(outside=paths.outside)
        (paths.folder / file).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}}))
        change(paths.folder / "config.json", **fields)

    return build


def _link(name: str) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        path = paths.folder / name
        path.parent.mkdir(exist_ok=True)
        target = paths.outside / path.name
        if path.is_file():
            shutil.move(path, target)
        else:
            target.write_text("outside")
        path.symlink_to(target)

    return build


def _linked_shard(paths: Paths) -> None:
    _index("shard.safetensors")(paths)
    (paths.folder / "shard.safetensors").symlink_to(paths.outside / "model.safetensors")


def _pipe(paths: Paths) -> None:
    (paths.folder / "generation_config.json").unlink()
    os.mkfifo(paths.folder / "generation_config.json")


def _embedded_adapter(paths: Paths) -> None:
    (paths.folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(paths.outside), "target_modules": ["q_proj"]})
    )
    (paths.folder / "adapter_model.bin").write_bytes(paths.pickle())


def _versioned_tokenizer(paths: Paths) -> None:
    shutil.copy(paths.folder / "tokenizer.json", paths.outside / "tokenizer.4.0.0.json")
    change(paths.folder / "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"])


def _vocabulary_elsewhere(paths: Paths) -> None:
    names = ("vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "spm_file")
    for name in names:
        (paths.outside / name).write_text("{}")
    change(paths.folder / "tokenizer_config.json", **{name: str(paths.outside / name) for name in names})


def _deep(name: str) -> Callable[[Paths], None]:
    return lambda paths: (paths.folder / name).write_text('{"a":' * 50_000 + "1" + "}" * 50_000) and None


def _large(name: str) -> Callable[[Paths], None]:
    return lambda paths: os.truncate(paths.folder / name, 17 * 2**20)


def _gguf(body: bytes, num_tensors: int = 0, num_keys: int = 1) -> Callable[[Paths], None]:
    start = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys)
    return lambda paths: (paths.folder / "model.gguf").write_bytes(start + body) and None


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


_ARRAY_IN_ARRAY = struct.pack("<IQ", 9, 1)
_TRAVERSING = (
    _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
    + _text("../../outside/model.safetensors") + struct.pack("<IQIQ", 1, 8, 0, 0) + bytes(128)
)  # fmt: skip

Row = tuple[str, Callable[[Paths], None], type[LoraFtError] | None, str]

_FOLDERS: list[Row] = [
    ("a pickle named .safetensors",
     lambda p: (p.folder / "model.safetensors").write_bytes(p.pickle()) and None, ConfigError, "not a safetensors"),
    ("pickled weights only", _pickled("pytorch_model.bin"), SecurityError, "pickled weights only"),
    ("pickled weights, .pt", _pickled("model.pt"), SecurityError, "pickled weights only"),
    ("pickled shards", _pickled("pytorch_model-00001-of-00001.bin"), SecurityError, "pickled weights only"),
    ("code for the config", _code("config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
     SecurityError, "auto_map asks to run"),
    ("code for the tokenizer",
     _code("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]}),
     SecurityError, "auto_map asks to run"),
    ("code for a known class", _code("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}), None, ""),
    ("code for generation", lambda p: p.plant_code(p.folder / "custom_generate" / "generate.py"), None, ""),
    ("attention kernel from the hub", _settings(attn_implementation="evil/kernel"), SecurityError, "kernel of the hub"),
    ("attention kernel from the hub, internal name",
     _settings(_attn_implementation_internal="evil/kernel@main:f"), SecurityError, "kernel of the hub"),
    ("attention kernel from the hub, nested",
     _settings(text_config={"_attn_implementation": {"": "evil/kernel"}}), SecurityError, "kernel of the hub"),
    ("experts from the hub", _settings(_experts_implementation="evil/kernel"), SecurityError, "kernel of the hub"),
    ("other weights, pickled", _settings(transformers_weights="adapter_model.bin"), SecurityError, "not checked"),
    ("other weights, an index",
     _index("../outside/model.safetensors", "other.safetensors.index.json",
            transformers_weights="other.safetensors.index.json"), SecurityError, "not checked"),
    ("an adapter inside a model folder", _embedded_adapter, SecurityError, "holds a model and an adapter_config"),
    ("a shard above the folder", _index("../outside/model.safetensors"), SecurityError, "not the plain name"),
    ("a shard by absolute path", _index("{outside}/model.safetensors"), SecurityError, "not the plain name"),
    ("a shard that is a link", _linked_shard, SecurityError, "outside of its folder"),
    *((f"a link: {name}", _link(name), SecurityError, "outside of its folder")
      for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
                   "generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja")),
    ("a named pipe", _pipe, SecurityError, "neither a regular file nor a folder"),
    ("a versioned tokenizer outside the folder", _versioned_tokenizer, SecurityError, "not a file of this folder"),
    ("a vocabulary outside the folder", _vocabulary_elsewhere, None, ""),
    ("a header above the size limit", lambda p: large_header(p.folder / "model.safetensors", 33 * 2**20),
     SecurityError, "longer than the"),
    ("a header nested too deeply",
     lambda p: header(p.folder / "model.safetensors", '{"a":' * 50_000), SecurityError, "nested too deeply"),
    *((name, lambda p, w=write: w(p.folder / "model.safetensors"), ConfigError, r"model\.safetensors is not a safe")
      for name, write in HEADERS.items()),
    *((f"nested too deeply: {name}", _deep(name), SecurityError, "nested too deeply")
      for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")),
    ("a config of 17 MiB", _large("config.json"), SecurityError, "larger than 16 MiB"),
]  # fmt: skip

_GGUF: list[Row] = [
    ("GGUF: nested arrays",
     _gguf(_text("a") + struct.pack("<I", 9) + _ARRAY_IN_ARRAY * 5_000), ConfigError, "damaged"),
    ("GGUF: 2^62 keys", _gguf(b"", num_keys=2**62), ConfigError, "damaged"),
    ("GGUF: a string of 2^62 bytes", _gguf(struct.pack("<Q", 2**62)), ConfigError, "damaged"),
    ("GGUF: an array of 2^62 bytes", _gguf(_text("a") + struct.pack("<IIQ", 9, 0, 2**62)), ConfigError, "damaged"),
    ("GGUF: a tensor named by a path", _gguf(_TRAVERSING, num_tensors=1), ConfigError, "lacks"),
]  # fmt: skip

ATTACKS = [Attack(name, build, _load, error, says) for name, build, error, says in _FOLDERS]
ATTACKS += [Attack(name, build, _load_gguf, error, says) for name, build, error, says in _GGUF]
