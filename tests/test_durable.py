"""Writes: a file or folder is either complete under its name or absent."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faults.shim import Fault, Shim, unsafe

from lora_ft.data import cache
from lora_ft.errors import ResourceError
from lora_ft.io import durable


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.closes("C09")
def test_written_files_are_readable_and_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    durable.write_bytes(tmp_path / "a", b"one")
    durable.write_bytes(tmp_path / "a", b"two")
    durable.append_line(tmp_path / "lines", "ü")
    durable.append_line(tmp_path / "lines", "x")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "lines").read_text("utf-8") == "ü\nx\n"
    assert {mode(tmp_path / "a"), mode(tmp_path / "lines")} == {0o666 & ~umask}


@pytest.mark.closes("C08")
def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    durable.write_bytes(tmp_path / "a", b"old")

    def chunks():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        durable.write_stream(tmp_path / "a", chunks())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_writes_never_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    durable.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "lines").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        durable.append_line(tmp_path / "lines", "x")


def test_nan_in_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_written_tensors_load_with_safetensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int64), "empty": torch.zeros(0, 4)}
    codes = {torch.float32: "F32", torch.int64: "I64"}
    specs = [
        durable.TensorSpec(n, codes[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    ]
    durable.write_tensors(
        tmp_path / "t.safetensors", specs, (t.numpy().tobytes() for t in tensors.values()), {"format": "pt"}
    )
    loaded = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


def test_tensor_buffer_of_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: has 3 bytes, expected 4"):
        durable.write_tensors(tmp_path / "t", [durable.TensorSpec("a", "F32", (1,), 4)], [b"abc"], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.closes("C09")
def test_staged_folder_appears_complete_and_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    with durable.staged_folder(tmp_path / "out") as staging:
        (staging / "inner").mkdir()
        os.close(os.open(staging / "inner" / "private", os.O_CREAT | os.O_WRONLY, 0o600))
        assert not (tmp_path / "out").exists()
    assert mode(tmp_path / "out" / "inner" / "private") == 0o666 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert os.umask(umask) == umask  # unchanged in the process


def test_link_in_a_staged_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "target").chmod(0o600)
    with pytest.raises(OSError, match="symbolic links"), durable.staged_folder(tmp_path / "out") as staging:
        (staging / "link").symlink_to(tmp_path / "target")
    assert mode(tmp_path / "target") == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_staged_folder_replaces_the_old_one_only_on_success(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with durable.staged_folder(tmp_path / "out") as staging:
            durable.write_text(staging / content, content)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="stop"), durable.staged_folder(tmp_path / "out") as staging:
        durable.write_text(staging / "half", "half")
        raise RuntimeError("stop")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_write_error_names_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "x"
    for write in (
        lambda: durable.write_text(inside, "x"),
        lambda: durable.append_line(inside, "x"),
        lambda: durable.make_folder(inside),
        lambda: durable.staged_folder(inside).__enter__(),
    ):
        with pytest.raises(
            ResourceError, match=r"file(/x)? cannot be written: (Not a directory|File exists)"
        ) as caught:
            write()
        assert isinstance(caught.value, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_a_write_error_and_a_missing_source_file_is_not(tmp_path: Path) -> None:
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")
        yield b""

    with pytest.raises(durable.WriteError, match="a cannot be written: No space left on device"):
        durable.write_stream(tmp_path / "a", full())
    with (
        pytest.raises(durable.WriteError, match="b cannot be written: No space"),
        durable.staged_folder(tmp_path / "b"),
    ):
        next(full())
    with pytest.raises(FileNotFoundError), durable.staged_folder(tmp_path / "c") as staging:
        (staging / "absent").read_bytes()
    assert not list(tmp_path.iterdir())


def test_write_error_takes_its_path_from_the_oserror() -> None:
    with pytest.raises(durable.WriteError, match=r"^/a/b cannot be written: Read-only file system$"), durable.writing():
        raise OSError(errno.EROFS, "Read-only file system", "/a/b")
    with pytest.raises(OSError, match="Read-only") as caught, durable.writing():
        raise OSError(errno.EROFS, "Read-only file system")
    assert not isinstance(caught.value, durable.WriteError)


def test_cache_folder_follows_an_absolute_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, expected in {str(tmp_path): tmp_path, "": "/home/me/.cache", "relative/x": "/home/me/.cache"}.items():
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert durable.cache_folder("rows") == Path(expected) / "lora_ft" / "rows" == cache.folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert durable.cache_folder("models") == Path("/home/me/.cache/lora_ft/models")


def operations(folder: Path) -> dict[str, Callable[[], object]]:
    """Return every operation of `durable` that changes the disk, on the files of `prepared`."""

    def staged() -> None:
        with durable.staged_folder(folder / "folder") as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "library").write_text("written by a library")
            durable.write_text(staging / "ours", "new")

    return {
        "write_text": lambda: durable.write_text(folder / "file", "new"),
        "append_line": lambda: durable.append_line(folder / "lines", "new"),
        "cut": lambda: durable.cut(folder / "lines", 1),
        "settle": lambda: durable.settle(folder / "lines"),
        "remove": lambda: durable.remove(folder / "file"),
        "remove_folder": lambda: durable.remove_folder(folder / "folder"),
        "make_folder": lambda: durable.make_folder(folder / "a" / "b"),
        "staged_folder": staged,
        "write_files": lambda: durable.write_files(folder / "folder", {"ours": b"new", "more": b"2"}),
    }


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepared(folder: Path) -> Path:
    (folder / "folder").mkdir(parents=True)
    for name in ("file", "lines", "folder/old"):
        (folder / name).write_text("old\n")
    return folder


@pytest.mark.closes("C08")
@pytest.mark.parametrize("name", operations(Path()))
def test_disk_error_is_reported_and_leaves_old_or_new_content(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the path, and the free bytes if the disk is full."""
    old, shim = content(prepared(tmp_path / "0")), Shim()
    monkeypatch.setattr(durable, "os", shim)
    operations(tmp_path / "0")[name]()
    new = content(tmp_path / "0")
    for kind, expected in (
        ("full", r"cannot be written: No space left on device \(([\d,]+ bytes needed, )?[\d,]+ free\)"),
        ("broken", "cannot be written: Input/output error"),
    ):
        for at in range(1, shim.count + 1):
            folder = prepared(tmp_path / f"{kind}{at}")
            monkeypatch.setattr(durable, "os", Shim(Fault(at, kind)))
            with pytest.raises(durable.WriteError, match=f"{folder}.* {expected}"):
                operations(folder)[name]()
            monkeypatch.setattr(durable, "os", Shim())
            durable.clear_leftovers(folder)
            result = content(folder)
            if name == "append_line":  # the line may be half written
                assert result["lines"] in ("old\n", "old\nne", "old\nnew\n")
            elif (
                name in ("staged_folder", "write_files") and "folder/ours" not in result and "folder/old" not in result
            ):
                # Between the two renames the folder is absent, never partial.
                assert "folder" not in {path.name for path in folder.iterdir()}
            else:
                assert result in (old, new), at


@pytest.mark.closes("C01")
@pytest.mark.parametrize("name", operations(Path()))
def test_every_operation_fsyncs_in_a_safe_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shim = prepared(tmp_path / "0"), Shim()
    monkeypatch.setattr(durable, "os", shim)
    operations(folder)[name]()
    assert unsafe(shim.trace) == []
    if name == "make_folder":
        assert {change.path for change in shim.trace if change.name == "fsync"} == {str(folder), str(folder / "a")}


@pytest.mark.closes("C09")
def test_write_files_fsyncs_each_file_once_and_modes_follow_the_umask(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = Shim()
    monkeypatch.setattr(durable, "os", shim)
    durable.write_files(tmp_path / "out", {"a": b"1", "b": b""})
    assert [c.name for c in shim.trace] == [
        "mkdir",
        "open",
        "write",
        "fsync",
        "open",
        "fsync",
        "fsync",
        "rename",
        "fsync",
    ]
    assert {p.name: (p.read_bytes(), mode(p)) for p in (tmp_path / "out").iterdir()} == {
        "a": (b"1", 0o666 & ~umask), "b": (b"", 0o666 & ~umask)
    }  # fmt: skip


def test_clear_leftovers_removes_only_temporary_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("state.json.tmp-0123abcd", ".step-00000002.tmp-0123abcd", ".adapter.old-0123abcd")
    theirs = ("notes.tmp", "a.tmp-xyz", ".tmp-0123abcd", "a.old-0123abcd", "a.tmp-0123abcde", ".adapter.tmp-0123ABCD")
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inner").write_text("")
    (tmp_path / "target").mkdir()
    (tmp_path / ".link.tmp-0123abcd").symlink_to(tmp_path / "target")
    assert [*map(durable.final_name, ours)] == ["state.json", "step-00000002", "adapter"]
    assert [*map(durable.final_name, theirs)] == [*theirs]
    monkeypatch.setattr(durable, "os", Shim(Fault(1, "broken")))
    with pytest.raises(durable.WriteError, match=f"{tmp_path}.* cannot be written: Input/output error"):
        durable.clear_leftovers(tmp_path)
    durable.clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, "target"}
    durable.clear_leftovers(tmp_path / "absent")


def test_growing_file_is_measured_and_cut(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert durable.settle(lines) == 0
    durable.cut(lines, 5)
    assert not lines.exists()
    for word in ("one", "two"):
        durable.append_line(lines, word)
    assert durable.settle(lines) == 8
    durable.cut(lines, 4)
    assert lines.read_bytes() == b"one\n"
    durable.remove(lines)
    durable.remove(lines)
    assert not lines.exists()


def descriptors() -> set[str]:
    return {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see open files")
def test_created_and_removed_names_are_fsynced_and_files_are_closed(tmp_path: Path, monkeypatch) -> None:
    """A missing fsync or close has no other visible effect."""
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", recorded)
    before, folder = descriptors(), str(tmp_path)

    def synced_by(step: Callable[[], object]) -> set[str]:
        synced.clear()
        step()
        assert {name for name in descriptors() - before if name.startswith(folder)} == set()
        return set(synced)

    durable.append_line(tmp_path / "lines", "x")
    assert synced_by(lambda: durable.settle(tmp_path / "lines")) == {folder, f"{folder}/lines"}
    assert synced_by(lambda: durable.remove(tmp_path / "lines")) == {folder}
    assert synced_by(lambda: durable.make_folder(tmp_path / "a" / "b")) == {folder, f"{folder}/a"}
    assert synced_by(lambda: durable.remove_folder(tmp_path / "a")) == {folder}
    durable.beat(tmp_path / "beat", "now")
    assert synced_by(lambda: durable.beat(tmp_path / "beat", "then")) == set()
    with durable.staged_folder(tmp_path / "staged") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        contents = {str(staging), f"{staging}/inner", f"{staging}/inner/file"}
        synced.clear()
    assert set(synced) >= contents | {folder}


def test_heartbeat_above_4096_bytes_is_refused(tmp_path: Path) -> None:
    durable.beat(tmp_path / "beat", "x" * 4095)
    assert (tmp_path / "beat").stat().st_size == 4096
    with pytest.raises(ValueError, match="at most 4096 bytes, got 4097"):
        durable.beat(tmp_path / "beat", "x" * 4096)


def test_free_space_is_in_bytes(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    assert 0.5 < durable.free_bytes(tmp_path / "not" / "there") / (disk.f_bavail * disk.f_frsize) < 2
