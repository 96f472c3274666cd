"""The labels of an adapter in lora_ft.json, and the temperature that was fitted to their probabilities.

{"labels": ["negative", "positive"], "calibration": {"temperature": 1.7, "rows": 400, "data_sha256": "..."}, ...}
"""

from pathlib import Path
from typing import Any

from lora_ft.adapters import provenance
from lora_ft.errors import MismatchError
from lora_ft.io import durable, untrusted

KEYS = ("labels", "calibration")  # of lora_ft.json


def labels(adapter: Path) -> list[str] | None:
    """Return the labels that an adapter was trained to choose from; None if it has no record of any."""
    found = _record(adapter).get("labels")
    if found is None or (isinstance(found, list) and len(found) > 1 and all(isinstance(each, str) for each in found)):
        return found
    raise MismatchError(f"{adapter / provenance.RECORD}: labels must be a list of texts, got {found}")


def temperature(adapter: Path) -> float | None:
    """Return the temperature that `eval.calibrate=true` stored; None without one."""
    calibration = _record(adapter).get("calibration")
    if calibration is None:
        return None
    found = calibration.get("temperature") if isinstance(calibration, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e6:
        raise MismatchError(f"{adapter / provenance.RECORD}: calibration must have a temperature above 0, got {found}")
    return float(found)


def store_temperature(adapter: Path, found: float, rows: int, data_sha256: str) -> None:
    """Store a temperature with the number of rows that it was fitted on, and their hash."""
    calibration = {"temperature": found, "rows": rows, "data_sha256": data_sha256}
    durable.write_json(adapter / provenance.RECORD, provenance.read_record(adapter) | {"calibration": calibration})


def _record(adapter: Path) -> dict[str, Any]:
    path = adapter / provenance.RECORD
    untrusted.check_place(path, adapter)
    return provenance.read_record(adapter) if path.is_file() else {}
