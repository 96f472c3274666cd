"""Adapter folders as versions of PEFT and other programs write them: loaded as by PEFT, or refused with a remedy."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finished import call
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_ft
from lora_ft import config
from lora_ft.adapters import files, loading, peft_folder
from lora_ft.errors import MismatchError, SecurityError
from lora_ft.export.merge import hindrance
from lora_ft.publishing import compatibility

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
]

SAVE = {"save_embedding_layers": True}
IDS = torch.tensor([[5, 17, 130, 400, 9, 256]])
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """An adapter made with PEFT: its settings, the rows of a resized vocabulary, and changes to the files."""

    settings: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    save: dict[str, Any] = field(default_factory=dict)
    name: str = "default"
    compiled: bool = False
    base: str = "plain"
    tensors: Change | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def renamed(pattern: str, new: str) -> Change:
    return lambda tensors: {re.sub(pattern, new, key): tensor for key, tensor in tensors.items()}


def copies(pattern: str, new: str) -> Change:
    return lambda tensors: {re.sub(pattern, new, key): tensor.clone() for key, tensor in tensors.items()}


NAMED = renamed(r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)", r"\1.default")
EMBEDDED = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
NEW_TOKENS = {"trainable_token_indices": {"embed_tokens": list(range(512, 520))}}
OLD_FIELDS = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "peft_version", "exclude_modules",
              "trainable_token_indices", "target_parameters", "lora_bias", "revision")  # fmt: skip

# Those that PEFT itself loads as they are: the logits must be PEFT's.
LOADED_BY_PEFT = {
    "old keys": Kind(
        {"lora_alpha": 16},
        dropped=OLD_FIELDS,
        fields={"enable_lora": None, "merge_weights": False, "lora_alpha": 16.0, "fan_in_fan_out": False},
    ),
    "keys of a later version": Kind(fields={"future_config": None, "use_future": False, "patterns": {}, "names": []}),
    "runtime settings": Kind(fields={"runtime_config": {"ephemeral_gpu_offload": False}}),
    "copies of adapted ends": Kind(EMBEDDED),
    "copy of an adapted embedding": Kind({"target_modules": ["embed_tokens"]}),
    "copy of a DoRA head": Kind({"target_modules": ["lm_head"], "use_dora": True}, save=SAVE),
    "ends of the base saved whole": Kind(save=SAVE),
    "resized up": Kind(rows=520),
    "resized down": Kind(rows=512, base="wide"),
    "resized, tied": Kind(rows=520, base="tied"),
    "resized, ends adapted": Kind(EMBEDDED, rows=520),
    "resized, ends in full": Kind({"modules_to_save": ["embed_tokens", "lm_head"]}, rows=520),
    "resized, new tokens": Kind(NEW_TOKENS, rows=520, save=SAVE),
    "trained tokens": Kind({"trainable_token_indices": [5, 7]}),
    "ends in full": Kind({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "one end in full, saved whole": Kind({"modules_to_save": ["embed_tokens"]}, save=SAVE),
    "another adapter's name": Kind(name="english"),
    "DoRA": Kind({"use_dora": True}),
    "DoRA's magnitude with .weight": Kind({"use_dora": True}, tensors=renamed("vector$", "vector.weight")),
    "targets as a pattern": Kind({"target_modules": r".*\.(q|v)_proj"}),
    "targets of the architecture": Kind(fields={"target_modules": None}),
}
# Those of which PEFT drops tensors with a warning: the logits must be those of the same adapter saved well.
RENAMED = {
    "null for a later default": Kind(fields={"use_dora": None, "rank_pattern": None, "lora_dropout": None}),
    "compiled": Kind(compiled=True),
    "compiled outside": Kind(tensors=renamed("^", "_orig_mod.")),
    "compiled layers": Kind(tensors=renamed(r"layers\.(\d)", r"layers.\1._orig_mod")),
    "FSDP": Kind(tensors=renamed(r"layers\.(\d)", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module")),
    "DDP": Kind(tensors=renamed("^", "module.")),
    "wrapped twice": Kind(tensors=renamed("^", "base_model.model.")),
    "without prefix": Kind(tensors=renamed(r"^base_model\.model\.", "")),
    "named": Kind(tensors=NAMED),
    "named, English": Kind(tensors=renamed("(lora_[AB])", r"\1.english")),
    "named DoRA": Kind({"use_dora": True}, tensors=NAMED),
    "named embedding": Kind({"target_modules": ["embed_tokens"]}, tensors=NAMED),
    "named magnitude with .weight": Kind({"use_dora": True}, tensors=renamed("vector$", "vector.default.weight")),
    "modules_to_save in names": Kind(
        {"modules_to_save": ["norm"]}, tensors=renamed(r"model\.norm\.weight", "model.norm.modules_to_save.weight")
    ),
    "modules_to_save and a name": Kind(
        {"modules_to_save": ["lm_head"]}, tensors=renamed(r"lm_head\.weight", "lm_head.modules_to_save.default.weight")
    ),
}


@dataclass(frozen=True)
class Made:
    """A folder with a kind of adapter, the logits that its author saw, and the same adapter as PEFT saves it."""

    folder: Path
    base: Path
    logits: Tensor
    plain: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("plain", "tied", "wide"):
        found[name] = tmp_path_factory.mktemp("base") / name
        model = tiny_model("llama", tie=name == "tied")
        if name == "wide":
            model.resize_token_embeddings(528, mean_resizing=False)
        model.save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


def make(kind: Kind, base: Path, at: Path) -> Made:
    """Train nothing: attach an adapter with PEFT, fill it with random numbers and save it with PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(1)
        if kind.rows:
            model.resize_token_embeddings(kind.rows, mean_resizing=False)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | kind.settings
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings), adapter_name=kind.name)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        adapted.peft_config[kind.name].base_model_name_or_path = str(base)
        expected = logits(adapted)
        adapted.save_pretrained(at / "plain", **kind.save)
        if kind.compiled:
            adapted.base_model.model = torch.compile(adapted.base_model.model)
        adapted.save_pretrained(at / "saved", **kind.save)
    saved, plain = (at / name / (kind.name if kind.name != "default" else "") for name in ("saved", "plain"))
    if kind.tensors:
        rewrite(saved, kind.tensors)
    fields = json.loads((saved / peft_folder.CONFIG).read_text())
    kept = {name: value for name, value in fields.items() if name not in kind.dropped}
    (saved / peft_folder.CONFIG).write_text(json.dumps(kept | kind.fields))
    return Made(saved, base, expected, plain)


def rewrite(folder: Path, change: Change) -> None:
    path = folder / peft_folder.WEIGHTS
    path.write_bytes(safetensors.torch.save(change(safetensors.torch.load_file(path)), {"format": "pt"}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


def by_peft(made: Made, folder: Path, kind: Kind) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(made.base)
    with warnings.catch_warnings(action="ignore"):
        if kind.rows:
            model.resize_token_embeddings(kind.rows, mean_resizing=False)
        return logits(PeftModel.from_pretrained(model, folder))


@pytest.mark.parametrize("name", [*LOADED_BY_PEFT, *RENAMED])
def test_loaded_as_peft_loads_it_and_merged(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind = (LOADED_BY_PEFT | RENAMED)[name]
    made = make(kind, bases[kind.base], tmp_path)
    expected = by_peft(made, made.folder if name in LOADED_BY_PEFT else made.plain, kind)
    assert torch.equal(expected, made.logits)
    model, _ = lora_ft.load(str(made.folder), device="cpu")
    assert torch.equal(logits(model), expected)
    merged = tmp_path / "merged"
    assert call("merge", f"adapter_path={made.folder}", f"out={merged}") == 0
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(whole) - expected).abs().max() < 1e-4


def folder_of(settings: dict[str, Any], bases: dict[str, Path], at: Path, **more: Any) -> Path:
    return make(Kind(settings, **more), bases["plain"], at).folder


def test_newer_settings_with_a_value_are_refused_by_name_and_value(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = folder_of({}, bases, tmp_path, fields={"lora_nums": 4, "enable_lora": [True, False], "unset": None})
    with pytest.raises(MismatchError, match=r"has enable_lora=\[True, False\], lora_nums=4, which the installed PEFT"):
        peft_folder.read_config(adapter)


@pytest.mark.parametrize("needed", ["r", "lora_alpha"])
def test_null_is_refused_where_it_would_be_a_guess(needed: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = folder_of({}, bases, tmp_path, fields={needed: None})
    with pytest.raises(MismatchError, match=f"{needed} must be int, got None"):
        peft_folder.read_config(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: renamed("_A", "_A.first")(t) | copies("_A", "_A.second")(t), r"holds 2 adapters \(first, second\)"),
        (lambda t: t | copies("_A", "_A.default")(t), "one tensor under two names"),
        (lambda t: t | copies("layers", "layers._orig_mod")(t), "one tensor under two names"),
        (lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.zeros(512, 32)},
         r"embed_tokens.weight is \[512, 32\] instead of \[512, 64\]"),
        (lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.zeros(520, 64)},
         "the embedding or the head of a resized vocabulary, and not the other: they would have 520 and 512 rows"),
        (lambda t: t | {"base_model.model.model.wte.weight": torch.zeros(520, 64)}, "has no such layer"),
        (lambda t: t | {"base_model.model.lm_head.base_layer.weight": torch.zeros(512, 64)},
         "a copy of its base's lm_head.weight, which differs from this base"),
        (lambda t: t | {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(512, 64),
                        "base_model.model.lm_head.weight": torch.ones(512, 64)}, "which differ but are one tensor"),
    ],
)  # fmt: skip
def test_ambiguous_names_and_unfitting_tensors_are_refused(
    change: Change, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = folder_of({"modules_to_save": ["lm_head"]} if "one tensor$" in f"{message}$" else {}, bases, tmp_path)
    rewrite(adapter, change)
    with pytest.raises(MismatchError, match=message):
        files.load(tiny_model("llama"), adapter, "again")


def test_copy_in_a_coarser_dtype_equals_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = folder_of(EMBEDDED, bases, tmp_path)
    rewrite(adapter, lambda t: {k: v.bfloat16() if "base_layer" in k else v for k, v in t.items()})
    files.load(tiny_model("llama"), adapter, "again")
    files.load(tiny_model("llama", dtype=torch.bfloat16), adapter, "again")


def test_ends_that_differ_do_not_fit_a_base_that_shares_them(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make(Kind(rows=520), bases["plain"], tmp_path).folder
    with pytest.raises(MismatchError, match="name a base with tie_word_embeddings=false"):
        files.load(tiny_model("llama", tie=True), adapter, "again")


def test_training_goes_on_from_renamed_tensors_and_not_from_a_resized_vocabulary(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    named = make(RENAMED["named"], bases["plain"], tmp_path / "named")
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "next")
    files.load_tensors(model, named.folder, "next")
    files.check_shapes(model, named.folder, "next")
    assert torch.equal(logits(model), named.logits)
    resized = make(LOADED_BY_PEFT["resized up"], bases["plain"], tmp_path / "resized")
    for read in (files.load_tensors, files.check_shapes):
        with pytest.raises(MismatchError, match=r"merge it first \(lora-ft merge adapter_path=.* out=MERGED\)"):
            read(model, resized.folder, "next")


# Other programs


def mlx_folder(at: Path) -> Path:
    at.mkdir(parents=True)
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(64, 4)}
    (at / "adapters.safetensors").write_bytes(safetensors.torch.save(tensors))
    (at / peft_folder.CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4}, "num_layers": 2}')
    return at


def test_mlx_adapter_is_named_as_one(bases: dict[str, Path], tmp_path: Path) -> None:
    alone = mlx_folder(tmp_path / "alone")
    with pytest.raises(MismatchError, match=r"is an adapter of MLX .*: fuse it into its base .*model.path=FUSED"):
        peft_folder.read_config(alone)
    [fault, *_] = compatibility.verdicts(alone, None)
    assert "is an adapter of MLX" in fault.reason
    beside = folder_of({}, bases, tmp_path / "both")
    with pytest.raises(MismatchError, match=f"use {beside}, which holds the same adapter for PEFT"):
        peft_folder.read_config(mlx_folder(beside / "mlx"))


def test_pickle_is_refused_and_the_command_of_the_message_converts_it(bases: dict[str, Path], tmp_path: Path) -> None:
    made = make(Kind(), bases["plain"], tmp_path)
    shutil.copytree(made.folder, tmp_path / "pickled")
    pickled = tmp_path / "pickled"
    torch.save(safetensors.torch.load_file(pickled / peft_folder.WEIGHTS), pickled / "adapter_model.bin")  # noqa: TID251
    (pickled / peft_folder.WEIGHTS).unlink()
    with pytest.raises(SecurityError, match=r"adapter_model\.bin is a pickle, which can run code") as refused:
        peft_folder.read_config(pickled)
    [command] = re.findall(r'python -c "(.*)"', str(refused.value))
    subprocess.run([sys.executable, "-c", command], check=True)
    assert torch.equal(logits(files.load(tiny_model("llama"), pickled, "again")), made.logits)


def test_folders_around_an_adapter_are_explained(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = folder_of({}, bases, tmp_path / "run")
    shutil.copytree(adapter, tmp_path / "checkpoints" / "checkpoint-8")
    with pytest.raises(MismatchError, match="the adapters are in checkpoint-8: name one"):
        peft_folder.read_config(tmp_path / "checkpoints")
    with pytest.raises(MismatchError, match=r"it holds a whole model: use model=local model\.path="):
        peft_folder.read_config(bases["plain"])
    (adapter.parent / "config.yaml").touch()
    adapter.rename(adapter.parent / "adapter")
    with pytest.raises(MismatchError, match="it is a run folder: use run="):
        peft_folder.read_config(tmp_path / "run")


# Advice

HINDERED = {
    "bias": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("name", [*HINDERED, *LOADED_BY_PEFT, *RENAMED])
def test_lint_advises_to_merge_what_merge_accepts_and_nothing_else(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kind = (LOADED_BY_PEFT | RENAMED).get(name) or Kind(HINDERED[name])
    made = make(kind, bases[kind.base], tmp_path)
    saved = peft_folder.read_config(made.folder)
    described = json.loads((made.base / "config.json").read_text())
    remedies = [verdict.remedy for verdict in compatibility.verdicts(made.folder, described)]
    advised = any("merge it: lora-ft merge" in remedy for remedy in remedies)
    assert advised == (hindrance(saved) is None)
    assert advised == (name not in HINDERED)
    if not advised:
        assert call("merge", f"adapter_path={made.folder}", f"out={tmp_path / 'merged'}") == 5


@pytest.mark.parametrize("name", ["bias"])
def test_merging_with_peft_is_a_remedy_that_works(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    made = make(Kind(HINDERED[name]), bases["plain"], tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), made.folder)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - made.logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["named", "resized up", "copies of adapted ends"])
def test_publishing_writes_a_package_that_peft_loads(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind = (LOADED_BY_PEFT | RENAMED)[name]
    made = make(kind, bases["plain"], tmp_path)
    package = tmp_path / "package"
    assert call("publish", f"adapter_path={made.folder}", f"to=dir:{package}", "model.hub_id=org/tiny") == 0
    assert torch.equal(by_peft(made, package, kind), made.logits)
    assert call("publish", f"adapter_path={package}", "verify_only=true", "model=local", f"model.path={made.base}") == 0


def test_settings_of_an_open_adapter_are_those_of_the_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    made = make(LOADED_BY_PEFT["resized up"], bases["plain"], tmp_path)
    cfg = loading.with_base(config.ChatRun(adapter_path=str(made.folder), device="cpu"), made.folder)
    base, _ = loading.open_adapter(made.folder, cfg.model, cfg.quant, "cpu", tiny_tokenizer())
    assert base.model.config.vocab_size == base.model.get_input_embeddings().num_embeddings == 520
    assert base.model.get_output_embeddings().out_features == 520
