"""Declaration of a setting: default, meaning, unit and rule, for help, completion and validation. No torch here.

r: int = setting(16, "rank", at_least=1)
"""

from dataclasses import field
from enum import Enum
from typing import Any


class OnResume(Enum):
    """Changes of a setting that a resumed run allows: none, a higher value, or any (it does not change the result)."""

    same = "same"
    higher = "higher"
    free = "free"


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    pattern: str = "",
    text: bool = False,
    path: bool = False,
    on_resume: OnResume = OnResume.same,
) -> Any:
    """Declare a setting with its default, meaning (for `--help`), unit and the rule for its value.

    text: free text, which the command line takes literally. path: free text that may be a local path. on_resume:
    changes that a resumed run allows.
    """
    metadata = {
        "meaning": meaning,
        "unit": unit,
        "text": text or path,
        "path": path,
        "pattern": pattern,
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
        "on_resume": on_resume,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
