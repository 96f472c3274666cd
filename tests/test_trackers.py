"""Trackers through accelerate: with a fake server, real TensorBoard, and real wandb and MLflow (marked interop)."""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
import torch
from finished import rows_file
from states import some_rows, state_on, trained
from tiny import tiny_folder, tiny_model

from lora_ft import config, runs
from lora_ft.config import Tracker
from lora_ft.errors import Interrupted, NonFiniteError, ResourceError
from lora_ft.training import trackers
from lora_ft.training.finish import Result
from lora_ft.training.trainer import fit

RESULT = Result(
    eval_loss=2.25, base_eval_loss=3.5, eval_tokens=9, best_step=1, best_eval_loss=2.0, steps=2,
    stopped_early=False, stopped_by=None, tokens=60, tokens_per_second=30.0, train_seconds=2.0,
    trainable_parameters=8, peak_memory_bytes=7, adapter_sha256="ab",
)  # fmt: skip


class Server:
    """Fake tracker class for accelerate that records its runs and the values sent to them."""

    requires_logging_directory = False

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []
        self.fails_at: str | None = None

    def __call__(self, project: str, *folders: str, **options: Any) -> Any:
        run = SimpleNamespace(
            project=project, folders=folders, options=options, settings={}, rows=[], ended=[], summary={}, id="a-1",
            log=lambda values, step: self.do("log", lambda: run.rows.append((step, values))),
            store_init_configuration=lambda values: self.do("store", lambda: run.settings.update(values)),
            finish=lambda exit_code=None: self.do("finish", lambda: run.ended.append(exit_code)),
        )  # fmt: skip
        run.start = lambda: self.do("start", lambda: self.runs.append(run))
        run.run = run.tracker = run
        return run

    def do(self, name: str, action: Any) -> None:
        if self.fails_at == name:
            raise ConnectionError(f"no server to {name}")
        action()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A fake server under the name of wandb, for which the callback handles run id and exit code."""
    made = Server()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", made)
    return made


def run_of(folder: Path, tool: Tracker = Tracker.wandb) -> Any:
    """Return a fake training state with the fields that the callback reads."""
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(cfg=config.TrainRun(track=config.Track(tool, "mine")), folder=folder)


def track(state: Any, steps: range, outcome: Any = RESULT) -> None:
    callback = trackers.TrackerCallback(state.cfg.track)
    for step in steps:
        if step:
            callback.on_step(state, {"step": step, "loss": 4.0 / step, "lr": 0.5})
        else:
            callback.on_evaluate(state, {"step": 0, "eval_loss": 9.0})
    callback.on_end(state, outcome)


def test_tracker_names_are_those_of_accelerate() -> None:
    assert {t.value for t in Tracker} == {"none", *accelerate.tracking.LOGGER_TYPE_TO_CLASS}
    assert {path.stem for path in (config.CONF / "track").iterdir()} <= {t.value for t in Tracker}


def test_tracker_receives_settings_metrics_and_result(server: Server, tmp_path: Path) -> None:
    track(run_of(tmp_path / "my run"), range(3))
    (run,) = server.runs
    assert run.project == "mine"
    assert (run.options["name"], run.options["group"]) == ("my run", None)
    assert run.options["dir"] == str(tmp_path / "my run")
    assert run.settings["adapter.r"] == 16 and run.settings["optim.name"] == "adamw"
    assert (run.settings["resume"], run.settings["adapter.target_modules"]) == ("null", '["all-linear"]')
    expected = [(0, {"eval_loss": 9.0}), (1, {"loss": 4.0, "lr": 0.5}), (2, {"loss": 2.0, "lr": 0.5})]
    assert run.rows == expected
    assert run.summary["result/eval_loss"] == 2.25 and "result/stopped_by" not in run.summary
    assert run.ended == [0]


def test_settings_sent_to_a_tracker_contain_no_secret(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "c0ffee-c0ffee-0001")
    state = run_of(tmp_path)
    state.cfg.data.path, state.cfg.adapter.target_modules = "https://c0ffee-c0ffee-0001/x", ["c0ffee-c0ffee-0001"]
    track(state, range(1))
    assert "c0ffee" not in str(server.runs[0].settings)


def test_sweep_jobs_are_grouped_by_sweep_folder(server: Server, tmp_path: Path) -> None:
    for number in range(2):
        state = run_of(tmp_path / "ranks" / str(number))
        (tmp_path / "ranks" / runs.SWEEP).write_text("{}")
        track(state, range(2))
    assert [(r.options["group"], r.options["name"]) for r in server.runs] == [("ranks", "0"), ("ranks", "1")]


def test_resumed_run_continues_its_tracker_run(server: Server, tmp_path: Path) -> None:
    track(run_of(tmp_path), range(3), Interrupted(signal.SIGTERM, "stopped"))
    track(run_of(tmp_path), range(3, 5))
    first, second = server.runs
    assert "id" not in first.options and first.settings and first.ended == [143]
    assert (second.options["id"], second.options["resume"]) == ("a-1", "allow")
    assert not second.settings and [step for step, _ in second.rows] == [3, 4]


def test_resume_without_remaining_steps_sends_the_result(server: Server, tmp_path: Path) -> None:
    track(run_of(tmp_path), range(3), None)
    track(run_of(tmp_path), range(0))
    paused, ended = server.runs
    assert paused.ended == ended.ended == [0]
    assert not paused.summary and ended.summary["result/steps"] == 2


def test_run_id_of_another_tracker_is_ignored(server: Server, tmp_path: Path) -> None:
    (tmp_path / trackers.ID).write_text(json.dumps({"tracker": "mlflow", "id": "other"}))
    track(run_of(tmp_path), range(2))
    assert "id" not in server.runs[0].options
    assert json.loads((tmp_path / trackers.ID).read_text()) == {"tracker": "wandb", "id": "a-1"}


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(NonFiniteError("loss nan"), 8), (ValueError("a bug"), 1), (KeyboardInterrupt(), 1), (None, 0)],
    ids=lambda value: type(value).__name__,
)
def test_wandb_receives_the_exit_code(outcome: Any, code: int, server: Server, tmp_path: Path) -> None:
    track(run_of(tmp_path), range(2), outcome)
    assert server.runs[0].ended == [code]


def test_run_that_fails_before_its_first_metrics_creates_nothing(server: Server, tmp_path: Path) -> None:
    """The run folder stays empty and can be used again."""
    track(run_of(tmp_path), range(0), NonFiniteError("loss nan"))
    assert not server.runs and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails_at", ["start", "store", "log", "finish"])
def test_tracker_failure_gives_one_warning_and_the_same_adapter(
    fails_at: str, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def adapter(name: str, callbacks: list[Any]) -> torch.Tensor:
        state = state_on(
            tiny_model("llama"), tmp_path / name, eval_examples=some_rows(3, seed=1),
            train=config.Train(max_steps=3, tokens_per_step=60), optim=config.Optim(),
            track=config.Track(Tracker.wandb),
        )  # fmt: skip
        fit(state, callbacks)
        for callback in callbacks:
            callback.on_end(state, RESULT)
        return trained(state)

    server.fails_at = fails_at
    with caplog.at_level(logging.WARNING, "lora_ft"):
        tracked = adapter("with", [trackers.TrackerCallback(config.Track(Tracker.wandb))])
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "lora_ft"]
    assert warning == f"track=wandb failed; metrics.jsonl is complete: ConnectionError: no server to {fails_at}"
    assert torch.equal(tracked, adapter("without", []))
    assert [m["step"] for m in runs.read_metrics(tmp_path / "with")] == [0, 1, 2, 3]


def test_tracker_run_is_finished_after_a_failure(server: Server, tmp_path: Path) -> None:
    """Otherwise the next job of a sweep would continue the same tracker run."""
    server.fails_at = "log"
    track(run_of(tmp_path), range(3))
    assert server.runs[0].ended == [None]


def test_tensorboard_shows_repeated_steps_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(6), range(4, 8), range(0)):
        track(run_of(tmp_path, Tracker.tensorboard), steps, None if steps else replace(RESULT, steps=7))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(step, 0.5) for step in range(1, 8)]
    assert [(e.step, e.value) for e in events.Scalars("result/eval_loss")] == [(7, 2.25)]
    (settings,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "adapter.r: 16" in settings.read_text()


@pytest.mark.parametrize(("tool", "package"), [("wandb", r"'lora_ft\[wandb\]'"), ("trackio", "trackio")])
def test_missing_tracker_package_is_named(tool: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(ResourceError, match=rf"track={tool} needs the package {tool}: pip install {package}"):
        trackers.check(config.Track(Tracker(tool)))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("wandb")
    made.__spec__ = importlib.util.spec_from_loader("wandb", None)
    made.mode, made.has_key = "online", False
    made.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=made.mode))
    made.login = lambda prompt, verify: made.has_key
    monkeypatch.setitem(sys.modules, "wandb", made)
    for name in trackers._UNLESS_SET[Tracker.wandb]:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    return made


def test_wandb_needs_an_api_key_unless_offline(wandb: ModuleType) -> None:
    track = config.Track(Tracker.wandb)
    with pytest.raises(ResourceError, match="set WANDB_API_KEY, or WANDB_MODE=offline"):
        trackers.check(track)
    for wandb.mode in ("offline", "disabled"):
        trackers.check(track)
    wandb.mode, wandb.has_key = "online", True
    trackers.check(track)


def test_machine_reports_are_off_unless_the_environment_enables_them(
    wandb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.mode = "offline"
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    trackers.check(config.Track(Tracker.wandb))
    assert (os.environ["WANDB_ERROR_REPORTING"], os.environ["WANDB_DISABLE_GIT"]) == ("true", "true")


def needs(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: pip install 'lora_ft[wandb,mlflow]'")


def command(tmp_path: Path, run: str, *overrides: str) -> list[str]:
    base = tmp_path / "llama" if (tmp_path / "llama").is_dir() else tiny_folder(tmp_path, "llama")
    return [
        sys.executable, "-m", "lora_ft", "train", "model=local", f"model.path={base}",
        f"data.path={rows_file(tmp_path)}", f"hydra.run.dir={tmp_path / run}", "train.tokens_per_step=80",
        "adapter.r=2", "data.eval_fraction=0.4", "train.samples=1", "device=cpu", *overrides,
    ]  # fmt: skip


def services_of(folder: Path) -> list[int]:
    """Return the ids of processes whose HOME is this folder."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                pids.append(int(process.name))
    return pids


def wait_for_steps(process: "subprocess.Popen[str]", folder: Path) -> None:
    metrics = folder / runs.METRICS
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 3):
        time.sleep(0.01)


@pytest.mark.interop
def test_real_trackers_record_a_stopped_and_resumed_run(tmp_path: Path) -> None:
    """wandb offline and MLflow's file store: the adapter is unchanged, Ctrl-C works, and no process stays behind."""
    needs("wandb", "mlflow")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    adapters = []
    for tool in ("none", "wandb", "mlflow"):
        overrides = command(tmp_path, tool, f"track={tool}", "train.max_steps=150", "resume=auto")
        process = subprocess.Popen(
            overrides, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        wait_for_steps(process, tmp_path / tool)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 130, errors
        assert services_of(tmp_path) == []
        done = subprocess.run(overrides, env=environment, timeout=240, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0 and f"track={tool} failed" not in errors + done.stderr, done.stderr
        assert services_of(tmp_path) == []
        adapters.append((tmp_path / tool / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]
    key = json.loads((tmp_path / "wandb" / trackers.ID).read_text())["id"]
    parts = sorted((tmp_path / "wandb" / "wandb").glob(f"offline-run-*-{key}/run-{key}.wandb"))
    assert len(parts) == 2 and b"eval_loss" in parts[0].read_bytes()
    assert b"result/eval_loss" in parts[1].read_bytes()

    import mlflow

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow" / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'lora_ft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name, run.data.params["adapter.r"]) == ("FINISHED", "mlflow", "2")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [*range(1, 151)]
    assert run.data.metrics["result/eval_loss"] == runs.read_result(tmp_path / "mlflow")["eval_loss"]


@pytest.mark.interop
def test_wandb_service_exits_after_the_run_is_killed(tmp_path: Path) -> None:
    needs("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    overrides = command(tmp_path, "run", "track=wandb", "train.max_steps=100000")
    process = subprocess.Popen(overrides, env=environment, text=True)
    wait_for_steps(process, tmp_path / "run")
    services = set(services_of(tmp_path)) - {process.pid}
    process.kill()
    process.wait()
    assert services
    deadline = time.monotonic() + 60
    while services_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert services_of(tmp_path) == []
