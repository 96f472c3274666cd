"""Terminals that cannot hold a character, that are closed, or that hang up: no command fails because of them."""

import hashlib
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft import runs
from lora_ft.adapters import peft_folder
from lora_ft.errors import Interrupted, ResourceError
from lora_ft.io import streams
from lora_ft.training import checkpoint
from lora_ft.training.signals import STOPPING, Stop, on_signals, replaceable, stops_at_once

fcntl = pytest.importorskip("fcntl")

TEXT = "größe 你好 👋"
# Commands that end before torch is imported.
CHEAP = {
    "help": ["--help"],
    "page": ["train", "--help"],
    "version": ["--version"],
    "completion": ["-sc", "query=bash"],
    "unknown": [TEXT],
    "cfg": ["train", "--cfg", "job", f"data.system={TEXT}"],
    "typo": ["train", f"data.system={TEXT}", "adapter.rr=1"],
}
CODES = {"unknown": 2, "typo": 2}
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def named(*always: str) -> list[Any]:
    return [name if name in always else pytest.param(name, marks=pytest.mark.nightly) for name in CHEAP]


def shell(words: list[str], redirections: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run lora-ft in a shell, which alone can close a stream of a process."""
    command = ["sh", "-c", f'exec "$0" -m lora_ft "$@" {redirections}', sys.executable, *words]
    extra = {"COMP_LINE": "lora-ft train adapter.", "COMP_POINT": "22"}
    return subprocess.run(command, capture_output=True, env=os.environ | extra | environment, check=False)


def check(found: subprocess.CompletedProcess[bytes], code: int) -> None:
    assert found.returncode == code, found.stderr.decode(errors="replace")
    assert b"Traceback" not in found.stderr and b"Exception ignored" not in found.stderr


@pytest.mark.parametrize("name", named("unknown", "cfg"))
@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "latin-1"}, C_LOCALE], ids=["ascii", "latin", "C"])
def test_encoding_without_a_character(name: str, environment: dict[str, str]) -> None:
    found = shell(CHEAP[name], "", **environment)
    check(found, CODES.get(name, 0))
    if name == "cfg" and environment == ASCII:
        assert b"system: gr??e ?? ?" in found.stdout
    if name == "unknown" and environment in (ASCII, C_LOCALE):
        assert rb"gr\xf6\xdfe \u4f60\u597d \U0001f44b is not a command" in found.stderr


@pytest.mark.parametrize("name", named("version", "unknown"))
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(name: str, closed: str) -> None:
    check(shell(CHEAP[name], closed), CODES.get(name, 0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_behind_stdout_is_an_error() -> None:
    found = shell(["--version"], ">/dev/full")
    check(found, 7)
    assert found.stderr == b"lora-ft: standard output cannot be written: No space left on device\n"


def test_streams_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with streams.usable():
        sys.stdout.write(TEXT)
        sys.stdout.flush()
    assert sys.stdout is stream
    assert (stream.errors, stream.buffer.getvalue()) == ("strict", b"gr??e ?? ?")  # type: ignore[attr-defined]


class Broken(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number: int, descriptor: int) -> None:
        super().__init__()
        self._number, self._descriptor = number, descriptor

    def write(self, text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))

    def fileno(self) -> int:
        return self._descriptor


@pytest.mark.parametrize(
    ("number", "is_result", "error"),
    [(5, True, None), (5, False, None), (28, False, None), (32, False, None), (28, True, ResourceError),
     (32, True, BrokenPipeError), (13, False, PermissionError)],
)  # fmt: skip
def test_writes_that_reach_nobody(number: int, is_result: bool, error: Any, tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as file:
        stream = streams.lasting(Broken(number, file.fileno()), is_result=is_result)
        if error:
            with pytest.raises(error):
                stream.write("text")
        else:
            assert stream.write("text") == 4
            assert os.path.samestat(os.fstat(file.fileno()), Path(os.devnull).stat())


# Signals


def test_notices_are_no_second_signal() -> None:
    stop, (interrupt, terminate, *notices) = Stop(), STOPPING
    with stop.between_steps():
        for signum in (notices[0], notices[0], notices[-1], terminate, notices[0]):
            stop.ask(signum)
        assert stop.signum == notices[0]
        with pytest.raises(Interrupted) as ended:
            stop.ask(interrupt)
    assert ended.value.exit_code == 130
    assert [stops_at_once(received) for received in ([interrupt], [notices[0]] * 3, [terminate] * 2)] == [0, 0, 1]


def test_every_stopping_signal_is_handled_and_an_ignored_one_stays_so() -> None:
    names = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"}
    assert {signum.name for signum in STOPPING} == names
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    with on_signals() as stop, stop.between_steps():
        signal.raise_signal(signal.SIGUSR2)
        assert stop.signum == signal.SIGUSR2
    assert {signum: signal.getsignal(signum) for signum in STOPPING} == before
    ignoring = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert {signum.name for signum in replaceable()} == names - {"SIGHUP"}
    finally:
        signal.signal(signal.SIGHUP, ignoring)


class Terminal:
    """A process in a terminal of its own, which can be closed."""

    def __init__(self, command: list[str], before: Callable[[], object] = lambda: None) -> None:
        self._master, slave = pty.openpty()

        def control() -> None:
            before()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=control
        )
        os.close(slave)
        self._is_open = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while self._is_open:
            try:
                os.read(self._master, 4096)
            except OSError:
                return

    def hang_up(self) -> None:
        self._is_open = False
        os.close(self._master)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    yield [
        "model=local", f"model.path={tiny_folder(folder, 'llama')}", f"data.path={rows_file(folder)}", "adapter.r=2",
        "device=cpu", "adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]", "optim.lr=0.01",
        "data.eval_fraction=0.4", "train.samples=0", "train.tokens_per_step=160", "train.tokens_per_microbatch=80",
        "train.max_steps=40",
    ]  # fmt: skip


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def in_terminal(run: Path, overrides: list[str], before: Callable[[], object] = lambda: None) -> int:
    """Train in a terminal that is closed once some steps are done; return the exit code."""
    command = [sys.executable, "-m", "lora_ft.train", *overrides, f"hydra.run.dir={run}"]
    terminal = Terminal(command, before)
    while terminal.process.poll() is None and len(steps(run)) < 3:
        time.sleep(0.005)
    terminal.hang_up()
    return terminal.process.wait(timeout=120)


def steps(run: Path) -> list[dict[str, Any]]:
    return runs.read_metrics(run) if (run / runs.METRICS).exists() else []


def test_run_whose_terminal_was_closed_resumes_to_the_same_bytes(overrides: list[str], tmp_path: Path) -> None:
    assert call("train", *overrides, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    run = tmp_path / "run"
    assert in_terminal(run, overrides) == 128 + signal.SIGHUP
    done = steps(run)[-1]["step"]
    assert 0 < done < 40
    assert checkpoint.newest(run) == run / "checkpoints" / f"step-{done:08d}"
    assert f"stopped by SIGHUP after step {done}" not in (run / runs.LOG).read_text()
    assert call("train", f"resume={run}") == 0
    assert weights(run) == weights(tmp_path / "whole")
    assert len(steps(run)) == 41


@pytest.mark.nightly
def test_run_that_ignores_its_closed_terminal_ends_as_always(overrides: list[str], tmp_path: Path) -> None:
    """With nohup or disown, the terminal goes and the signal does not come: writes to it fail until the end."""
    assert call("train", *overrides, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    assert in_terminal(tmp_path / "run", overrides, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_training_with_closed_streams(closed: str, overrides: list[str], tmp_path: Path) -> None:
    words = ["train", *overrides, "train.max_steps=3", f"hydra.run.dir={tmp_path / 'run'}"]
    check(shell(words, closed, **ASCII), 0)
    assert (tmp_path / "run" / runs.RESULT).is_file()
