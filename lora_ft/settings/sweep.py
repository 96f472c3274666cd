"""Settings of a sweep and of its launcher."""

from dataclasses import dataclass

from lora_ft.settings.setting import setting


@dataclass(slots=True)
class Sweep:
    halving: bool = setting(False, "successive halving: stop jobs with a high eval loss early (arXiv 1502.07943)")
    eta: int = setting(3, "halving: keep one in eta jobs at each rung", at_least=2)
    min_steps: int = setting(
        20, "halving: steps before the first rung; each later rung is eta times as far", unit="steps", at_least=1
    )


@dataclass(slots=True)
class Launcher:
    """Settings of the launcher that runs the jobs of a sweep: `hydra.launcher.*`."""

    share_base: bool = setting(True, "train compatible jobs on one loaded base, or each in a process of its own")
    executor: str = setting("local", "where jobs run; local: one process per device", text=True)
    devices: list[str] = setting([], "CUDA device numbers, one process each; []: all visible devices")
    job_timeout: float | None = setting(
        None, "kill a job without progress (a step, loading, or its end) for this long", unit="seconds", above=0
    )
