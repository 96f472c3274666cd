"""Destinations: `to=` is parsed, a package is sent as a whole or not at all, and other files are not changed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from finished import contents, package

from lora_ft.errors import ConfigError, MismatchError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import destinations

RECORD = json.dumps({"base": {"id": "org/base"}}).encode()
OLD = {"README.md": b"old", "adapter_model.safetensors": b"old" * 99, "lora_ft.json": RECORD, "adapter.gguf": b"gone"}
NEW = {"README.md": b"new", "adapter_model.safetensors": b"new" * 99, "lora_ft.json": RECORD,
       "mlx/adapters.safetensors": b"mlx" * 9}  # fmt: skip


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return package(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return package(tmp_path / "new", NEW)


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("", "to must be dir:PATH"),
        ("me/adapter", "to must be dir:PATH, hf:OWNER/NAME or a URL"),
        ("oci:ghcr.io/me/adapter:v1", "to must be dir:PATH, hf:OWNER/NAME or a URL"),
        ("dir:", "names no folder"),
        ("file:///tmp/x", "write to=dir:PATH"),
        ("hf:adapter", "must be hf:OWNER/NAME"),
        ("s3://", "names no prefix"),
        ("nowhere://bucket/x", "has no store for nowhere://"),
        ("simplecache::s3://bucket/x", "to must be dir:PATH"),
    ],
)
def test_invalid_destination_is_refused_with_the_valid_forms(to: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        destinations.parse(to)


@pytest.mark.closes("G01")
def test_login_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(SecurityError, match="holds a login") as refused:
        destinations.parse("sftp://me:very-secret@host/x")
    assert "very-secret" not in str(refused.value)


def test_missing_store_library_is_named() -> None:
    missing = next(s for s in ("s3", "gs", "abfs") if not importable(s))
    with pytest.raises(ConfigError, match=r"(?i)install"):
        destinations.parse(f"{missing}://bucket/prefix").check(False)


def importable(scheme: str) -> bool:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("to", ["dir:x", "memory://public/x"])
def test_public_is_refused_for_other_destinations_than_the_hub(to: str) -> None:
    with pytest.raises(ConfigError, match="public=true applies to to=hf: only"):
        destinations.parse(to).check(True)


def test_package_is_sent_to_a_folder_and_fetched(new: Path, tmp_path: Path) -> None:
    destination = destinations.parse(f"dir:{tmp_path}/shelf/adapter")
    assert destination.check(False) == f"{tmp_path}/shelf/adapter (new, readable by every user)"
    assert not (tmp_path / "shelf").exists(), "check writes nothing"
    assert destination.send(new, "message", False) == f"{tmp_path}/shelf/adapter"
    destination.fetch(tmp_path / "back", None)
    assert contents(tmp_path / "shelf" / "adapter") == contents(tmp_path / "back") == contents(new)


@pytest.mark.closes("G03")
def test_package_in_a_folder_is_replaced_as_a_whole_or_not_at_all(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    destination = destinations.parse(f"dir:{target}")
    destination.send(old, "message", False)
    write, calls = durable.write_stream, []

    def full(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise durable.WriteError(28, "No space left on device", str(path))
        write(path, *rest)

    monkeypatch.setattr(durable, "write_stream", full)
    with pytest.raises(ResourceError, match="No space left"):
        destination.send(new, "message", False)
    assert contents(target) == contents(old)
    monkeypatch.undo()
    assert "(replaces the package there" in destination.check(False)
    destination.send(new, "message", False)
    assert contents(target) == contents(new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "target"]


def test_published_files_are_readable_by_all_whatever_the_umask(new: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        destinations.parse(f"dir:{tmp_path}/target").send(new, "message", False)
        assert os.umask(0o077) == 0o077, "the umask is restored"
    finally:
        os.umask(before)
    found = {path.stat().st_mode & 0o777 for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert found == {0o644} and (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_folder_with_other_files_is_not_changed(new: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    destinations.parse(f"dir:{mine}").check(False)  # an empty one may be filled
    (mine / "thesis.txt").write_text("years of work")
    shared = package(tmp_path / "shared", OLD)
    (shared / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"that would be replaced, notes\.txt: move them away"):
        destinations.parse(f"dir:{shared}").send(new, "message", False)
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(mine)
    file.write_text("x")
    for path, reason in ((mine, "are not a package"), (link, "is a link or a file"), (file, "is a link or a file")):
        for act in (lambda p: p.check(False), lambda p: p.send(new, "message", False)):
            with pytest.raises(ConfigError, match=reason):
                act(destinations.parse(f"dir:{path}"))
    with pytest.raises(ResourceError, match="you cannot write to"):
        destinations.parse(f"dir:{file}/below").check(False)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_damaged_package_is_not_fetched(new: Path, tmp_path: Path) -> None:
    destination = destinations.parse(f"dir:{tmp_path}/target")
    destination.send(new, "message", False)
    (tmp_path / "target" / "README.md").write_text("changed")
    with pytest.raises(MismatchError, match=r"changed: README\.md"):
        destination.fetch(tmp_path / "back", None)


@pytest.fixture
def store() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def stored(store: Any) -> dict[str, bytes]:
    return {path.removeprefix("/shelf/x/"): store.cat_file(path) for path in store.find("/shelf/x")}


def test_package_is_sent_to_a_store_and_fetched(store: Any, new: Path, old: Path, tmp_path: Path) -> None:
    destination = destinations.parse("memory://shelf/x")
    assert destination.check(False) == "memory://shelf/x (new; the store decides who can read it)"
    assert destination.send(old, "message", False) == "memory://shelf/x"
    assert stored(store) == contents(old)
    assert "(replaces the package there" in destination.check(False)
    store.pipe_file("/shelf/x/notes.txt", b"mine")
    destination.send(new, "message", False)
    assert stored(store) == contents(new) | {"notes.txt": b"mine"}
    destination.fetch(tmp_path / "back", None)
    assert contents(tmp_path / "back") == contents(new)


@pytest.mark.closes("G03")
@pytest.mark.parametrize("replaces", [True, False], ids=["replaces", "first"])
def test_interrupted_upload_is_not_fetched_and_can_be_repeated(
    replaces: bool, store: Any, new: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = destinations.parse("memory://shelf/x")
    names = ("put_file", "rm_file")
    real = {name: getattr(type(store), name) for name in names}
    left = 0

    def breaking(name: str) -> Any:
        def act(self: Any, *given: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError("connection lost")
            return real[name](self, *given, **more)

        return act

    for name in names:
        monkeypatch.setattr(type(store), name, breaking(name))
    for request in range(1, 99):
        store.store.clear()
        if replaces:
            destination.send(old, "message", False)
        left = request
        with contextlib.suppress(ResourceError):
            destination.send(new, "message", False)
        if left > 0:
            break
        back = tmp_path / f"back{request}"
        try:
            destination.fetch(back, None)
            assert contents(back) in (contents(old), contents(new))
        except (ResourceError, MismatchError):
            assert not back.exists()
        destination.send(new, "message", False)
        assert stored(store) == contents(new), "a second attempt completes the upload"
    assert request > len(NEW)


def test_prefix_with_other_files_is_not_changed(store: Any, new: Path) -> None:
    store.pipe_file("/shelf/x/thesis.txt", b"years of work")
    for act in (lambda p: p.check(False), lambda p: p.send(new, "message", False)):
        with pytest.raises(ConfigError, match="are not a package of lora-ft"):
            act(destinations.parse("memory://shelf/x"))
    assert stored(store) == {"thesis.txt": b"years of work"}
