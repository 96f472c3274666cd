"""hydra/launcher=lora_ft: run the jobs of a sweep in worker processes, in which jobs share a base where they can.

Every Hydra program on the machine imports this file, so heavy imports wait until jobs are launched. The task of another
program runs in this process, job by job, as with hydra/launcher=basic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, env_override, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lora_ft import config, runs, validation
from lora_ft.errors import ConfigError

if TYPE_CHECKING:
    from lora_ft.cli.tasks import Task


@dataclass
class LauncherConf(config.Launcher):
    _target_: str = "hydra_plugins.lora_ft_launcher.LoraFtLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="lora_ft", node=LauncherConf, provider="lora_ft")


class LoraFtLauncher(Launcher):
    """Composes the config of each job for Hydra, has the jobs run, and returns the value of each."""

    def __init__(self, **settings: Any) -> None:
        self._settings = config.Launcher(**settings)
        validation.validate(self._settings, "hydra.launcher.")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lora_ft.cli.tasks import Task

        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        composed = [self._composed(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        if isinstance(self._task, Task) and self._task.command == "sweep":
            return self._launched(self._task, composed)
        return [self._run_here(job, self._task) for job in composed]

    def _composed(self, overrides: Sequence[str], number: int) -> DictConfig:
        composed: DictConfig = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        return composed

    def _run_here(self, composed: DictConfig, task: TaskFunction) -> JobReturn:
        returned = run_job(
            hydra_context=self._context,
            task_function=task,
            config=composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        return returned

    def _launched(self, task: "Task", composed: list[DictConfig]) -> list[JobReturn]:
        """Run the jobs of lora_ft. Hydra calls a task that returns a job's plan; the job's value replaces it later.

        A wrong setting in a typed grid ends the sweep before it begins. With other sweepers, which choose values
        themselves, it fails the job only.
        """
        from lora_ft.cli.tasks import FAILED
        from lora_ft.sweeps import jobs
        from lora_ft.sweeps.launch import launch

        returns = {job.hydra.job.num: self._run_here(job, task.plan) for job in composed}
        wrong = {n: r._return_value for n, r in returns.items() if r.status is JobStatus.FAILED}
        if wrong and self._config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            raise ConfigError("\n".join(map(str, wrong.values())))
        folders = {job.hydra.job.num: Path(str(job.hydra.runtime.output_dir)) for job in composed}
        for number, error in wrong.items():
            runs.fail(folders[number], error, list(returns[number].overrides or []))
        plans = {n: r._return_value for n, r in returns.items() if n not in wrong}
        planned = [jobs.Job(n, plan.folder, jobs.train_config(plan.cfg), plan.overrides) for n, plan in plans.items()]
        values: dict[int, float | None] = {}
        if planned:
            sweep = next(iter(plans.values())).cfg.sweep
            with env_override(self._config.hydra.job.env_set):
                values = launch(planned, sweep, self._settings, Path(str(self._config.hydra.sweep.dir)))
        for number, returned in returns.items():
            returned.status, returned.return_value = JobStatus.COMPLETED, values.get(number, FAILED)
        return list(returns.values())
