"""A package: its files, its hashes, PEFT loads it, and it holds no secrets."""

import json
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from finished import adapted, call, saved_run, settings
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_ft.errors import SecurityError
from lora_ft.publishing import checksums, secret_scan, verification, verify_worker

ID = "model.hub_id=org/tiny"

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of transformers, in PEFT


@pytest.mark.closes("D09")
def test_package_loaded_with_peft_matches_the_runs_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verification, "_run_worker", verify_worker.verify)  # in this process
    cfg = settings(tmp_path, "llama", use_rslora=True)
    run, out = saved_run(tmp_path / "run", cfg), tmp_path / "out"
    own = {"labels": ["no", "yes"], "calibration": {"temperature": 1.5, "rows": 9, "data_sha256": "d"}}
    record = run / "adapter" / "lora_ft.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | own))
    assert call("publish", f"run={run}", f"to=dir:{out}", ID, "license=mit", "formats=[gguf,mlx]") == 0
    assert json.loads((out / "lora_ft.json").read_text()).items() >= own.items()
    assert "the files fetched back are identical" in capsys.readouterr().out
    assert checksums.file_names(out) == {
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "lora_ft.json", "probe.safetensors", "tokenizer.json", "tokenizer_config.json", "adapter.gguf",
        "mlx/adapters.safetensors", "mlx/adapter_config.json",
    }  # fmt: skip
    _, model = adapted(cfg)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32), out)
    with torch.no_grad():
        expected, found = (m.eval()(torch.arange(0, 500, 9)[None]).logits[0] for m in (model, alone))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not list((tmp_path / "cache" / "lora_ft" / "packages").iterdir()), "the package in the cache is gone"


def planted(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / "package" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return tmp_path / "package"


TOKEN = "hf_" + "aB3" * 10


@pytest.mark.closes("G01", "G04")
@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (".env", b"x", "not a file that a published adapter may have"),
        ("training_args.bin", b"x", "not a file that a published adapter may have"),
        ("checkpoints/README.md", b"x", "not a file that a published adapter may have"),
        ("mlx/notes.txt", b"x", "not a file that a published adapter may have"),
        ("adapter_config.json", f'{{"note": "{TOKEN}"}}'.encode(), "Hugging Face token"),
        ("adapter_model.safetensors", safetensors.torch.save({}, {"note": TOKEN}), "Hugging Face token"),
        ("README.md", b"https://me:secret99@host/rows", "login"),
        ("lora_ft.json", b'{"path": "/home/me/plans"}', "names a folder or file of this machine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_private_data_is_refused_with_file_and_type(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(SecurityError, match=reason) as caught:
        secret_scan.check(planted(tmp_path, name, data), {"/home/me/plans"})
    assert name in str(caught.value)
    assert TOKEN not in str(caught.value) and "secret99" not in str(caught.value)


def test_secret_of_the_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "Zx81-spectrum-48k")
    with pytest.raises(SecurityError, match="MY_SERVICE_TOKEN"):
        secret_scan.check(planted(tmp_path, "chat_template.jinja", b"{# Zx81-spectrum-48k #}"), set())


def test_secret_in_the_metadata_of_a_gguf_file_is_found(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_string("general.description", f"made with {TOKEN}")
    writer.add_array("general.tags", ["lora", "fine"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "adapter.gguf").read_bytes()
    with pytest.raises(SecurityError, match=r"adapter\.gguf holds what looks like a secret"):
        secret_scan.check(planted(tmp_path, "adapter.gguf", data), set())


def test_link_out_of_the_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("private")
    folder = planted(tmp_path, "README.md", b"fine")
    (folder / "tokenizer.json").symlink_to(tmp_path / "key")
    with pytest.raises(SecurityError, match="outside of its folder"):
        secret_scan.check(folder, set())


def test_package_without_private_data_passes(tmp_path: Path) -> None:
    secret_scan.check(
        planted(tmp_path, "README.md", b"# An adapter, of /tmp and /home folders"), secret_scan.local_paths("/tmp")
    )


def test_local_paths_with_one_part_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.chdir("/")
    assert secret_scan.local_paths("/", "/tmp", "relative/path", "org/name", None, "/home/me") == {"/home/me"}
