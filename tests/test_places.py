"""Places: what a text names, a package under its name whole or not at all, and nothing of others is replaced."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lora_ft.errors import ConfigError, MismatchError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import places, sums
from lora_ft.publishing.place_oci import Registry

RECORD = json.dumps({"base": {"id": "org/base"}}).encode()
OLD = {"README.md": b"old", "adapter_model.safetensors": b"old" * 99, "lora_ft.json": RECORD, "adapter.gguf": b"gone"}
NEW = {"README.md": b"new", "adapter_model.safetensors": b"new" * 99, "lora_ft.json": RECORD,
       "mlx/adapters.safetensors": b"mlx" * 9}  # fmt: skip


def package(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / sums.SUMS).write_text(sums.render(sums.measured(folder)))
    return folder


def of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sums.names(folder)}


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
        ("me/adapter", "to must be dir:PATH, hf:OWNER/NAME, oci:HOST/NAME:TAG or a URL"),
        ("dir:", "lacks the folder"),
        ("file:///tmp/x", "is to=dir:PATH"),
        ("hf:adapter", "must be OWNER/NAME"),
        ("oci:me/adapter:v1", "must be oci:HOST/NAME:TAG"),
        ("oci:ghcr.io/me/adapter", "must be oci:HOST/NAME:TAG"),
        ("oci:ghcr.io/Me/adapter:v1", "must be oci:HOST/NAME:TAG"),
        ("s3://", "lacks a prefix"),
        ("nowhere://bucket/x", "knows no store of the kind nowhere://"),
        ("simplecache::s3://bucket/x", "to must be dir:PATH"),
    ],
)
def test_a_text_that_names_no_place_is_refused_with_what_would(to: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        places.parse(to)


@pytest.mark.closes("G01")
def test_a_login_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SecurityError, match="holds a login") as refused:
        places.parse("sftp://me:very-secret@host/x")
    assert "very-secret" not in str(refused.value)


def test_a_store_whose_library_is_missing_says_what_to_install() -> None:
    missing = next(s for s in ("s3", "gs", "abfs") if not importable(s))
    with pytest.raises(ConfigError, match=r"(?i)install"):
        places.parse(f"{missing}://bucket/prefix").check(False)


def importable(scheme: str) -> bool:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("to", ["dir:x", "oci:localhost:1/me/x:v1", "memory://public/x"])
def test_public_is_for_the_hub_alone(to: str) -> None:
    with pytest.raises(ConfigError, match="public=true is for hf: places"):
        places.parse(to).check(True)


def test_a_folder_gets_a_package_and_gives_it_back(new: Path, tmp_path: Path) -> None:
    place = places.parse(f"dir:{tmp_path}/shelf/adapter")
    assert place.check(False) == f"{tmp_path}/shelf/adapter (new, readable for all who reach it)"
    assert not (tmp_path / "shelf").exists(), "check writes nothing"
    assert place.send(new, "words", False) == f"{tmp_path}/shelf/adapter"
    place.fetch(tmp_path / "back", None)
    assert of(tmp_path / "shelf" / "adapter") == of(tmp_path / "back") == of(new)


@pytest.mark.closes("G03")
def test_a_package_in_a_folder_is_replaced_as_a_whole_or_not_at_all(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    place = places.parse(f"dir:{target}")
    place.send(old, "words", False)
    write, calls = durable.write_stream, []

    def full(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise durable.WriteError(28, "No space left on device", str(path))
        write(path, *rest)

    monkeypatch.setattr(durable, "write_stream", full)
    with pytest.raises(ResourceError, match="No space left"):
        place.send(new, "words", False)
    assert of(target) == of(old)
    monkeypatch.undo()
    assert "(replaces the package there" in place.check(False)
    place.send(new, "words", False)
    assert of(target) == of(new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "target"]


def test_all_may_read_what_was_published_whatever_the_umask(new: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        places.parse(f"dir:{tmp_path}/target").send(new, "words", False)
        assert os.umask(0o077) == 0o077, "the umask is as it was"
    finally:
        os.umask(before)
    found = {path.stat().st_mode & 0o777 for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert found == {0o644} and (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_is_no_package_is_left_alone(new: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    places.parse(f"dir:{mine}").check(False)  # an empty one may be filled
    (mine / "thesis.txt").write_text("years of work")
    shared = package(tmp_path / "shared", OLD)
    (shared / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"replaced as a whole, and beside it notes\.txt: take this out"):
        places.parse(f"dir:{shared}").send(new, "words", False)
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(mine)
    file.write_text("x")
    for path, reason in ((mine, "is no package"), (link, "is a link or a file"), (file, "is a link or a file")):
        for act in (lambda p: p.check(False), lambda p: p.send(new, "words", False)):
            with pytest.raises(ConfigError, match=reason):
                act(places.parse(f"dir:{path}"))
    with pytest.raises(ResourceError, match="is no folder that you may write to"):
        places.parse(f"dir:{file}/below").check(False)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_damaged_package_is_not_fetched(new: Path, tmp_path: Path) -> None:
    place = places.parse(f"dir:{tmp_path}/target")
    place.send(new, "words", False)
    (tmp_path / "target" / "README.md").write_text("changed")
    with pytest.raises(MismatchError, match=r"of other bytes README\.md"):
        place.fetch(tmp_path / "back", None)


@pytest.fixture
def store() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def stored(store: Any) -> dict[str, bytes]:
    return {path.removeprefix("/shelf/x/"): store.cat_file(path) for path in store.find("/shelf/x")}


def test_a_store_gets_a_package_and_gives_it_back(store: Any, new: Path, old: Path, tmp_path: Path) -> None:
    place = places.parse("memory://shelf/x")
    assert place.check(False) == "memory://shelf/x (new; who reads it, the store decides)"
    assert place.send(old, "words", False) == "memory://shelf/x"
    assert stored(store) == of(old)
    assert "(replaces the package there" in place.check(False)
    store.pipe_file("/shelf/x/notes.txt", b"mine")
    place.send(new, "words", False)
    assert stored(store) == of(new) | {"notes.txt": b"mine"}
    place.fetch(tmp_path / "back", None)
    assert of(tmp_path / "back") == of(new)


@pytest.mark.closes("G03")
def test_a_store_that_breaks_at_any_write_never_shows_parts_of_two(
    store: Any, new: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    place = places.parse("memory://shelf/x")
    names = ("pipe_file", "put_file", "rm_file")
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
        place.send(old, "words", False)
        left = request
        try:
            place.send(new, "words", False)
        except ResourceError as error:
            assert "publish again" in str(error)
        if left > 0:
            break
        left = request  # and at the same write of the next try
        with contextlib.suppress(ResourceError):
            place.send(new, "words", False)
        left = 0
        back = tmp_path / f"back{request}"
        try:
            place.fetch(back, None)
            assert of(back) in (of(old), of(new))
        except ResourceError as error:
            assert "no package, or one that was not sent to its end" in str(error)
        assert "(replaces the package there" in place.check(False)
        place.send(new, "words", False)
        assert stored(store) == of(new), "a rerun finishes it, and leaves nothing behind"
    assert request > 6
    record_property("figure", f"a store that breaks at each of {request - 1} writes: old, none or complete")


def test_a_prefix_with_the_files_of_others_is_left_alone(store: Any, new: Path) -> None:
    store.pipe_file("/shelf/x/thesis.txt", b"years of work")
    for act in (lambda p: p.check(False), lambda p: p.send(new, "words", False)):
        with pytest.raises(ConfigError, match="is no package that lora-ft published"):
            act(places.parse("memory://shelf/x"))
    assert stored(store) == {"thesis.txt": b"years of work"}


def test_a_manifest_of_a_package_is_the_same_twice_and_names_its_base(new: Path, tmp_path: Path) -> None:
    from lora_ft.publishing import place_oci

    manifest, listed = place_oci._manifest_of(new, "words")
    again, _ = place_oci._manifest_of(package(tmp_path / "again", NEW), "words")
    assert manifest == again
    assert manifest["annotations"]["org.opencontainers.image.base.name"] == "org/base"
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert titles == sorted(sums.names(new)) == [path.relative_to(new).as_posix() for path in listed]


@pytest.mark.parametrize(
    "layer",
    [
        {"digest": "sha256:" + "0" * 64, "annotations": {"org.opencontainers.image.title": "../x"}},
        {"digest": "sha256:" + "0" * 64, "annotations": {"org.opencontainers.image.title": "/etc/x"}},
        {"digest": "../x", "annotations": {"org.opencontainers.image.title": "x"}},
        {"digest": "sha256:" + "0" * 64},
        "x",
    ],
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(layer: Any) -> None:
    from lora_ft.publishing import place_oci

    with pytest.raises(MismatchError):
        list(place_oci._layers({"layers": [layer]}, "oci:x"))


# The line of htpasswd for me:pass word.
_LOGIN = "me:$2b$04$1QclFP1BjxKSv0v3j0OqreLGGwbYvtIHzbVIBHCuhwC0FKuihWWOm"


@contextlib.contextmanager
def serving(folder: Path, more: str = "") -> Iterator[str]:
    """Debian's docker-registry on a free port of this machine; its host."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs Debian's package: apt-get install docker-registry")
    pytest.importorskip("oras", reason="needs the extra oci: pip install 'lora_ft[oci]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{more}"
    )
    with (folder / "registry.log").open("w") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path) as host:
        yield host


@pytest.mark.interop
def test_a_registry_gets_a_package_and_gives_it_back_by_its_digest(
    registry: str, new: Path, old: Path, tmp_path: Path
) -> None:
    place = places.parse(f"oci:{registry}/me/adapter:v1")
    assert isinstance(place, Registry)
    assert "(new; who sees it" in place.check(False)
    first = place.send(old, "words", False)
    assert "(replaces the package there" in place.check(False)
    second = place.send(new, "words", False)
    assert second == place.send(new, "words", False) != first
    for address, sent in ((first, old), (second, new)):
        back = tmp_path / f"back of {sent.name}"
        place.fetch(back, address.partition("@")[2])
        assert of(back) == of(sent)
    place.fetch(tmp_path / "newest", None)
    assert of(tmp_path / "newest") == of(new)
    with pytest.raises(ResourceError, match="is not in the registry"):
        places.parse(f"oci:{registry}/me/adapter:v2").fetch(tmp_path / "none", None)


@pytest.mark.interop
def test_another_artifact_under_the_tag_is_left_alone(registry: str, new: Path, tmp_path: Path) -> None:
    import oras.client

    (tmp_path / "theirs.txt").write_text("x")
    oras.client.OrasClient(insecure=True).push(
        f"{registry}/me/image:v1", files=[str(tmp_path / "theirs.txt")], disable_path_validation=True
    )
    with pytest.raises(ConfigError, match="holds something that lora-ft did not publish"):
        places.parse(f"oci:{registry}/me/image:v1").send(new, "words", False)


@pytest.mark.interop
def test_a_registry_that_asks_for_a_login_is_given_dockers_or_the_environments(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "htpasswd").write_text(_LOGIN + "\n")
    with serving(tmp_path, f"auth: {{htpasswd: {{realm: here, path: {tmp_path / 'htpasswd'}}}}}\n") as host:
        place = places.parse(f"oci:{host}/me/adapter:v1")
        for password in (None, "wrong"):
            if password:
                monkeypatch.setenv("ORAS_USER", "me")
                monkeypatch.setenv("ORAS_PASS", password)
            with pytest.raises(ResourceError, match=f"docker login {host}"):
                place.check(False)
        monkeypatch.setenv("ORAS_PASS", "pass word")
        assert place.send(new, "words", False)
        monkeypatch.delenv("ORAS_PASS")
        (tmp_path / ".docker").mkdir()
        login = base64.b64encode(b"me:pass word").decode()
        (tmp_path / ".docker" / "config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
        assert "(replaces the package there" in place.check(False)


def test_a_registry_that_is_not_there_is_told() -> None:
    pytest.importorskip("oras", reason="needs the extra oci: pip install 'lora_ft[oci]'")
    with pytest.raises(ResourceError, match="cannot be reached"):
        places.parse("oci:127.0.0.1:9/me/adapter:v1").check(False)
