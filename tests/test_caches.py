"""A cache that cannot be written is a convenience less: a temporary folder takes its place."""

import subprocess
import sys
from pathlib import Path

import pytest
from finished import call, finished_run

from lora_ft.data import cache
from lora_ft.io import caches, durable

# Root may write everywhere, but not below a file, nor in /proc.
UNWRITABLE = ("file/cache", "/proc/cache")


def unwritable(where: str, tmp_path: Path) -> str:
    (tmp_path / "file").touch()
    return where if where.startswith("/") else str(tmp_path / where)


@pytest.mark.parametrize("where", UNWRITABLE)
def test_temporary_folder_takes_the_place_of_a_cache(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "good"))
    assert caches.writable("models") == tmp_path / "good" / "lora_ft" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", unwritable(where, tmp_path))
    found = caches.writable("models")
    assert found.is_dir() and found.name.startswith("lora_ft-models-")
    assert caches.writable("models") == found
    [message] = [record.getMessage() for record in caplog.records if "no cache" in record.getMessage()]
    assert str(found) in message
    durable.remove_folder(found)


def test_temporary_folder_is_removed_when_the_process_ends(tmp_path: Path) -> None:
    code = (
        "from lora_ft.io import caches; print(caches.writable('models')); p = caches.writable('packages', "
        "cleans_up=True); (p / 'kept').touch(); print(p)"
    )
    environment = {"XDG_CACHE_HOME": unwritable(UNWRITABLE[0], tmp_path), "TMPDIR": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": ":".join(sys.path)}, capture_output=True,
        check=True, text=True,
    ).stdout.split()  # fmt: skip
    assert [Path(path).exists() for path in shown] == [False, True]


def test_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.folder() == Path("/dev/null/lora_ft/rows")
    durable.remove_folder(caches.writable("models"))


@pytest.mark.nightly
def test_publish_works_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, "llama")
    monkeypatch.setenv("XDG_CACHE_HOME", unwritable(UNWRITABLE[0], tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = ("publish", f"run={run}", f"to=dir:{tmp_path / 'package'}", "model.hub_id=org/tiny")
    assert call(*words, "dry_run=true") == 0
    assert not (tmp_path / "package").exists()
    assert call(*words) == 0
    assert (tmp_path / "package" / "adapter_config.json").is_file()
