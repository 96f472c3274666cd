"""Files and folders are whole under their names, or not there."""

import ast
import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lora_ft
from lora_ft import durable
from lora_ft.data import cache
from lora_ft.errors import ResourceError

PACKAGE = Path(lora_ft.__file__).parent


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_is_read_and_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    durable.write_bytes(tmp_path / "a", b"one")
    durable.write_bytes(tmp_path / "a", b"two")
    durable.append_line(tmp_path / "lines", "ü")
    durable.append_line(tmp_path / "lines", "x")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "lines").read_text("utf-8") == "ü\nx\n"
    assert {mode(tmp_path / "a"), mode(tmp_path / "lines")} == {0o666 & ~umask}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    durable.write_bytes(tmp_path / "a", b"old")

    def chunks():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        durable.write_stream(tmp_path / "a", chunks())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_link_under_the_name_is_replaced_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    durable.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()
    (tmp_path / "lines").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        durable.append_line(tmp_path / "lines", "x")


def test_json_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int64), "empty": torch.zeros(0, 4)}
    codes = {torch.float32: "F32", torch.int64: "I64"}
    specs = [
        durable.TensorSpec(n, codes[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()
    ]
    durable.write_tensors(
        tmp_path / "t.safetensors", specs, (t.numpy().tobytes() for t in tensors.values()), {"format": "pt"}
    )
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_a_buffer_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: 3 bytes where 4 were declared"):
        durable.write_tensors(tmp_path / "t", [durable.TensorSpec("a", "F32", (1,), 4)], [b"abc"], {})
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_appears_whole_with_modes_by_the_umask(tmp_path: Path, umask: int) -> None:
    with durable.staged_folder(tmp_path / "out") as staging:
        (staging / "inner").mkdir()
        os.close(os.open(staging / "inner" / "private", os.O_CREAT | os.O_WRONLY, 0o600))
        assert not (tmp_path / "out").exists()
    assert mode(tmp_path / "out" / "inner" / "private") == 0o666 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_staged_folder_replaces_the_old_one_only_at_the_end(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with durable.staged_folder(tmp_path / "out") as staging:
            durable.write_text(staging / content, content)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    with pytest.raises(RuntimeError, match="stop"), durable.staged_folder(tmp_path / "out") as staging:
        durable.write_text(staging / "half", "half")
        raise RuntimeError("stop")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def writers(tree: ast.AST) -> list[str]:
    """Calls that open a file for writing or write one by another way, as source text."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        modes = [
            a.value
            for a in [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
            if isinstance(a, ast.Constant)
        ]
        if (name in ("open", "io.open") or name.endswith(".open")) and any(c in str(m) for m in modes for c in "wax+"):
            found.append(ast.unparse(node))
        if name.rpartition(".")[2] in (
            "write_text",
            "write_bytes",
            "save_file",
            "tofile",
            "mkdir",
            "makedirs",
            "symlink_to",
        ) and not name.startswith("durable."):
            found.append(ast.unparse(node))
    return found


def test_nothing_else_in_the_package_writes_files() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 10
    found = {p.relative_to(PACKAGE).as_posix(): writers(ast.parse(p.read_text("utf-8"))) for p in sources}
    assert found.pop("durable.py")
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_a_place_that_cannot_be_written_is_named_with_the_reason_and_is_an_oserror_too(tmp_path: Path) -> None:
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


def test_a_full_disk_is_named_and_what_a_writer_does_not_find_is_not_taken_for_one(tmp_path: Path) -> None:
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


def test_the_cache_is_where_xdg_says_if_that_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, expected in {str(tmp_path): tmp_path, "": "/home/me/.cache", "relative/x": "/home/me/.cache"}.items():
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert durable.cache_folder("rows") == Path(expected) / "lora_ft" / "rows" == cache.folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert durable.cache_folder("models") == Path("/home/me/.cache/lora_ft/models")
