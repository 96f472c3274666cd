"""Trackers hold what metrics.jsonl holds, of every run and its end, and no run depends on them.

The clients are stand-ins with the calls of wandb 0.31 and mlflow-skinny 3.17.
The tests marked interop have the real ones.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from finished import rows_file
from states import some_rows, state_on
from tiny import tiny_folder, tiny_model

from lora_ft import config, runs
from lora_ft.errors import ConfigError, Interrupted, NonFiniteError, ResourceError
from lora_ft.training import trackers
from lora_ft.training.finish import Result
from lora_ft.training.trainer import fit

BOTH = pytest.mark.parametrize("tool", ["wandb", "mlflow"])
RESULT = Result(
    heldout_loss=2.25, base_heldout_loss=3.5, heldout_tokens=9, best_step=1, best_heldout_loss=2.0, steps=2,
    stopped_early=False, stopped_by=None, tokens=60, tokens_per_second=30.0, train_seconds=2.0,
    trainable_parameters=8, peak_memory_bytes=7, adapter_sha256="ab",
)  # fmt: skip


class Wandb(ModuleType):
    """What lora_ft calls of wandb; `runs` is what its server would hold, by id."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.mode, self.has_key, self.is_down, self.services = "online", True, False, 0
        self.runs: dict[str, SimpleNamespace] = {}
        self.Settings = lambda **settings: settings

    def setup(self) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify
        return self.has_key

    def init(self, *, id: str, **given: Any) -> Any:
        sys.excepthook = print
        if self.is_down:
            raise ConnectionError("wandb is down")
        assert given["resume"] == "allow" and given["reinit"] == "create_new"
        self.services = 1
        held = self.runs.setdefault(id, SimpleNamespace(rows={}, summary={}, given=[], status="RUNNING"))
        held.given.append(given)

        def log(values: dict[str, Any], step: int) -> None:
            assert step not in held.rows and step >= max(held.rows, default=0)
            held.rows[step] = values

        def finish(exit_code: int) -> None:
            held.status = exit_code

        start = max(held.rows, default=-1) + 1
        return SimpleNamespace(starting_step=start, log=log, summary=held.summary, finish=finish)

    def teardown(self) -> None:
        self.services = 0


class Mlflow(ModuleType):
    """What lora_ft calls of mlflow; `runs` is what its server would hold, by lora_ft's id."""

    class MlflowException(Exception):
        """mlflow's own."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.is_down, self.uris, self.batches = False, [], 0
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, SimpleNamespace] = {}
        self.entities = ModuleType("mlflow.entities")
        for name, fields in (("Metric", "key value timestamp step"), ("Param", "key value"), ("RunTag", "key value")):
            setattr(self.entities, name, dataclasses.make_dataclass(name, fields.split()))

    def MlflowClient(self, tracking_uri: str) -> Any:
        self.uris.append(tracking_uri)
        return self

    def _up(self) -> None:
        if self.is_down:
            raise self.MlflowException("mlflow is down")

    def create_experiment(self, name: str) -> str:
        self._up()
        if name in self.experiments:
            raise self.MlflowException("it exists")
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def get_experiment_by_name(self, name: str) -> Any:
        self._up()
        return SimpleNamespace(experiment_id=self.experiments[name])

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        found = [r for key, r in self.runs.items() if query == f"tags.`lora_ft.id` = '{key}'"]
        return [SimpleNamespace(info=SimpleNamespace(run_id=r.id)) for r in found if r.experiment in experiments]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        held = SimpleNamespace(
            id=f"run of {tags['lora_ft.id']}", experiment=experiment, name=run_name, tags=dict(tags), params={},
            points=[], status="RUNNING",
        )  # fmt: skip
        self.runs[tags["lora_ft.id"]] = held
        return SimpleNamespace(info=SimpleNamespace(run_id=held.id))

    def _held(self, run_id: str) -> SimpleNamespace:
        self._up()
        return self.runs[run_id.removeprefix("run of ")]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        held = self._held(run_id)
        assert len(metrics) <= 1000 and len(params) <= 100
        assert not {p.key for p in params} & held.params.keys()
        self.batches += bool(metrics)
        held.points += metrics
        held.params |= {p.key: p.value for p in params}
        held.tags |= {t.key: t.value for t in tags}

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [point for point in self._held(run_id).points if point.key == key]

    def update_run(self, run_id: str, status: str) -> None:
        self._held(run_id).status = status

    set_terminated = update_run


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in [
        *os.environ,
        "MLFLOW_ALLOW_FILE_STORE",
        *(n for unset in trackers._UNLESS_SET.values() for n in unset),
    ]:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.setenv(name, "")  # so that it is as it was after the test, which sets some
            monkeypatch.delenv(name)
    made = {"wandb": Wandb(), "mlflow": Mlflow()}
    monkeypatch.setitem(sys.modules, "mlflow.entities", made["mlflow"].entities)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def run_of(folder: Path, tool: str, project: str = "lora_ft", name: str = "adapter0") -> Any:
    """What trackers read of a state."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config.TrainRun(track=config.Track(config.Tracker(tool), project))
    return SimpleNamespace(name=name, cfg=cfg, folder=folder)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "heldout_loss": 9.0} if step == 0 else {"step": step, "loss": 4.0 / step, "lr": 0.5}


def held_steps(module: Any) -> list[tuple[int, dict[str, Any]]]:
    """Rows as the only run of a tracker holds them, in the order in which they came."""
    (held,) = module.runs.values()
    if isinstance(module, Wandb):
        return list(held.rows.items())
    steps: dict[int, dict[str, Any]] = {}
    for point in held.points:
        if not point.key.startswith("result/"):
            values = steps.setdefault(point.step, {})
            assert point.key not in values, "a value came twice"
            values[point.key] = point.value
    return list(steps.items())


def written(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    return [(r.pop("step"), r) for r in runs.read_metrics(folder)]


def back_to(folder: Path, step: int) -> None:
    """Cut metrics.jsonl as a resume from the checkpoint of this step does."""
    lines = (folder / runs.METRICS).read_text().splitlines(keepends=True)
    (folder / runs.METRICS).write_text("".join(lines[: step + 1]))


def test_wandb_holds_settings_steps_and_summary_of_a_run(fakes: dict[str, Any], tmp_path: Path) -> None:
    state, hook = run_of(tmp_path / "my run", "wandb", project="mine"), sys.excepthook
    with trackers.tracked([state]) as track:
        for step in range(3):
            track(state, row(step))
        assert fakes["wandb"].services == 1
        track.ended(state, RESULT)
    assert sys.excepthook is hook, "tracebacks are ours, without secrets"
    assert fakes["wandb"].services == 0
    (held,) = fakes["wandb"].runs.values()
    (given,) = held.given
    assert (given["project"], given["name"], given["group"]) == ("mine", "my run", None)
    assert given["dir"] == str(tmp_path / "my run")
    assert given["config"]["adapter"]["r"] == 16 and given["config"]["optim"]["name"] == "adamw"
    assert given["settings"]["console"] == "off"
    assert held_steps(fakes["wandb"]) == written(state.folder)
    assert (held.summary["result/heldout_loss"], held.status) == (2.25, 0)
    assert "result/stopped_by" not in held.summary


def test_mlflow_holds_settings_steps_and_summary_of_a_run(fakes: dict[str, Any], tmp_path: Path) -> None:
    state = run_of(tmp_path / "my run", "mlflow", project="mine")
    with trackers.tracked([state]) as track:
        for step in range(3):
            track(state, row(step))
        track.ended(state, RESULT)
    (held,) = fakes["mlflow"].runs.values()
    assert list(fakes["mlflow"].experiments) == ["mine"] and held.name == "my run" and "group" not in held.tags
    assert (held.params["adapter.r"], held.params["optim.name"], held.params["resume"]) == ("16", "adamw", "null")
    assert json.loads(held.params["adapter.targets"]) == ["all-linear"]
    assert held_steps(fakes["mlflow"]) == written(state.folder)
    final = {p.key: (p.step, p.value) for p in held.points if p.key.startswith("result/")}
    assert final["result/heldout_loss"] == (2, 2.25)
    assert (held.tags["result/adapter_sha256"], held.status) == ("ab", "FINISHED")
    assert fakes["mlflow"].uris == [(tmp_path / "my run" / "mlflow").as_uri()]


def test_mlflow_uses_the_server_that_the_environment_names(fakes: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    trackers.Tracked([state := run_of(tmp_path, "mlflow")])(state, row(1))
    assert fakes["mlflow"].uris == ["http://tracking:5000"]
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def test_mlflow_is_sent_at_most_a_batch_a_second_and_all_at_the_end(fakes, tmp_path: Path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    state = run_of(tmp_path, "mlflow")
    with trackers.tracked([state]) as track:
        for step in range(21):
            track(state, row(step))
            now[0] += 0.25
        assert fakes["mlflow"].batches == 1 + 5
        track.ended(state, RESULT)
    assert held_steps(fakes["mlflow"]) == written(tmp_path)


@BOTH
def test_the_jobs_of_a_sweep_are_grouped_by_its_folder(tool: str, fakes: dict[str, Any], tmp_path: Path) -> None:
    jobs = [run_of(tmp_path / "ranks" / str(number), tool, name=f"adapter{number}") for number in range(2)]
    (tmp_path / "ranks" / runs.SWEEP).write_text("{}")
    with trackers.tracked(jobs) as track:
        for step in (1, 2):
            for job in jobs:
                track(job, row(step))
        for job in jobs:
            track.ended(job, RESULT)
    held = fakes[tool].runs.values()
    if tool == "wandb":
        assert [(r.given[0]["group"], r.given[0]["name"]) for r in held] == [("ranks", "0"), ("ranks", "1")]
    else:
        assert [(r.tags["group"], r.name) for r in held] == [("ranks", "0"), ("ranks", "1")]


@BOTH
def test_a_resumed_run_goes_on_in_the_same_run_and_no_step_comes_twice(
    tool: str, fakes: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(trackers, "_MLFLOW_SECONDS", 0.0)
    state = run_of(tmp_path, tool)
    first = trackers.Tracked([state])  # killed after step 5; its checkpoint is of step 3
    for step in range(6):
        first(state, row(step))
    back_to(tmp_path, step=3)
    with trackers.tracked([state]) as track:
        for step in range(4, 8):
            track(state, row(step))
        track.ended(state, RESULT)
    assert held_steps(fakes[tool]) == written(tmp_path)


@BOTH
def test_a_resumed_run_brings_what_the_tracker_has_missed(tool: str, fakes: dict[str, Any], tmp_path: Path) -> None:
    state = run_of(tmp_path, "none")
    before = trackers.Tracked([state])
    for step in range(4):
        before(state, row(step))
    with trackers.tracked([state := run_of(tmp_path, tool)]) as track:
        track(state, row(4))
        track.ended(state, RESULT)
    assert held_steps(fakes[tool]) == written(tmp_path)
    assert [step for step, _ in held_steps(fakes[tool])] == [*range(5)]


@BOTH
@pytest.mark.parametrize(
    "ending, marks",
    [
        (NonFiniteError("loss nan"), {"wandb": 8, "mlflow": "FAILED"}),
        (ValueError("a bug"), {"wandb": 1, "mlflow": "FAILED"}),
        (Interrupted(signal.SIGTERM, "stopped"), {"wandb": 143, "mlflow": "KILLED"}),
        (GeneratorExit(), {"wandb": 1, "mlflow": "KILLED"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_how_a_run_ended_is_marked(
    ending: BaseException, marks: dict[str, Any], tool: str, fakes: dict[str, Any], tmp_path: Path
) -> None:
    told, broken_off = (run_of(tmp_path / name, tool, name=name) for name in ("told", "broken off"))
    with pytest.raises(type(ending)), trackers.tracked([told, broken_off]) as track:
        for state in (told, broken_off):
            track(state, row(1))
        track.ended(told, RESULT)
        raise ending
    finished, other = (held.status for held in fakes[tool].runs.values())
    assert finished == {"wandb": 0, "mlflow": "FINISHED"}[tool]
    assert other == marks[tool]
    assert fakes["wandb"].services == 0


@BOTH
def test_a_run_that_fails_before_its_first_metrics_leaves_nothing(
    tool: str, fakes: dict[str, Any], tmp_path: Path
) -> None:
    """So that its folder can be begun again."""
    with trackers.tracked([state := run_of(tmp_path, tool)]) as track:
        track.ended(state, NonFiniteError("loss nan"))
    assert not fakes[tool].runs and not list(tmp_path.iterdir())


@BOTH
@pytest.mark.parametrize("is_down", [False, True], ids=["up", "down"])
def test_no_bit_of_the_result_depends_on_a_tracker(
    is_down: bool, tool: str, fakes: dict[str, Any], tmp_path: Path, caplog
) -> None:
    def adapter(name: str, tracker: str) -> torch.Tensor:
        (tmp_path / name).mkdir()
        state = state_on(
            tiny_model("llama"), tmp_path / name, eval_examples=some_rows(3, seed=1),
            train=config.Train(max_steps=3, tokens_per_step=60), optim=config.Optim(),
            track=config.Track(config.Tracker(tracker)),
        )  # fmt: skip
        with trackers.tracked([state]) as track:
            fit([state], track)
            track.ended(state, RESULT)
        return torch.cat([p.detach().flatten() for _, p in sorted(state.parameters.items())])

    fakes[tool].is_down = is_down
    assert torch.equal(adapter("with", tool), adapter("without", "none"))
    assert [m["step"] for m in runs.read_metrics(tmp_path / "with")] == [0, 1, 2, 3]
    warned = [r.getMessage() for r in caplog.records if "track=" in r.getMessage()]
    assert bool(warned) == is_down
    if is_down:
        assert f"track={tool} failed; metrics.jsonl has all: " in warned[0] and f"{tool} is down" in warned[0]
        assert len(warned) == (2 if tool == "mlflow" else 1), "at the beginning, and where it is tried again the end"
    else:
        assert held_steps(fakes[tool]) == written(tmp_path / "with")


def test_mlflow_gets_all_at_the_end_where_its_server_was_away(fakes, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(trackers, "_MLFLOW_SECONDS", 0.0)
    with trackers.tracked([state := run_of(tmp_path, "mlflow")]) as track:
        for step in range(8):
            fakes["mlflow"].is_down = step in (3, 4)
            track(state, row(step))
        assert [step for step, _ in held_steps(fakes["mlflow"])] == [0, 1, 2]
        track.ended(state, RESULT)
    assert held_steps(fakes["mlflow"]) == written(tmp_path)
    assert len(caplog.records) == 1


def test_tensorboard_is_appended_to_from_where_a_run_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = run_of(tmp_path, "tensorboard")
    for steps in (range(6), range(4, 8)):
        with trackers.tracked([state]) as track:
            for step in steps:
                track(state, row(step))
            back_to(tmp_path, step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(step, 0.5) for step in range(1, 8)]


def test_the_id_is_the_folders_and_kept_in_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    assert trackers._id(one) == trackers._id(one) != trackers._id(other)
    begun = trackers._id(one)
    one.rename(tmp_path / "moved")
    one.mkdir()
    assert trackers._id(tmp_path / "moved") == begun != trackers._id(one)
    (other / trackers.ID).write_text(json.dumps({"id": "a' or ''='"}))
    with pytest.raises(ConfigError, match=r"tracker\.json must hold the id of the run"):
        trackers._id(other)


@pytest.mark.parametrize("tool", ["wandb", "mlflow", "tensorboard"])
def test_a_package_that_is_not_there_is_named(tool: str, fakes: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(ResourceError, match=rf"track={tool} .*pip install 'lora_ft\[{tool}\]'"):
        trackers.check(config.Track(config.Tracker(tool)))


def test_wandb_without_an_account_is_refused_unless_it_is_offline(fakes: dict[str, Any]) -> None:
    track = config.Track(config.Tracker.wandb)
    fakes["wandb"].has_key = False
    with pytest.raises(ResourceError, match="set WANDB_API_KEY, or WANDB_MODE=offline"):
        trackers.check(track)
    for fakes["wandb"].mode in ("offline", "disabled"):
        trackers.check(track)


def test_reports_to_the_tools_makers_are_off_unless_the_environment_says_otherwise(
    fakes: dict[str, Any], monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    for tool in (config.Tracker.wandb, config.Tracker.mlflow):
        trackers.check(config.Track(tool))
    assert (os.environ["WANDB_ERROR_REPORTING"], os.environ["MLFLOW_DISABLE_TELEMETRY"]) == ("true", "true")


def needs(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: pip install 'lora_ft[wandb,mlflow]'")


def command(tmp_path: Path, run: str, *words: str) -> list[str]:
    base = tmp_path / "llama" if (tmp_path / "llama").is_dir() else tiny_folder(tmp_path, "llama")
    return [
        sys.executable, "-m", "lora_ft", "train", "model=local", f"model.path={base}",
        f"data.path={rows_file(tmp_path)}", f"hydra.run.dir={tmp_path / run}", "train.tokens_per_step=80",
        "adapter.r=2", "data.eval_fraction=0.4", "train.samples=1", "device=cpu", *words,
    ]  # fmt: skip


def services_of(folder: Path) -> list[int]:
    """Processes beside this one that were started with this folder as their home."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={folder}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.interop
def test_real_clients_keep_a_run_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """wandb offline and MLflow's file store: the bytes of a run without, Ctrl-C is ours, no service is left."""
    needs("wandb", "mlflow")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    adapters = []
    for tool in ("none", "wandb", "mlflow"):
        words = command(tmp_path, tool, f"track={tool}", "train.max_steps=150", "resume=auto")
        process = subprocess.Popen(words, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
        metrics = tmp_path / tool / runs.METRICS
        while process.poll() is None and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 3):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 130, said
        assert services_of(tmp_path) == []
        assert subprocess.run(words, env=environment, timeout=120).returncode == 0
        assert services_of(tmp_path) == []
        adapters.append((tmp_path / tool / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]
    key = json.loads((tmp_path / "wandb" / trackers.ID).read_text())["id"]
    parts = sorted((tmp_path / "wandb" / "wandb").glob(f"offline-run-*-{key}/run-{key}.wandb"))
    assert len(parts) == 2 and all(b"heldout_loss" in part.read_bytes() for part in parts)
    assert b"result/heldout_loss" in parts[1].read_bytes()

    import mlflow

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow" / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'lora_ft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name, run.data.params["adapter.r"]) == ("FINISHED", "mlflow", "2")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [*range(1, 151)]
    assert run.data.metrics["result/heldout_loss"] == runs.read_result(tmp_path / "mlflow")["heldout_loss"]


@pytest.mark.interop
def test_the_service_of_wandb_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    needs("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    process = subprocess.Popen(command(tmp_path, "run", "track=wandb", "train.max_steps=100000"), env=environment)
    metrics = tmp_path / "run" / runs.METRICS
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    beside = set(services_of(tmp_path)) - {process.pid}
    process.kill()
    process.wait()
    assert beside
    give_up = time.monotonic() + 60
    while services_of(tmp_path) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert services_of(tmp_path) == []
