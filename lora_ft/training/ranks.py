"""Join the other processes of a run that torchrun or accelerate launch has started, and end together with them.

    torchrun --nproc-per-node=2 -m lora_ft.train dist=ddp ...

    with joined(cfg.dist, cfg.device) as ranks:
        ...

Whatever ends one rank ends all of them, with one message: the rank that fails first writes it, and the others, whose
next collective operation then fails, exit without one.
"""

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import distributed

from lora_ft import config
from lora_ft.config import DistMode
from lora_ft.errors import ConfigError, Interrupted, LoraFtError, LostRank, NonFiniteError, ResourceError
from lora_ft.models.device import resolve_device
from lora_ft.ops.ranks import ALONE, Ranks

log = logging.getLogger("lora_ft")

_FIRST = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")


def num_ranks() -> int:
    """Return the number of processes that a launcher has started for this run, 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check(dist: config.Dist) -> None:
    """Raise ConfigError if a launcher has started several processes and dist.mode=single allows one."""
    if num_ranks() > 1 and dist.mode is DistMode.single:
        raise ConfigError(f"dist=single trains in one process, got WORLD_SIZE={num_ranks()}: set dist=ddp")


@contextlib.contextmanager
def joined(dist: config.Dist, device: str) -> Iterator[Ranks]:
    """Join the other ranks of this run until the block ends; yield ALONE if no launcher has started more processes.

    Raises ConfigError for an incomplete environment or a device that ranks cannot share.
    """
    check(dist)
    if num_ranks() == 1:
        yield ALONE
        return
    ranks = _this_rank(dist)
    store = _connect(ranks, _is_cuda(device), dist.timeout)
    try:
        with _warnings_of(ranks):
            yield ranks
    except (LoraFtError, Interrupted) as error:
        if not _is_first(store, ranks):
            raise SystemExit(error.exit_code) from None
        if not (ranks.is_main or isinstance(error, LostRank | NonFiniteError | Interrupted)):
            error.args = (f"rank {ranks.rank}: {error}",)
        raise
    finally:
        distributed.destroy_process_group()


def _is_first(store: distributed.Store, ranks: Ranks) -> bool:
    """Return True on the first rank that fails, which writes the message."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # without torchrun the main rank keeps the store, and it is the one that was lost
        return ranks.rank == 1


def _this_rank(dist: config.Dist) -> Ranks:
    if missing := [name for name in _FIRST if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={num_ranks()} asks for several processes, but {missing[0]} is not set: start them with "
            "torchrun --nproc-per-node=N -m lora_ft.train ..."
        )
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=num_ranks(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks())),
    )
    return replace(ranks, shards=dist.mode is DistMode.shard)


def _is_cuda(device: str) -> bool:
    """Return True if the ranks train on GPUs; raises ConfigError if there is not one for each of them."""
    if device.startswith("cuda:"):
        raise ConfigError(f"device={device} is one GPU, and each rank needs its own: set device=cuda")
    return resolve_device(device).type == "cuda"


def _connect(ranks: Ranks, is_cuda: bool, timeout_seconds: float) -> distributed.Store:
    """Start the process group: NCCL adds tensors on GPUs, gloo those of the host. Return the store of all ranks."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if is_cuda:
        torch.cuda.set_device(resolve_device("cuda"))
    try:
        store, _, _ = next(distributed.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            store=distributed.PrefixStore("ranks", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise ResourceError(f"rank {ranks.rank} cannot reach the other ranks ({where}): {error}") from error
    return distributed.PrefixStore("lora_ft", store)


@contextlib.contextmanager
def _warnings_of(ranks: Ranks) -> Iterator[None]:
    """Write the warnings of a rank other than the main one to stderr, with its number. Others have their display."""
    if ranks.is_main:
        yield
        return
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"rank {ranks.rank}: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
