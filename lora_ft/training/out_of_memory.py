"""Out of memory during a training: repeat the step in smaller micro-batches, or stop with advice.

    train.on_oom=shrink    forward or backward fails    free the step -> halve the micro-batch -> repeat the step
    train.on_oom=stop      anything fails               free the run  -> ResourceError: what was used, what to change

A repeated step starts from zero gradients, so its result differs by rounding alone (and by the masks of dropout, which
are drawn for each micro-batch). An error in the optimizer always stops the run: part of the update may be done.
"""

import contextlib
import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lora_ft import config, errors
from lora_ft.data.packing import micro_batches
from lora_ft.training.state import TrainingState

log = logging.getLogger("lora_ft")

Found = TypeVar("Found")


@contextlib.contextmanager
def out_of_memory_as_error(explain: Callable[[], str] | None = None) -> Iterator[None]:
    """Raise ResourceError for an out-of-memory error of the block, and free what its frames hold.

    `explain` is called when all is freed, and its text replaces the usual advice.
    """
    try:
        yield
    except Exception as error:
        if (usual := errors.out_of_memory("train", error)) is None:
            raise
        _free(error)
        reason = errors.out_of_memory_reason(error)
    else:
        return
    # Outside of the handler, which holds the error.
    _collect()
    raise (errors.ResourceError(f"{reason}: {explain()}") if explain else usual) from None


def repeated(state: TrainingState, compute: Callable[[], Found]) -> Found:
    """Return compute(), called again with half the micro-batch after each out-of-memory error, if train.on_oom=shrink.

    The error is raised if the micro-batch cannot be smaller. What was computed must not have changed the state.
    `compute` must not be a closure: the frames of an error keep its variables even when they are cleared.
    An error on another rank repeats the call too. With a sharded base an error ends the run: the other ranks wait for
    this one in the middle of a pass.
    """
    while True:
        found, reason = None, None
        try:
            found = compute()
        except Exception as error:
            if not errors.out_of_memory("train", error) or _smaller(state) is None:
                raise
            reason = errors.out_of_memory_reason(error)
            _free(error)
        reason = _first_reason(state, reason)
        if reason is None:
            assert found is not None
            return found
        found, smaller = None, _smaller(state)
        assert smaller is not None  # the same on all ranks
        _collect()
        state.tokens_per_microbatch, state.shrinks = smaller, state.shrinks + 1
        if state.ranks.is_main:
            step, tokens = state.step + 1, f"{smaller:,}"
            log.warning("%s: step %d is repeated in micro-batches of at most %s tokens", reason, step, tokens)


def _may_shrink(state: TrainingState) -> bool:
    return state.cfg.train.on_oom is config.OnOom.shrink and state.packs and not state.ranks.shards


def _first_reason(state: TrainingState, reason: str | None) -> str | None:
    """Return the reason of the first rank that ran out of memory, None if none did."""
    for rank, each in enumerate(state.ranks.gathered(reason) if _may_shrink(state) else []):
        if each is not None:
            return f"rank {rank}: {each}" if rank else str(each)
    return None


def _smaller(state: TrainingState) -> int | None:
    """Return half the largest micro-batch of the step, at least the longest row; None if it must not or cannot shrink.

    Half of the setting would be the same micro-batches again in a step that does not fill them.
    """
    if not _may_shrink(state):
        return None
    batches = micro_batches(state.documents(), state.tokens_per_microbatch, state.packs)
    largest = max(len(batch.ids) for batch in batches)
    smaller = max(largest // 2, state.longest)
    return smaller if smaller < largest else None


def _free(error: Exception) -> None:
    """Clear the variables of the functions that an error passed through.

    An exception keeps them, and with them all activations of the step, for as long as a caller has the exception:
    later work would run with less memory.
    """
    traceback.clear_frames(error.__traceback__)


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
