"""A real Slurm on this machine, from Debian's packages, which are unpacked and not installed.

with started(folder) as bin: ...    # `bin` holds sbatch, squeue, ...; one node with two CPUs, partitions low and high

A batch job in the partition high preempts those in low, which are requeued.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
PluginDir={plugins}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# A requeued job waits for the credentials of its earlier start to expire.
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes={host} PriorityTier=10 State=UP
"""


def unpacked(folder: Path) -> Path:
    """Download and unpack Debian's packages; return their root. Raises CalledProcessError without them."""
    folder.mkdir()
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True, timeout=300)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
    return folder / "root"


def why_not() -> str:
    """Return what a real Slurm lacks here; empty if it can be started."""
    missing = [program for program in ("apt-get", "dpkg") if not shutil.which(program)]
    if missing:
        return f"needs {' and '.join(missing)}: run it on Debian or in a container of it"
    return "" if os.getuid() == 0 else "needs root, as Slurm's daemons do: run it in a container"


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Path]:
    """Start munge, the controller and a node; yield the folder of the programs. All end with the block."""
    found = unpacked(folder)
    root = Path(f"/tmp/slurm-{secrets.token_hex(4)}")  # short: the path of a socket has at most 107 bytes
    programs = root / "bin"
    for path in (root, root / "state", root / "spool", programs):
        path.mkdir()
    _write_programs(found, programs, root)
    _write_conf(found, root)
    daemons = []
    try:
        for command in (["munged", "--foreground", "--force", f"--key-file={root}/key", f"--socket={root}/munge.socket",
                         f"--pid-file={root}/munge.pid", f"--log-file={root}/munge.log", f"--seed-file={root}/seed"],
                        ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-d", programs / "slurmstepd"]):  # fmt: skip
            with (root / f"{command[0]}.out").open("w") as log:
                daemons.append(subprocess.Popen([programs / command[0], *command[1:]], stdout=log, stderr=log,
                                                stdin=subprocess.DEVNULL, start_new_session=True))  # fmt: skip
            if command[0] == "munged":
                _wait_for(lambda: (root / "munge.socket").exists())
        _wait_for(lambda: "idle" in _output(programs / "sinfo", "--noheader", "--format=%T"))
        yield programs
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)
        shutil.rmtree(root)


def _write_programs(found: Path, programs: Path, root: Path) -> None:
    """Write wrappers that find the unpacked libraries, for Slurm's own programs only."""
    libraries = ":".join(sorted({str(path.parent) for path in found.rglob("*.so*")}))
    for name in PROGRAMS:
        path = next(p for end in ("", "-wlm") for p in found.glob(f"usr/*bin/{name}{end}"))
        (programs / name).write_text(
            f'#!/bin/sh\nexport SLURM_CONF={root}/slurm.conf LD_LIBRARY_PATH={libraries}\nexec {path} "$@"\n'
        )
        (programs / name).chmod(0o755)


def _write_conf(found: Path, root: Path) -> None:
    (root / "key").write_bytes(secrets.token_bytes(128))
    (root / "key").chmod(0o400)
    (root / "slurm.conf").write_text(
        CONF.format(
            host=socket.gethostname().partition(".")[0],
            root=root,
            user=pwd.getpwuid(os.getuid()).pw_name,
            plugins=next(found.rglob("auth_munge.so")).parent,
            ports=[_free_port() for _ in range(2)],
        )
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"Slurm did not start in {seconds} s")
        time.sleep(0.3)
