"""SIGINT and SIGTERM: the step is finished and saved, then the command exits; a second signal stops at once."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from finished import call, rows_file
from tiny import tiny_folder

from lora_ft import runs
from lora_ft.adapters import peft_folder
from lora_ft.errors import Interrupted
from lora_ft.io import durable
from lora_ft.objectives import sft
from lora_ft.training import checkpoint, shared, trainer
from lora_ft.training.signals import on_signals

QUICK = ("train.max_steps=5", "train.tokens_per_step=160", "train.tokens_per_microbatch=80", "adapter.r=2",
         "adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]", "optim.lr=0.01",
         "data.eval_fraction=0.4",
         "train.samples=0", "train.save_every_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    return ("model=local", f"model.path={tiny_folder(folder, 'llama')}", f"data.path={rows_file(folder)}", *QUICK)


@pytest.fixture(scope="module")
def expected(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert call("train", *overrides, f"hydra.run.dir={run}") == 0
    return weights(run)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / peft_folder.WEIGHTS).read_bytes()).hexdigest()


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoint.FOLDER).glob("*"))


def signal_when(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, when: Callable[..., bool], *signals: int
) -> None:
    """Send these signals to this process at each call of a function for which `when(*arguments)` is true."""
    real = getattr(module, name)

    def replacement(*arguments: object, **options: object) -> object:
        if when(*arguments):
            for signum in signals:
                os.kill(os.getpid(), signum)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, replacement)


@pytest.mark.closes("C11")
@pytest.mark.parametrize(
    ("signum", "code", "step"),
    [
        (signal.SIGINT, 130, 1),
        (signal.SIGTERM, 143, 3),
        (signal.SIGINT, 130, 5),
        (signal.SIGHUP, 129, 3),
        pytest.param(signal.SIGUSR1, 128 + signal.SIGUSR1, 1, marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR2, 128 + signal.SIGUSR2, 5, marks=pytest.mark.nightly),
    ],
)
def test_signal_finishes_and_saves_the_current_step(
    signum: signal.Signals, code: int, step: int, overrides: tuple[str, ...], expected: str, tmp_path: Path, capfd
) -> None:
    """The signal arrives in the middle of a step, before a forward pass."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sent: list[int] = []

        def in_the_step(*_: object) -> bool:
            """Return true once, in `step`: all earlier lines are written (that of step 0 only late in step 1)."""
            written = len(runs.read_metrics(run)) if (run / runs.METRICS).exists() else 0
            return max(1, written) == step and not sent and not sent.append(1)

        signal_when(patch, sft, "token_loss_sum", in_the_step, signum)
        assert call("train", *overrides, f"hydra.run.dir={run}") == code
    message = capfd.readouterr().err
    again = "; send it again to stop now" if signum in (signal.SIGINT, signal.SIGTERM) else "\n"
    assert f"{signum.name}: finishing this step and saving a checkpoint{again}" in message
    assert f"stopped by {signum.name} after step {step} of 5; continue with: lora-ft train resume={run}" in message
    assert "Traceback" not in message
    assert saved(run)[-1] == f"step-{step:08d}"
    assert [m["step"] for m in runs.read_metrics(run)] == list(range(step + 1))
    assert not (run / "adapter").exists()
    assert call("train", f"resume={run}") == 0
    assert weights(run) == expected
    assert [m["step"] for m in runs.read_metrics(run)] == list(range(6))


@pytest.mark.closes("C11")
@pytest.mark.parametrize("moment", ["in the step", "while saving"])
def test_second_signal_stops_at_once_and_keeps_the_last_checkpoint(
    moment: str, overrides: tuple[str, ...], expected: str, tmp_path: Path, capfd
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if moment == "in the step":
            third = lambda state, *_: state.step == 2  # noqa: E731
            signal_when(patch, trainer, "compute_gradient", third, signal.SIGTERM, signal.SIGINT)
        else:
            signal_when(patch, trainer, "compute_gradient", lambda state, *_: state.step == 2, signal.SIGTERM)
            state = lambda path, *_: path.name == checkpoint.STATE and saved(run)[-1] == "step-00000002"  # noqa: E731
            signal_when(patch, durable, "_opened", state, signal.SIGINT)
        assert call("train", *overrides, f"hydra.run.dir={run}") == 130
    assert "lora-ft: stopped by SIGINT\n" in capfd.readouterr().err
    assert saved(run) == ["step-00000002"]
    assert call("train", f"resume={run}") == 0
    assert weights(run) == expected


@pytest.mark.parametrize("function", ["load_base", "finish"])
def test_signal_outside_training_steps_stops_at_once(
    function: str, overrides: tuple[str, ...], expected: str, tmp_path: Path, capfd
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        module = shared if function == "load_base" else sys.modules["lora_ft.train"]
        signal_when(patch, module, function, lambda *_: True, signal.SIGTERM)
        assert call("train", *overrides, f"hydra.run.dir={run}") == 143
    assert "lora-ft: stopped by SIGTERM\n" in capfd.readouterr().err
    assert saved(run)[-1:] == ([] if function == "load_base" else ["step-00000005"])
    assert call("train", f"resume={run}") == 0
    assert weights(run) == expected


def test_step_is_saved_after_a_signal_although_stdout_is_closed(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """With `lora-ft train | tee log`, Ctrl-C ends `tee` too; the step must be saved nevertheless."""
    run, (read_end, write_end) = tmp_path / "run", os.pipe()
    os.close(read_end)
    command = [
        Path(sys.executable).with_name("lora-ft"),
        "train",
        *overrides,
        "train.max_steps=100000",
        f"hydra.run.dir={run}",
    ]
    process = subprocess.Popen(command, stdout=write_end, stderr=write_end)
    os.close(write_end)
    while process.poll() is None and not (run / runs.METRICS).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (130, 141)
    assert checkpoint.newest(run) == run / "checkpoints" / f"step-{runs.read_metrics(run)[-1]['step']:08d}"


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with on_signals() as stop:
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == [stop.ask] * 2
        with pytest.raises(Interrupted, match="stopped by SIGINT") as caught:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_nothing_is_handled() -> None:
    """As in a web server: Python sets handlers in the main thread only."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def enter() -> list[object]:
        with on_signals():
            return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(enter).result() == before
