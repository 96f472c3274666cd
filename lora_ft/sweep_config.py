"""Settings of a sweep and of its launcher, part of `config.py`. No torch here."""

from dataclasses import dataclass

from lora_ft.setting import setting


@dataclass
class Sweep:
    halving: bool = setting(False, "stop the jobs of a shared base that have the higher eval losses (arXiv 1502.07943)")
    eta: int = setting(3, "halving: at each rung, one job in so many continues", at_least=2)
    min_steps: int = setting(
        20, "halving: steps before the first rung; each next rung is at eta times as many", unit="steps", at_least=1
    )


@dataclass
class Launcher:
    """Settings of the launcher that runs the jobs of a sweep: `hydra.launcher.*`."""

    share_base: bool = setting(
        True, "train compatible jobs one after the other on one loaded base; false: each job in its own process"
    )
    executor: str = setting("local", "where jobs run; local: a process on each device of this machine", text=True)
    devices: list[str] = setting([], "numbers of the CUDA devices to use, one process on each; []: all visible ones")
    job_timeout: float | None = setting(
        None, "longest time that loading, one step, or the end of a job may take", unit="seconds", above=0
    )
