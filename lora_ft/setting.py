"""How a setting is declared: its default with meaning, unit and rule, for help, completion, validation. No torch here.

r: int = setting(16, "rank", at_least=1)
"""

from dataclasses import field
from enum import Enum
from typing import Any


class OnResume(Enum):
    """What a resumed run may do with a setting: keep it, raise it, or have another one, as it changes no result."""

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
    """Declare a setting: its default, its meaning for `--help`, its unit and the rule its value obeys.

    `text` marks free text, whose value the command line takes literally; `path` marks such a text that may name a
    place on this machine. `on_resume` says whether a run that is continued may have another value.
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
