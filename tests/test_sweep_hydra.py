"""Sweeps through Hydra: its own test suites, other sweepers and launchers, overrides, resuming, folders."""

import hashlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finished import call, rows_file
from hydra import version
from hydra.core.singleton import Singleton
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from tiny import tiny_folder

from lora_ft import runs, validation
from lora_ft.cli import composition, entry
from lora_ft.errors import ConfigError, NonFiniteError, ResourceError
from lora_ft.io import durable
from lora_ft.sweeps import launch, scheduler
from lora_ft.sweeps.jobs import Job


@pytest.mark.filterwarnings("ignore:Future Hydra versions:UserWarning")  # of the suites' own programs
@pytest.mark.parametrize(("launcher_name", "overrides"), [("lora_ft", [])])
class TestLauncher(LauncherTestSuite):
    """The launcher with the task of another program."""

    @pytest.fixture(autouse=True)
    def own_version_base(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set the version_base, which the suite takes from whatever ran before it in the process."""
        monkeypatch.setitem(Singleton._instances, version.VersionBase, version.VersionBase.__new__(version.VersionBase))
        version.VersionBase.instance().setbase(version.__compat_version__)


@pytest.mark.nightly
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=lora_ft"])])
class TestProgram(IntegrationTestSuite):
    """The same in a process of its own."""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return f"data.path={rows_file(tmp_path)}"


class Jobs(list[Job]):
    """The jobs to train; `loss(job)` returns the eval loss of one, or raises its error."""

    loss: Callable[[Job], float | None] = staticmethod(lambda job: 1.0)


@pytest.fixture
def trained(rows: str, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Replace the workers: a job gets its result at once, and nothing is trained."""
    jobs = Jobs()

    def run(left: list[Job], settings: Any, sweep: Any, folder: Path, watch: Callable[[Any], None]) -> None:
        for job in left:
            jobs.append(job)
            try:
                result = {"eval_loss": jobs.loss(job)}
            except NonFiniteError as error:
                runs.fail(job.folder, error, job.overrides)
                continue
            durable.remove(job.folder / runs.FAILURE)
            durable.write_text(job.folder / "config.yaml", yaml.safe_dump(validation.to_plain(job.cfg)))
            durable.write_json(job.folder / runs.RESULT, result)

    monkeypatch.setattr(scheduler, "run", run)
    monkeypatch.setattr(launch.report, "write", lambda folder, *, pictures: None)
    monkeypatch.setattr(
        importlib.import_module("lora_ft.sweep"), "end", lambda folder: 3 if any(folder.rglob(runs.FAILURE)) else 0
    )
    return jobs


def values(jobs: list[Job], *keys: str) -> list[tuple[Any, ...]]:
    def value(job: Job, key: str) -> Any:
        found: Any = job.cfg
        for name in key.split("."):
            found = getattr(found, name)
        return found

    return [tuple(value(job, key) for key in keys) for job in jobs]


def refused(capfd: pytest.CaptureFixture[str], *overrides: str, code: int = 2) -> str:
    """Run a sweep that must fail before its first job and leave no folder; return its message."""
    before = set(Path().rglob("*"))
    assert call("sweep", *overrides) == code
    assert set(Path().rglob("*")) - before <= {Path("runs")}
    message = capfd.readouterr().err
    assert message.startswith("lora-ft: ") and "Traceback" not in message
    return message


SYNTAX = {
    "adapter.r=choice(2,4) seed=range(1,3)": [(2, 1), (2, 2), (4, 1), (4, 2)],
    "adapter.r=3 seed=sort(3,1,2,reverse=true)": [(3, 3), (3, 2), (3, 1)],
    "hydra.sweeper.params={adapter.r:'2,4',seed:'range(0,2)'}": [(2, 0), (2, 1), (4, 0), (4, 1)],
    "hydra.sweeper.params.adapter.r=2,4 seed=1": [(2, 1), (4, 1)],
}


@pytest.mark.parametrize("overrides", SYNTAX)
def test_notations_of_hydra_for_several_values_make_the_jobs(trained: Jobs, rows: str, overrides: str) -> None:
    assert call("sweep", rows, *overrides.split()) == 0
    assert values(trained, "adapter.r", "seed") == SYNTAX[overrides]
    assert [job.number for job in trained] == list(range(len(trained)))
    assert [job.folder.name for job in trained] == [str(job.number) for job in trained]


def test_glob_sweeps_over_the_choices_of_a_group(trained: Jobs, rows: str) -> None:
    assert call("sweep", rows, "adapter=glob(*lora)") == 0
    assert sorted(values(trained, "adapter.use_rslora")) == [(False,), (True,)]


def test_job_stores_the_overrides_of_its_own_train_command(trained: Jobs, rows: str) -> None:
    overrides = ("sweep.halving=true", "sweep.min_steps=5", "resume=auto", "hydra.sweep.dir=here", "adapter.r=2,4")
    assert call("train", "-m", rows, *overrides) == 0
    for number, rank in ((0, 2), (1, 4)):
        typed = (Path("here") / str(number) / "overrides.txt").read_text().splitlines()
        assert sorted(typed) == sorted([rows, f"adapter.r={rank}", "device=cpu"])


@pytest.mark.closes("E06")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("adapter.r=4,0", r"job 1 (adapter.r=0 "),
        ("adapter.rr=4,8", "adapter.rr is not a setting; nearest: adapter.r"),
        ("hydra.sweeper.params.adapter.rr=4,8", "adapter.rr is not a setting; nearest: adapter.r"),
        ("adapter.r=4,eight", "adapter.r must be an integer, got eight"),
        ("quant=nf4,nf5", "quant=nf5: choose one of"),
        ("hydra.launcher.job_timeout=0", "hydra.launcher.job_timeout must be above 0, got 0"),
        ("hydra.launcher.share=none", "hydra.launcher.share"),
        ("adapter.r=4,8 hydra.sweep.dir=here seed=-1", "job 0 (adapter.r=4 "),
        ("seed=1,2 sweep.halving=true hydra.launcher.share_base=false", "sweep.halving=true has no jobs to compare"),
        (
            "seed=1,2 sweep.halving=true hydra/launcher=basic",
            "sweep.halving=true needs hydra/launcher=lora_ft",
        ),
    ],
)
def test_wrong_value_in_a_grid_ends_the_sweep_before_its_first_job(trained, rows, capfd, overrides, message) -> None:
    assert message in refused(capfd, *overrides.split(), rows)
    assert trained == []


@pytest.mark.closes("E04")
def test_resume_runs_missing_and_failed_jobs_with_the_stored_overrides(trained, rows, capfd) -> None:
    def nan(job: Job) -> float:
        raise NonFiniteError("loss is nan")

    trained.loss = lambda job: nan(job) if job.number == 1 else 2.0
    assert call("sweep", rows, "adapter.r=2,4,8", "hydra.sweep.dir=here") == 3
    trained.clear()
    trained.loss = lambda job: 3.0
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir("/")
        assert resumed("sweep", f"resume={Path(rows.partition('=')[2]).parent / 'here'}") == 0
    assert values(trained, "adapter.r") == [(4,)]
    assert not Path("here/1/failure.json").exists()
    trained.clear()
    assert resumed("train", "-m", "resume=here", "hydra.launcher.share_base=false") == 0
    assert call("train", "-m", rows, "adapter.r=2,4,8", "hydra.sweep.dir=here", "resume=auto") == 0
    assert trained == []


def resumed(*arguments: str) -> int:
    """Run a command without the device=cpu that `call` adds, which a resumed sweep refuses."""
    with pytest.raises(SystemExit) as ended:
        entry.run(None, list(arguments))
    return int(ended.value.code or 0)


@pytest.mark.closes("E04")
def test_resumed_sweep_refuses_other_overrides_and_folders(trained: Jobs, rows: str, capfd) -> None:
    assert call("sweep", rows, "adapter.r=2,4", "hydra.sweep.dir=here") == 0
    held = {path: path.stat().st_mtime_ns for path in Path("here").rglob("*") if path.is_file()}
    for arguments, message in {
        ("sweep", "resume=here", "adapter.r=16"): "leave out adapter.r=16",
        ("train", "-m", "resume=here", "adapter.r=16"): "leave out adapter.r=16",
        ("sweep", "resume=here", "hydra.sweep.dir=there"): "leave out hydra.sweep.dir=there",
        ("sweep", "resume=here/0"): "here/0 is not a sweep folder: it has no sweep.json",
        ("train", "resume=nowhere", "-m"): "nowhere is not a sweep folder",
        ("sweep", rows, "adapter.r=2,4", "hydra.sweep.dir=here"): "the sweep folder must be empty",
    }.items():
        capfd.readouterr()
        assert resumed(*arguments) == 2
        assert message in capfd.readouterr().err
    assert held == {path: path.stat().st_mtime_ns for path in Path("here").rglob("*") if path.is_file()}


@pytest.mark.closes("E03")
def test_only_one_of_fifty_simultaneous_sweeps_gets_a_folder(tmp_path: Path) -> None:
    began, refusals = [], []
    together = threading.Barrier(50)

    def begin(number: int) -> None:
        together.wait()
        try:
            with runs.locked(tmp_path / "sweep"):
                runs.create_sweep(tmp_path / "sweep", [f"seed={number}"], None, resumed=False)
                began.append(number)
        except ConfigError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) == 1 and len(refusals) == 49
    assert runs.read_sweep(tmp_path / "sweep") == ([f"seed={began[0]}"], None)
    assert all("is in use" in refusal or "must be empty" in refusal for refusal in refusals)


@pytest.mark.closes("E03")
def test_sweeps_started_in_the_same_second_get_different_folders(trained: Jobs, rows: str) -> None:
    assert [call("sweep", rows, "seed=1,2") for _ in range(2)] == [0, 0]
    assert len({job.folder for job in trained}) == 4
    assert len({job.folder.parent for job in trained}) == 2


def test_environment_set_by_hydra_reaches_the_workers(trained: Jobs, rows: str) -> None:
    def seen(job: Job) -> float:
        return float(os.environ["LORA_FT_TEST"])

    trained.loss = seen
    assert call("sweep", rows, "adapter.r=2,4", "hydra.sweep.dir=here", "+hydra.job.env_set.LORA_FT_TEST='2.5'") == 0
    assert runs.read_result(Path("here/1")) == {"eval_loss": 2.5}
    assert "LORA_FT_TEST" not in os.environ


OPTUNAS_OWN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@OPTUNAS_OWN
@pytest.mark.closes("E07")
def test_optuna_minimizes_the_eval_loss_and_failed_trials_count_as_infinite(trained: Jobs, rows: str) -> None:
    def loss(job: Job) -> float:
        if job.cfg.adapter.r == 4:
            raise NonFiniteError("loss is nan")
        return 1 / job.cfg.adapter.r

    trained.loss = loss
    grid = ("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "adapter.r=choice(2,4,8,0)", "hydra.sweep.dir=here")
    assert call("sweep", rows, *grid) == 3
    found = yaml.safe_load(Path("here/optimization_results.yaml").read_text())
    assert found == {"name": "optuna", "best_params": {"adapter.r": 8}, "best_value": 0.125}
    kinds = [runs.read_failure(path.parent)["kind"] for path in Path("here").rglob(runs.FAILURE)]
    assert sorted(kinds) == ["ConfigError", "NonFiniteError"], "a wrong value that optuna chose fails only its own job"
    assert sorted(values(trained, "adapter.r")) == [(2,), (4,), (8,)]


@OPTUNAS_OWN
def test_optuna_takes_its_search_space_from_overrides_params_or_a_file(trained: Jobs, rows: str) -> None:
    optuna = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1")
    space = "tag(log,interval(1e-4,1e-2))"
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/space.yaml").write_text(
        f"# @package _global_\nhydra:\n  sweeper:\n    params:\n      optim.lr: {space}\n"
    )
    for overrides in ([f"optim.lr={space}"], [f"hydra.sweeper.params.optim.lr={space}"],
                  ["--config-dir", "mine", "experiment=space"]):  # fmt: skip
        assert call("sweep", rows, *optuna, *overrides) == 0
    found = [lr for (lr,) in values(trained, "optim.lr")]
    assert found[:3] == found[3:6] == found[6:] and len(set(found)) == 3
    assert all(1e-4 <= lr <= 1e-2 for lr in found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.sweeper.direction=maximize", "hydra.sweeper.direction must be minimize, got maximize"),
        ("train.best_metric=macro_f1", "hydra.sweeper.direction must be maximize, got minimize"),
        ("data.eval_fraction=0", "data.eval_fraction must be above 0 if a sweeper chooses"),
    ],
)
@pytest.mark.closes("E07")
def test_optuna_needs_the_direction_of_the_metric_and_eval_rows(trained, rows, capfd, override, message) -> None:
    assert message in refused(capfd, rows, "hydra/sweeper=optuna", "adapter.r=choice(2,4)", override)
    assert trained == []


ATTACKS = {
    "a function by name": "hydra: {sweeper: {custom_search_space: os.system}}",
    "logging of a job": "hydra: {sweeper: {params: {hydra: '{job_logging: {root: {level: DEBUG}}}'}}}",
    "the same, added": "hydra: {sweeper: {params: {++hydra: '{job_logging: {root: {level: DEBUG}}}'}}}",
    "a launcher for jobs": "hydra: {sweeper: {params: {hydra/launcher: basic}}}",
    "a target in a value": "hydra: {sweeper: {params: {+x: '{_target_: os.system}'}}}",
    "overrides that nobody typed": "hydra: {overrides: {hydra: ['hydra.job_logging.handlers.x=1']}}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_folder_of_configs_cannot_run_code_through_a_sweeper(trained, rows, capfd, name: str) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/bad.yaml").write_text(f"# @package _global_\n{ATTACKS[name]}\n")
    refused(capfd, rows, "--config-dir", "mine", "experiment=bad", "hydra/sweeper=basic" if "params" in ATTACKS[name]
            else "hydra/sweeper=optuna", "hydra.sweep.dir=here", "adapter.r=choice(2,4)", code=9)  # fmt: skip
    assert trained == []


@pytest.mark.parametrize(
    "settings",
    ["setup: [touch gone]", 'comment: "x\\ntouch gone"', "additional_parameters: {x: y}"],
)
def test_folder_of_configs_cannot_hold_shell_commands_for_a_cluster(rows, capfd, settings: str) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/bad.yaml").write_text(f"# @package _global_\nhydra: {{launcher: {{{settings}}}}}\n")
    overrides = (rows, "--config-dir", "mine", "experiment=bad", "hydra/launcher=submitit_slurm", "seed=1,2")
    assert "hydra.launcher" in refused(capfd, *overrides, code=9)


def test_folder_of_configs_cannot_hold_flags_of_sbatch(rows: str, capfd) -> None:
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/bad.yaml").write_text("# @package _global_\nhydra: {launcher: {extra: ['--uid=0']}}\n")
    overrides = (rows, "--config-dir", "mine", "experiment=bad", "hydra.launcher.executor=slurm", "seed=1,2")
    assert "hydra.launcher.extra" in refused(capfd, *overrides, code=9)


def test_launcher_of_a_cluster_composes_with_typed_settings(rows: str, capfd) -> None:
    slurm = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.setup=[module load cuda]")
    assert call("sweep", rows, *slurm, "adapter.r=4,8,16", "--cfg", "hydra") == 0
    launcher = yaml.safe_load(capfd.readouterr().out)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert launcher["partition"] == "gpu" and launcher["setup"] == ["module load cuda"]


def test_settings_of_a_cluster_are_typed_and_refused_for_another_executor(trained, rows: str, capfd) -> None:
    slurm = ("hydra.launcher.executor=slurm", "hydra.launcher.extra=['--account=lab']", "hydra.launcher.memory=1.5")
    assert call("sweep", rows, *slurm, "adapter.r=4,8", "--cfg", "hydra") == 0
    launcher = yaml.safe_load(capfd.readouterr().out)["hydra"]["launcher"]
    assert launcher["extra"] == ["--account=lab"] and launcher["memory"] == 1.5
    assert "hydra.launcher.partition needs hydra.launcher.executor=slurm, got local" in refused(
        capfd, rows, "hydra.launcher.partition=gpu", "hydra.sweep.dir=here"
    )
    assert "hydra.launcher.notice must be below hydra.launcher.time_limit (2 minutes), got 120 seconds" in refused(
        capfd, rows, "hydra.launcher.executor=slurm", "hydra.launcher.time_limit=2"
    )
    assert trained == [] and not Path("here").exists()


def test_command_that_makes_no_run_leaves_no_folder(rows: str, tmp_path: Path) -> None:
    calls = []

    def main(cfg: Any, folder: Path, overrides: list[str]) -> None:
        calls.append((cfg.adapter.r, folder, overrides, os.environ.get("LORA_FT_TEST")))

    typed = [rows, "adapter.r=3", "hydra.run.dir=gone/deep", "+hydra.job.env_set.LORA_FT_TEST=set"]
    assert composition.run(composition.CommandLine("check", typed), main, lambda sweep: 0) == 0
    assert calls == [(3, tmp_path / "gone" / "deep", [rows, "adapter.r=3"], "set")]
    assert not Path("gone").exists()

    def memory(*_: Any) -> None:
        raise MemoryError

    with pytest.raises(ResourceError, match="out of memory: lower train"):
        composition.run(composition.CommandLine("check", typed), memory, lambda sweep: 0)


def hashes(folder: Path) -> list[str]:
    """Return the sha256 of each job's adapter, empty if it has none."""
    jobs = sorted(path for path in folder.iterdir() if path.name.isdecimal())
    weights = [job / "adapter" / "adapter_model.safetensors" for job in jobs]
    return [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in weights]


def command(launcher: str, *overrides: str) -> Path:
    """Run a sweep in processes of one thread each; joblib and submitit send the task to theirs by cloudpickle."""
    line = [
        sys.executable,
        "-m",
        "lora_ft",
        "sweep",
        *overrides,
        f"hydra/launcher={launcher}",
        f"hydra.sweep.dir={launcher}",
    ]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (3 if any(Path(launcher).glob("*/failure.json")) else 0), done.stderr
    return Path(launcher)


@pytest.fixture
def small(rows: str, tmp_path: Path) -> tuple[str, ...]:
    return (f"model.path={tiny_folder(tmp_path, 'llama')}", rows, "data.eval_fraction=0.4", "train.max_steps=2",
            "device=cpu")  # fmt: skip


def test_basic_launcher_trains_the_same_adapters(small) -> None:
    ours = command("lora_ft", *small, "adapter.r=2,4")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert call("sweep", *small, "adapter.r=2,4", "hydra/launcher=basic", "hydra.sweep.dir=basic") == 0
    finally:
        torch.set_num_threads(threads)
    assert hashes(Path("basic")) == hashes(ours)
    assert len({*hashes(ours), ""}) == 3


@pytest.mark.nightly
@pytest.mark.closes("E01")
def test_joblib_launcher_trains_the_same_adapters_and_keeps_failures(small) -> None:
    ours = command("lora_ft", *small, "adapter.r=2,4")
    joblib = command("joblib", *small, "adapter.r=2,0,4", "hydra.launcher.n_jobs=2")
    two, four = hashes(ours)
    assert hashes(joblib) == [two, "", four]
    failure = runs.read_failure(joblib / "1")
    assert failure and failure["exit_code"] == 2 and "adapter.r must be at least 1, got 0" in failure["message"]
    assert runs.read_result(joblib / "2")["eval_loss"] == runs.read_result(ours / "1")["eval_loss"]


@pytest.mark.nightly
def test_submitit_launcher_trains_the_same_adapter(small) -> None:
    ours, submitit = (command(launcher, *small, "adapter.r=2") for launcher in ("lora_ft", "submitit_local"))
    assert hashes(submitit) == hashes(ours) != [""]
