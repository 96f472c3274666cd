"""The results of benchmarks/gpu.py as one table in Markdown: for the terminal, and for the README."""

from collections.abc import Iterator
from typing import Any

GIB = 2**30
_MEMORY = ("allocated", "reserved", "driver")
HEADER = ("stage", "part", "tokens/s", *(f"{name} GiB" for name in _MEMORY), "seconds a step", "remark")


def markdown(records: list[dict[str, Any]]) -> str:
    """Return the table: a row for each stage, for each part that measures a training, fails or is skipped."""
    rows = [HEADER, ("---",) * len(HEADER), *(row for record in records for row in _rows(record))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    parts = record.get("parts", {})
    counts = f"{len(parts)} parts, {record['seconds']:.0f} s" if "seconds" in record else ""
    remark = "; ".join(filter(None, [record["outcome"], counts, record["reason"][:200]]))
    yield (record["stage"], "", *[""] * (len(HEADER) - 3), _cell(remark))
    for name in parts:
        part = {**parts.get(f"{name}, traced", {}), **parts[name]}  # the prediction stands beside what was measured
        remark = next((f"{key}: {part[key]}" for key in ("failed", "skipped") if key in part), "")
        remark = remark or str(part.get("summary", ""))
        if "tokens_per_second" in part or remark:
            speed = f"{part['tokens_per_second']:,.0f}" if "tokens_per_second" in part else ""
            memory = (_figure(part, f"{of}_bytes", GIB, 2) for of in _MEMORY)
            yield (record["stage"], name, speed, *memory, _figure(part, "seconds_per_step", 1, 3), _cell(remark[:200]))


def _figure(part: dict[str, Any], name: str, unit: float, digits: int) -> str:
    """Return what was measured, and in parentheses what was predicted and by how much that is off."""
    measured, predicted = part.get(name), part.get(f"predicted_{name}")
    shown = f"{measured / unit:.{digits}f}" if measured else ""
    if not predicted:
        return shown
    difference = f", {predicted / measured - 1:+.1%}" if measured else ""
    return f"{shown} ({predicted / unit:.{digits}f}{difference})".strip()


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
