"""Turn an out-of-memory error into an error with advice, and free what it holds."""

import contextlib
import gc
import traceback
from collections.abc import Iterator

import torch

from lora_ft.errors import out_of_memory


@contextlib.contextmanager
def out_of_memory_as_error() -> Iterator[None]:
    """Raise ResourceError for an out-of-memory error of the block, and free what its frames hold.

    The traceback of an exception keeps the variables of its functions, and with them all activations of the step, for
    as long as a caller has the exception: later work would run with less memory.
    """
    try:
        yield
    except Exception as error:
        if (advice := out_of_memory("train", error)) is None:
            raise
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise advice from None
