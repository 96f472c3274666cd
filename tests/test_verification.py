"""Verification: a process without lora_ft accepts the trained adapter and refuses any other."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, saved_run, settings
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from lora_ft import config
from lora_ft.adapters import peft_folder, provenance
from lora_ft.errors import MismatchError, SecurityError
from lora_ft.models.device import resolve_dtype
from lora_ft.models.quantize import import_bitsandbytes
from lora_ft.publishing import checksums, verification, verify_worker

Packaged = tuple[Path, provenance.Loading]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_rslora": True, "tie": True}),
    ("gpt2", {"use_dora": True}),
    ("gpt_neox", {"rank_pattern": {"0.mlp.dense_4h_to_h": 2}}),
    ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"quant": "nf4"}),
    ("llama", {"quant": "fp4", "use_dora": True}),
    ("llama", {"quant": "int8"}),
    ("llama", {"quant": "int8", "use_dora": True}),
]


def published(tmp_path: Path, family: str = "llama", *, added: tuple[str, ...] = (), **options: Any) -> Packaged:
    """Create an adapter folder with its probe; return it and the arguments that load its base."""
    cfg = settings(tmp_path, family, **options)
    cfg.model.added_tokens = list(added)
    return packaged(tmp_path, cfg)


def packaged(tmp_path: Path, cfg: config.TrainRun) -> Packaged:
    folder = saved_run(tmp_path / "run", cfg) / "adapter"
    base, model = adapted(cfg)
    (folder / verification.PROBE).write_bytes(verification.make_probe(model, base.tokenizer))
    return folder, provenance.loading(base, cfg.quant, cfg.model)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker in this process, which takes a tenth of a second instead of ten."""
    monkeypatch.setattr(verification, "_run_worker", verify_worker.verify)


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT


@pytest.mark.closes("D01", "D04")
def test_process_without_lora_ft_verifies_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loading = published(tmp_path, quant="nf4", added=("<new>", "<newer>"))
    (folder / checksums.FILE).write_text(checksums.render(checksums.compute(folder)))
    trap = tmp_path / "trap" / "lora_ft"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('lora_ft was imported')")
    monkeypatch.setenv("PYTHONPATH", str(trap.parent), prepend=os.pathsep)
    found = verification.verify(folder, loading)
    assert found.distance is not None and found.distance <= found.allowed == 1e-5 < found.effect
    assert found.keys == len(load_file(folder / peft_folder.WEIGHTS)) and found.zero_outputs == 0
    assert found.files == len(checksums.read(folder))
    bfloat16_products = bool(import_bitsandbytes().functional.has_avx512bf16())
    assert found.kernels is not None and (found.kernels > 0) == bfloat16_products
    assert found.versions["peft"]


def test_error_of_the_worker_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loading = published(tmp_path)
    program = tmp_path / "fails.py"
    program.write_text("raise RuntimeError('size mismatch for lora_A')")
    monkeypatch.setattr(verification, "_WORKER", program)
    with pytest.raises(
        MismatchError, match=r"PEFT cannot load the adapter in .*: RuntimeError: size mismatch for lora_A$"
    ):
        verification.verify(folder, loading)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_every_type_of_adapter_is_verified(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = verification.verify(*published(tmp_path, family, **options))
    assert found.distance is not None and found.distance <= 1e-5 < found.effect
    assert (found.kernels is None) == ("quant" not in options)
    assert found.outputs > 0 and found.files is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("modules", "added"), [([], []), (["norm", "lm_head"], []), ([], ["<new>", "<newer>"])])
def test_bfloat16_is_verified_within_its_rounding(tmp_path: Path, modules: list[str], added: list[str]) -> None:
    cfg = settings(tmp_path, "llama", modules_to_save=modules)
    cfg.model.dtype, cfg.model.added_tokens = config.Dtype.bfloat16, added
    found = verification.verify(*packaged(tmp_path, cfg))
    assert found.distance is not None and found.distance <= found.allowed == 2**-5 < found.effect
    assert resolve_dtype(cfg.model.dtype, torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize("added", [(), ("<new>", "<newer>")])
def test_probe_is_reproducible_and_has_no_added_tokens_for_the_base(added: tuple[str, ...], tmp_path: Path) -> None:
    folder, _ = published(tmp_path, added=added)
    first = (folder / verification.PROBE).read_bytes()
    cfg = settings(tmp_path, "llama")
    cfg.model.added_tokens = list(added)
    base, model = adapted(cfg)
    assert verification.make_probe(model, base.tokenizer) == first
    found = load_file(folder / verification.PROBE)
    tokens = len(base.tokenizer)
    assert found["ids"][-1] == found["columns"][-1] == tokens - 1
    rows, width = found["base"].shape
    assert (int(found["ids"].numel()), int(found["columns"].numel())) == tuple(found["adapter"].shape)
    assert found["ids"][:rows].max() < tokens - len(added) and found["columns"][:width].max() < tokens - len(added)
    assert (rows == 64) == (not added)


def renamed(folder: Path) -> None:
    tensors = load_file(folder / peft_folder.WEIGHTS)
    first = sorted(tensors)[0]
    save_file({k.replace(".layers.0.", ".layers.7.") if k == first else k: t for k, t in tensors.items()},
              folder / peft_folder.WEIGHTS)  # fmt: skip


def scaled(folder: Path, factor: float = 1.01) -> None:
    tensors = load_file(folder / peft_folder.WEIGHTS)
    save_file({k: t * factor if "lora_B" in k else t for k, t in tensors.items()}, folder / peft_folder.WEIGHTS)


def zeroed(folder: Path) -> None:
    scaled(folder, 0.0)


def another_alpha(folder: Path) -> None:
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(fields | {"lora_alpha": fields["lora_alpha"] * 2}))


def rslora(folder: Path) -> None:
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(fields | {"use_rslora": True}))


def without_logits(folder: Path) -> None:
    save_file({"ids": torch.arange(3)}, folder / verification.PROBE)


def another_shape(folder: Path) -> None:
    found = load_file(folder / verification.PROBE)
    save_file(found | {"adapter": found["adapter"][:, 1:].contiguous()}, folder / verification.PROBE)


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.closes("D01")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, "missing: 1, first .*unexpected: 1, first "),
        (scaled, "the adapter in .* does not match the probe"),
        (zeroed, "changes nothing: all of its 14 matrices B are 0"),
        (another_alpha, "the adapter in .* does not match the probe"),
        (rslora, "the adapter in .* does not match the probe"),
        (without_logits, "is not a probe"),
        (another_shape, "is not a probe"),
    ],
)
def test_changed_adapter_or_probe_is_refused(change: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    folder, loading = published(tmp_path)
    verification.verify(folder, loading)
    change(folder)
    with pytest.raises(MismatchError, match=reason):
        verification.verify(folder, loading)


@pytest.mark.usefixtures("here")
@pytest.mark.closes("D03", "D04")
def test_wrong_base_is_distinguished_from_a_broken_adapter(tmp_path: Path) -> None:
    folder, loading = published(tmp_path)
    other = tiny_folder(tmp_path / "other", "llama", seed=1)
    with pytest.raises(MismatchError, match=rf"the base {other} does not match the probe"):
        verification.verify(folder, dataclasses.replace(loading, path=str(other)))


def test_folder_that_would_run_code_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loading = published(tmp_path)
    monkeypatch.setattr(verification, "_run_worker", lambda request: pytest.fail("the worker was started"))
    fields = json.loads((folder / peft_folder.CONFIG).read_text())
    mapping = {"parent_library": "os", "base_model_class": "system"}
    (folder / peft_folder.CONFIG).write_text(json.dumps(fields | {"auto_mapping": mapping}))
    with pytest.raises(SecurityError, match="auto_mapping asks to import os"):
        verification.verify(folder, loading)


@pytest.mark.usefixtures("here")
def test_keys_and_effect_are_verified_without_a_probe(tmp_path: Path) -> None:
    folder, loading = published(tmp_path)
    (folder / verification.PROBE).unlink()
    found = verification.verify(folder, loading)
    assert found.distance is None and found.effect > 0 and found.keys == 28


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "extra").write_text("x"), "not listed: extra"),
        (lambda f: (f / peft_folder.CONFIG).unlink(), "missing: adapter_config.json"),
        (lambda f: (f / peft_folder.CONFIG).write_text("{}"), "changed: adapter_config.json"),
        (lambda f: (f / checksums.FILE).write_text("abc"), "SHA256SUMS:1 must be a sha256"),
        (lambda f: (f / checksums.FILE).write_text(f"{'0' * 64}  ../x\n"), "SHA256SUMS:1 must be a sha256"),
        (lambda f: (f / checksums.FILE).write_text(f"{'0' * 64}  /x\n"), "SHA256SUMS:1 must be a sha256"),
    ],
)
def test_folder_that_differs_from_its_checksums_is_refused(
    change: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    for name in (peft_folder.CONFIG, "README.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / checksums.FILE).write_text(checksums.render(checksums.compute(tmp_path)))
    assert checksums.check(tmp_path) == checksums.compute(tmp_path)
    change(tmp_path)
    with pytest.raises(MismatchError, match=reason):
        checksums.check(tmp_path)


def test_loading_lines_have_dtypes_and_added_rows(tmp_path: Path) -> None:
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


def test_worker_does_not_import_lora_ft() -> None:
    text = Path(verify_worker.__file__).read_text()
    assert not re.search(r"^\s*(import|from) lora_ft", text, re.MULTILINE)
    assert os.environ.get("HF_HUB_OFFLINE") is None  # set for the worker only


@pytest.mark.parametrize("fails", [False, True])
def test_exact_products_restore_the_forwards(fails: bool) -> None:
    def own(inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    patched, plain = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    patched.forward = own  # type: ignore[method-assign,assignment]
    with contextlib.suppress(ZeroDivisionError), verify_worker.exact_products([patched, plain]):
        assert patched.forward is not own and "forward" in vars(plain)
        if fails:
            raise ZeroDivisionError
    assert patched.forward is own
    assert "forward" not in vars(plain)
