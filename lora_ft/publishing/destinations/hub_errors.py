"""Errors of the hub's client: retried if that can help, else turned into errors of lora_ft.

429, 500, a broken connection    -> again after 1, 4 and 16 s; then ResourceError
no token, or one without rights  -> ResourceError with the remedy
412: somebody else committed     -> ConfigError, as for any other refusal of the hub, with its reason
"""

import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lora_ft.errors import ConfigError, LoraFtError, ResourceError

log = logging.getLogger("lora_ft")

_BUSY = {408, 429, 500, 502, 503, 504}
_WAITS = (1, 4, 16, None)  # seconds, in addition to the client's own retries
_Result = TypeVar("_Result")


def retried(destination: str, action: Callable[[], _Result]) -> _Result:
    """Call a repeatable action, again if the hub is busy, fails or closes the connection; raises errors of lora_ft."""
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            # The client wraps errors of large files into a RuntimeError.
            cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            explained = _explained(destination, cause)
            if explained is None:
                raise
            response: Any = getattr(cause, "response", None)
            is_transient = isinstance(cause, _broken()) and (response is None or response.status_code in _BUSY)
            if wait is None or not is_transient:
                raise explained from cause
            log.info("retrying in %d s: %s", wait, cause)
        time.sleep(wait)
    raise AssertionError  # the last wait is None


def _broken() -> tuple[type[Exception], ...]:
    """Return the error classes of refusals, failed connections and answers that are not the hub's."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.LocalEntryNotFoundError, json.JSONDecodeError  # type: ignore[attr-defined]


def _explained(destination: str, error: BaseException) -> LoraFtError | None:
    """Return the error of lora_ft for one of the client, with the hub's reason and the remedy; None for any other."""
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return ConfigError(f"HF_HUB_OFFLINE is set: unset it to reach {destination}")
        case errors.LocalTokenNotFoundError():
            return ResourceError("no login for the hub: set HF_TOKEN, or log in with: hf auth login")
        case errors.HfHubHTTPError():
            return _refusal(destination, error)
        case ValueError() if "Invalid metadata in README.md" in str(error):
            reasons = "; ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:])
            return ConfigError(f"the hub refuses the model card: {reasons}")
        case _ if isinstance(error, _broken()):
            return ResourceError(f"{destination} cannot be reached ({error}): publish again")
    return None


def _refusal(destination: str, error: Any) -> LoraFtError:
    status = error.response.status_code
    reason = error.server_message or str(error).strip().splitlines()[0]
    match status:
        case 401:
            return ResourceError(
                f"the hub does not know this token ({reason}): set HF_TOKEN, or log in with: hf auth login"
            )
        case 403:
            return ResourceError(f"this token may not write to {destination}: {reason}")
        case 409 | 412:
            return ConfigError(f"somebody else has changed {destination} in the meantime: look at it and publish again")
        case _ if status in _BUSY:
            return ResourceError(f"{destination}: the hub answers {status} ({reason}): publish again")
    return ConfigError(f"the hub refuses {destination} ({status}): {reason}")
