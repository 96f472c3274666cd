"""Settings of a sweep and of its launcher, part of `config.py`. No torch here."""

from dataclasses import dataclass

from lora_ft.setting import setting


@dataclass
class Sweep:
    halving: bool = setting(False, "stop the jobs of a shared base whose eval loss falls behind (arXiv 1502.07943)")
    eta: int = setting(3, "halving: one in so many goes on at each rung", at_least=2)
    min_steps: int = setting(
        20, "halving: steps before the first rung; each further rung is eta times as far", unit="steps", at_least=1
    )


@dataclass
class Launcher:
    """Settings of the launcher that runs the jobs of a sweep: `hydra.launcher.*`."""

    share_base: bool = setting(True, "train compatible jobs on one loaded base, or each in a process of its own")
    executor: str = setting("local", "what runs the jobs: local, a process on each device", text=True)
    devices: list[str] = setting([], "CUDA devices, by number; one process on each; []: all that are visible")
    job_timeout: float | None = setting(
        None, "longest time that a step of a job, its loading or its end may take", unit="seconds", above=0
    )
