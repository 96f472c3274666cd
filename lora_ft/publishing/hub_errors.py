"""What the hub's client raises: asked again where that may help, and told as an error of ours where it does not.

429, 500, a connection that breaks   -> again after 1, 4 and 16 s; then ResourceError: publish again, which goes on
no token, one that may not write     -> ResourceError with the remedy
a 412, as somebody else committed    -> ConfigError; any other refusal of the hub as well, with its words
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lora_ft.errors import ConfigError, LoraFtError, ResourceError

log = logging.getLogger("lora_ft")

_BUSY = {408, 429, 500, 502, 503, 504}
_WAITS = (1, 4, 16)  # seconds; what the client repeats of itself waits beside them
_Result = TypeVar("_Result")


def patiently(act: Callable[[], _Result]) -> _Result:
    """Do what can be done twice; again where the hub is busy, breaks, or hangs up."""
    waits = list(_WAITS)
    while True:
        try:
            with _unwrapped():
                return act()
        except _broken() as error:
            response = getattr(error, "response", None)
            if not waits or (response is not None and response.status_code not in _BUSY):
                raise
            log.info("the hub is asked again in %d s: %s", waits[0], error)
        time.sleep(waits.pop(0))


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
    """The client's errors as ours: what the hub said of this place, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConfigError(f"HF_HUB_OFFLINE is set: unset it to reach {place}") from None
    except errors.LocalTokenNotFoundError:
        raise ResourceError("no login for the hub: set HF_TOKEN, or log in with: hf auth login") from None
    except errors.HfHubHTTPError as error:
        raise _refusal(place, error) from error
    except _broken() as error:
        raise ResourceError(f"{place} cannot be reached ({error}): publish again, which goes on") from None


def _broken() -> tuple[type[Exception], ...]:
    """An error that the hub answers, a connection that fails, an answer that is not the hub's."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.LocalEntryNotFoundError, json.JSONDecodeError  # type: ignore[attr-defined]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """The client wraps what goes wrong with a large file into a RuntimeError: here it is what it was."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ or error from None


def _refusal(place: str, error: Any) -> LoraFtError:
    status = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    match status:
        case 401:
            return ResourceError(f"the hub knows no such token ({said}): set HF_TOKEN, or log in with: hf auth login")
        case 403:
            return ResourceError(f"you may not write to {place} with this token: {said}")
        case 409 | 412:
            return ConfigError(f"somebody else has changed {place} meanwhile: look at it, and publish again")
        case _ if status in _BUSY:
            return ResourceError(f"{place}: the hub answers {status} ({said}): publish again, which goes on")
    return ConfigError(f"the hub refuses {place} ({status}): {said}")
