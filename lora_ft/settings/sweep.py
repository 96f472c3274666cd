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
    """Settings of the launcher that runs the jobs of a sweep: `hydra.launcher.*`.

    Each executor honours some of them and refuses the others. A group is the jobs that share a base, or a part of them.
    """

    share_base: bool = setting(True, "train compatible jobs on one loaded base, or each in a process of its own")
    executor: str = setting(
        "local", "where groups of jobs run: local (one process per device), slurm or ray", text=True
    )
    devices: list[str] = setting([], "local: CUDA device numbers, one process each; []: all visible devices")
    job_timeout: float | None = setting(
        None, "kill a job without progress (a step, loading, or its end) for this long", unit="seconds", above=0
    )
    max_running: int = setting(
        1, "slurm, ray: groups submitted at once; larger groups are cut to fill them", unit="groups", at_least=1
    )
    gpus: int | None = setting(
        None, "slurm, ray: GPUs of a group, which trains on one; null: 1, or 0 with device=cpu", at_least=0, at_most=1
    )
    cpus: int | None = setting(None, "slurm, ray: CPUs of a group; null: the cluster's default", at_least=1)
    memory: float | None = setting(
        None, "slurm, ray: memory of a group; null: the cluster's default", unit="GiB", above=0
    )
    retries: int = setting(
        3, "slurm, ray: times that a job starts again from one checkpoint after its machine was lost", at_least=0
    )
    partition: str | None = setting(None, "slurm: partition; null: the cluster's default", text=True)
    time_limit: int | None = setting(
        None, "slurm: a group that takes longer is requeued; null: the partition's default", unit="minutes", at_least=1
    )
    notice: int = setting(
        120, "slurm: time before the limit at which a group saves and is requeued", unit="seconds", at_least=1
    )
    extra: list[str] = setting([], "slurm: further flags of sbatch, as in ['--account=lab']")
    address: str | None = setting(
        None, "ray: address of a cluster: auto, HOST:PORT or ray://HOST:PORT; null: this machine", text=True
    )
