"""The peak and the launches that the trace of the real step predicts, for comparison with what is measured."""

from typing import Any

from gpu_stages.setting import NotHere, Setting


def predicted(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """Return `predicted_bytes` and more of the trace's figures for a run; raises NotHere without the trace."""
    try:
        from lora_ft.memory import trace  # noqa: F401
    except ImportError as error:
        raise NotHere(f"trace unavailable: {error}") from None
    raise NotHere("trace unavailable: it is not connected to this benchmark yet")
