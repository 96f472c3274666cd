"""The proof of a package: a stranger's process finds the adapter that was trained, and every other is refused."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, saved_run, settings
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from lora_ft import config
from lora_ft.adapters import files, provenance
from lora_ft.errors import MismatchError, SecurityError
from lora_ft.models.load import resolve_dtype
from lora_ft.models.quantize import import_bitsandbytes
from lora_ft.publishing import alone, proof, sums

Proven = tuple[Path, provenance.Loading]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rslora": True, "tie": True}),
    ("gpt2", {"dora": True}),
    ("gpt_neox", {"rank_pattern": {"0.mlp.dense_4h_to_h": 2}}),
    ("qwen3", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"quant": "nf4"}),
    ("llama", {"quant": "fp4", "dora": True}),
    ("llama", {"quant": "int8"}),
    ("llama", {"quant": "int8", "dora": True}),
]


def published(tmp_path: Path, family: str = "llama", *, added: tuple[str, ...] = (), **options: Any) -> Proven:
    """An adapter folder with its probe, and how its base is loaded."""
    cfg = settings(tmp_path, family, **options)
    cfg.model.added_tokens = list(added)
    return packaged(tmp_path, cfg)


def packaged(tmp_path: Path, cfg: config.TrainRun) -> Proven:
    folder = saved_run(tmp_path / "run", cfg) / "adapter"
    base, model = adapted(cfg)
    (folder / proof.PROBE).write_bytes(proof.make_probe(model, base.tokenizer))
    return folder, provenance.loading(base, cfg.quant, cfg.model)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stranger's program in this process, which takes a tenth of a second instead of ten."""
    monkeypatch.setattr(proof, "_alone", alone.prove)


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT


@pytest.mark.closes("D01", "D04")
def test_a_process_that_has_no_lora_ft_proves_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loading = published(tmp_path, quant="nf4", added=("<new>", "<newer>"))
    (folder / sums.SUMS).write_text(sums.render(sums.measured(folder)))
    trap = tmp_path / "trap" / "lora_ft"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('lora_ft was imported')")
    monkeypatch.setenv("PYTHONPATH", str(trap.parent), prepend=os.pathsep)
    proven = proof.prove(folder, loading)
    assert proven.distance is not None and proven.distance <= proven.allowed == 1e-5 < proven.effect
    assert proven.keys == len(load_file(folder / files.WEIGHTS)) and proven.zero_outputs == 0
    assert proven.files == len(sums.read(folder))
    bfloat16_products = bool(import_bitsandbytes().functional.has_avx512bf16())
    assert proven.kernels is not None and (proven.kernels > 0) == bfloat16_products
    assert proven.versions["peft"]


def test_why_the_strangers_process_failed_is_told_in_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, loading = published(tmp_path)
    program = tmp_path / "fails.py"
    program.write_text("raise RuntimeError('size mismatch for lora_A')")
    monkeypatch.setattr(proof, "_ALONE", program)
    with pytest.raises(MismatchError, match=r"does not load with PEFT alone: RuntimeError: size mismatch for lora_A$"):
        proof.prove(folder, loading)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_every_kind_of_adapter_is_found_as_it_was(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    proven = proof.prove(*published(tmp_path, family, **options))
    assert proven.distance is not None and proven.distance <= 1e-5 < proven.effect
    assert (proven.kernels is None) == ("quant" not in options)
    assert proven.outputs > 0 and proven.files is None


@pytest.mark.usefixtures("here")
def test_half_precision_is_allowed_its_rounding(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.model.dtype = config.Dtype.bfloat16
    proven = proof.prove(*packaged(tmp_path, cfg))
    assert proven.distance is not None and proven.distance <= proven.allowed == 2**-5 < proven.effect
    assert resolve_dtype(cfg.model.dtype, torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize("added", [(), ("<new>", "<newer>")])
def test_the_probe_is_the_same_bytes_twice_and_keeps_added_tokens_from_the_base(
    added: tuple[str, ...], tmp_path: Path
) -> None:
    folder, _ = published(tmp_path, added=added)
    first = (folder / proof.PROBE).read_bytes()
    cfg = settings(tmp_path, "llama")
    cfg.model.added_tokens = list(added)
    base, model = adapted(cfg)
    assert proof.make_probe(model, base.tokenizer) == first
    found = load_file(folder / proof.PROBE)
    tokens = len(base.tokenizer)
    assert found["ids"][-1] == found["columns"][-1] == tokens - 1
    rows, width = found["base"].shape
    assert (int(found["ids"].numel()), int(found["columns"].numel())) == tuple(found["adapter"].shape)
    assert found["ids"][:rows].max() < tokens - len(added) and found["columns"][:width].max() < tokens - len(added)
    assert (rows == 64) == (not added)


def renamed(folder: Path) -> None:
    tensors = load_file(folder / files.WEIGHTS)
    first = sorted(tensors)[0]
    save_file({k.replace(".layers.0.", ".layers.7.") if k == first else k: t for k, t in tensors.items()},
              folder / files.WEIGHTS)  # fmt: skip


def scaled(folder: Path, factor: float = 1.01) -> None:
    tensors = load_file(folder / files.WEIGHTS)
    save_file({k: t * factor if "lora_B" in k else t for k, t in tensors.items()}, folder / files.WEIGHTS)


def zeroed(folder: Path) -> None:
    scaled(folder, 0.0)


def another_alpha(folder: Path) -> None:
    fields = json.loads((folder / files.CONFIG).read_text())
    (folder / files.CONFIG).write_text(json.dumps(fields | {"lora_alpha": fields["lora_alpha"] * 2}))


def rslora(folder: Path) -> None:
    fields = json.loads((folder / files.CONFIG).read_text())
    (folder / files.CONFIG).write_text(json.dumps(fields | {"use_rslora": True}))


def no_probe_of_ours(folder: Path) -> None:
    save_file({"ids": torch.arange(3)}, folder / proof.PROBE)


def too_large(folder: Path) -> None:
    (folder / proof.PROBE).write_bytes(b"x" * (2**20 + 1))


def of_many_tokens(folder: Path) -> None:
    found = load_file(folder / proof.PROBE)
    longer = {name: torch.cat([found[name]] * 2) for name in ("ids", "adapter")}
    save_file(found | longer, folder / proof.PROBE)


def another_shape(folder: Path) -> None:
    found = load_file(folder / proof.PROBE)
    save_file(found | {"adapter": found["adapter"][:, 1:].contiguous()}, folder / proof.PROBE)


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.closes("D01")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, "missing: 1, first .*unexpected: 1, first "),
        (scaled, "the adapter in .* is not what the probe was made with"),
        (zeroed, "changes nothing: all of its 14 matrices B are 0"),
        (another_alpha, "the adapter in .* is not what the probe was made with"),
        (rslora, "the adapter in .* is not what the probe was made with"),
        (no_probe_of_ours, "is no probe"),
        (too_large, "larger than 1 MiB"),
        (another_shape, "is no probe"),
        (of_many_tokens, "is no probe: .* at most 64 x 256"),
    ],
)
def test_what_is_not_the_adapter_that_was_trained_is_refused(
    change: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folder, loading = published(tmp_path)
    proof.prove(folder, loading)
    change(folder)
    with pytest.raises(MismatchError, match=reason):
        proof.prove(folder, loading)


@pytest.mark.usefixtures("here")
@pytest.mark.closes("D03", "D04")
def test_a_base_that_is_another_one_is_told_from_a_broken_adapter(tmp_path: Path) -> None:
    folder, loading = published(tmp_path)
    other = tiny_folder(tmp_path / "other", "llama", seed=1)
    with pytest.raises(MismatchError, match=rf"the base alone \({other}\) is not what the probe was made with"):
        proof.prove(folder, dataclasses.replace(loading, place=str(other)))


def test_a_folder_that_would_make_peft_run_code_is_not_handed_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, loading = published(tmp_path)
    monkeypatch.setattr(proof, "_alone", lambda request: pytest.fail("it was loaded"))
    fields = json.loads((folder / files.CONFIG).read_text())
    mapping = {"parent_library": "os", "base_model_class": "system"}
    (folder / files.CONFIG).write_text(json.dumps(fields | {"auto_mapping": mapping}))
    with pytest.raises(SecurityError, match="auto_mapping asks to import os"):
        proof.prove(folder, loading)


@pytest.mark.usefixtures("here")
def test_without_a_probe_keys_and_effect_are_still_proven(tmp_path: Path) -> None:
    folder, loading = published(tmp_path)
    (folder / proof.PROBE).unlink()
    proven = proof.prove(folder, loading)
    assert proven.distance is None and proven.effect > 0 and proven.keys == 28


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "extra").write_text("x"), "not listed extra"),
        (lambda f: (f / files.CONFIG).unlink(), "missing adapter_config.json"),
        (lambda f: (f / files.CONFIG).write_text("{}"), "of other bytes adapter_config.json"),
        (lambda f: (f / sums.SUMS).write_text("abc"), "SHA256SUMS:1 is not a sha256"),
        (lambda f: (f / sums.SUMS).write_text(f"{'0' * 64}  ../x\n"), "SHA256SUMS:1 is not a sha256"),
        (lambda f: (f / sums.SUMS).write_text(f"{'0' * 64}  /x\n"), "SHA256SUMS:1 is not a sha256"),
    ],
)
def test_a_folder_that_is_not_what_its_sums_say_is_refused(
    change: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    for name in (files.CONFIG, "README.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / sums.SUMS).write_text(sums.render(sums.measured(tmp_path)))
    assert sums.check(tmp_path) == sums.measured(tmp_path)
    change(tmp_path)
    with pytest.raises(MismatchError, match=reason):
        sums.check(tmp_path)


def test_how_a_base_is_loaded_says_in_what_it_computes(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", quant="nf4")
    cfg.quant.compute_dtype = config.Dtype.bfloat16
    cfg.model.added_tokens = ["<new>"]
    base, _ = adapted(cfg)
    place = tmp_path / "llama"
    assert provenance.loading(base, cfg.quant, cfg.model).lines("it's") == [
        f"base = AutoModelForCausalLM.from_pretrained('{place}', dtype=torch.float32, "
        "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16))",
        "base.resize_token_embeddings(513, mean_resizing=False)",
        'model = PeftModel.from_pretrained(base, "it\'s")',
    ]


def test_the_program_of_the_stranger_is_no_module_of_ours() -> None:
    text = Path(alone.__file__).read_text()
    assert "import lora_ft" not in text and "from lora_ft" not in text
    assert os.environ.get("HF_HUB_OFFLINE") is None  # set for that program only
