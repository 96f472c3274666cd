"""Attacks by adapter folders: code to run, files outside the folder, and false sizes."""

import json
import os
import shutil
from collections.abc import Callable

from attacks import Attack, Paths
from attacks.bases import HEADERS, Row, change, header, large_header
from lora_ft import config
from lora_ft.adapters import loading, provenance
from lora_ft.adapters.peft_folder import CONFIG, WEIGHTS
from lora_ft.errors import MismatchError, SecurityError


def _open(paths: Paths) -> object:
    """Load a run's adapter on the base beside the run folder, as eval, chat and merge do."""
    adapter = loading.adapter_folder(str(paths.folder), None)
    model = config.Model(path=str(paths.folder.parent / "base"), dtype=config.Dtype.float32)
    tokenizer = loading.adapter_tokenizer(adapter, model)
    return loading.open_adapter(adapter, model, config.Quant(), "cpu", tokenizer)


def _settings(**fields: object) -> Callable[[Paths], None]:
    return lambda paths: change(paths.folder / "adapter" / CONFIG, **fields)


def _pickled(name: str) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        (paths.folder / "adapter" / WEIGHTS).unlink()
        (paths.folder / "adapter" / name).write_bytes(paths.pickle())

    return build


def _link(name: str) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        path = paths.folder / name
        shutil.move(path, paths.outside / path.name)
        path.symlink_to(paths.outside / path.name)

    return build


def _another_base(paths: Paths) -> None:
    (paths.folder / "adapter" / provenance.RECORD).unlink()
    shutil.copytree(paths.folder.parent / "base", paths.outside, dirs_exist_ok=True)
    change(paths.folder / "adapter" / CONFIG, base_model_name_or_path=str(paths.outside))


def _imported(paths: Paths) -> None:
    paths.plant_code(paths.folder / "megatron.py")
    change(paths.folder / "adapter" / CONFIG, megatron_config={"a": 1}, megatron_core="megatron")


def _tokenizer_code(paths: Paths) -> None:
    paths.plant_code(paths.folder / "adapter" / "evil.py")
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    change(paths.folder / "adapter" / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)


def _versioned_tokenizer(paths: Paths) -> None:
    names = ["../../outside/tokenizer.4.0.0.json"]
    change(paths.folder / "adapter" / "tokenizer_config.json", fast_tokenizer_files=names)


def _deep(name: str) -> Callable[[Paths], None]:
    text = json.dumps({"peft_type": "LORA"})[:-1] + ', "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    return lambda paths: (paths.folder / "adapter" / name).write_text(text) and None


_MAPPING = {"base_model_class": "Evil", "parent_library": "evil"}

_ADAPTERS: list[Row] = [
    ("a pickled adapter", _pickled("adapter_model.bin"), SecurityError, "can run code"),
    ("a pickled adapter, .pt", _pickled("adapter_model.pt"), SecurityError, "can run code"),
    ("a pickled adapter named .safetensors", _pickled(WEIGHTS), MismatchError, "not a safetensors"),
    ("its own model class", _settings(auto_mapping=_MAPPING), SecurityError, "auto_mapping asks to import evil"),
    ("a module to import", _imported, SecurityError, "megatron_config asks to import"),
    ("code for the tokenizer of an adapter", _tokenizer_code, SecurityError, "auto_map asks to run"),
    ("an adapter's tokenizer outside the folder", _versioned_tokenizer, SecurityError, "not a file of this folder"),
    ("another base by path", _another_base, None, ""),
    *((f"a link: {name}", _link(name), SecurityError, "outside of its folder")
      for name in (f"adapter/{CONFIG}", f"adapter/{WEIGHTS}", f"adapter/{provenance.RECORD}",
                   "adapter/tokenizer.json", "adapter/chat_template.jinja", "adapter")),
    ("an adapter's header over the limit", lambda p: large_header(p.folder / "adapter" / WEIGHTS, 11 * 2**20),
     SecurityError, "longer than the"),
    ("an adapter's header nested too deeply",
     lambda p: header(p.folder / "adapter" / WEIGHTS, '{"a":' * 50_000), SecurityError, "nested too deeply"),
    *((f"an adapter with {name}", lambda p, w=write: w(p.folder / "adapter" / WEIGHTS), MismatchError,
       r"adapter_model\.safetensors is not a safe") for name, write in HEADERS.items()),
    ("a rank of 10^12", _settings(r=10**12), MismatchError, "larger than adapter_model.safetensors has bytes"),
    ("a rank of 10^12 for one layer", _settings(rank_pattern={"q_proj": 10**12}), MismatchError, "larger than"),
    ("an invalid pattern", _settings(target_modules="(["), MismatchError, "does not fit this base"),
    ("target modules by path", _settings(target_modules=["../../outside"]), MismatchError, "does not fit this base"),
    ("an adapter's config nested too deeply", _deep(CONFIG), SecurityError, "nested too deeply"),
    ("an adapter's lora_ft.json nested too deeply", _deep(provenance.RECORD), SecurityError, "nested too deeply"),
    ("an adapter's lora_ft.json of 17 MiB", lambda p: os.truncate(p.folder / "adapter" / provenance.RECORD, 17 * 2**20),
     SecurityError, "larger than 16 MiB"),
]  # fmt: skip

ATTACKS = [Attack(name, build, _open, error, says) for name, build, error, says in _ADAPTERS]
