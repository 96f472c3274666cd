"""The setting in which a stage runs, and the conversion of an error of one part into its result. No torch here."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Part = tuple[str, dict[str, Any]]


class NotHere(Exception):
    """A measurement that this machine cannot make, such as one of a package that is not installed."""


@dataclass(frozen=True)
class Setting:
    """work: folder of bases and runs, which all stages share. dry: tiny shapes on the CPU."""

    work: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda:0"

    def sized(self, full: Any, tiny: Any) -> Any:
        """Return the size of a real measurement, or that of a dry run."""
        return tiny if self.dry else full


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the figures of a part, or the reason why there are none; free the memory that it took."""
    try:
        return function(*arguments)
    except NotHere as error:
        return {"skipped": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).strip()[:400]} ({Path(where.filename).name}:{where.lineno})"
        # The frames hold the tensors of the failed part.
        traceback.clear_frames(error.__traceback__)
        return {"failed": reason}
    finally:
        release_memory()


def release_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
