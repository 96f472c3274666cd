"""Errors of the hub's client: retried where that can help, else turned into errors of ours.

429, 500, a broken connection    -> again after 1, 4 and 16 s; then ResourceError: publish again
no token, or one without rights  -> ResourceError with the remedy
412: somebody else committed     -> ConfigError, as for any other refusal of the hub, with its reason
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
_WAITS = (1, 4, 16)  # seconds, in addition to the client's own retries
_Result = TypeVar("_Result")


def retried(act: Callable[[], _Result]) -> _Result:
    """Call a repeatable action, again if the hub is busy, fails or closes the connection."""
    waits = list(_WAITS)
    while True:
        try:
            with _unwrapped():
                return act()
        except _broken() as error:
            response = getattr(error, "response", None)
            if not waits or (response is not None and response.status_code not in _BUSY):
                raise
            log.info("retrying in %d s: %s", waits[0], error)
        time.sleep(waits.pop(0))


@contextlib.contextmanager
def explained(destination: str) -> Iterator[None]:
    """Turn errors of the client into ours, with the reason that the hub gave and the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ConfigError(f"HF_HUB_OFFLINE is set: unset it to reach {destination}") from None
    except errors.LocalTokenNotFoundError:
        raise ResourceError("no login for the hub: set HF_TOKEN, or log in with: hf auth login") from None
    except errors.HfHubHTTPError as error:
        raise _refusal(destination, error) from error
    except _broken() as error:
        raise ResourceError(f"{destination} cannot be reached ({error}): publish again") from None


def _broken() -> tuple[type[Exception], ...]:
    """Return the error classes of refusals, failed connections and answers that are not the hub's."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.LocalEntryNotFoundError, json.JSONDecodeError  # type: ignore[attr-defined]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the cause of a RuntimeError, into which the client wraps errors of large files."""
    try:
        yield
    except RuntimeError as error:
        raise error.__cause__ or error from None


def _refusal(destination: str, error: Any) -> LoraFtError:
    status = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    match status:
        case 401:
            return ResourceError(
                f"the hub does not know this token ({said}): set HF_TOKEN, or log in with: hf auth login"
            )
        case 403:
            return ResourceError(f"this token may not write to {destination}: {said}")
        case 409 | 412:
            return ConfigError(f"somebody else has changed {destination} in the meantime: look at it and publish again")
        case _ if status in _BUSY:
            return ResourceError(f"{destination}: the hub answers {status} ({said}): publish again")
    return ConfigError(f"the hub refuses {destination} ({status}): {said}")
