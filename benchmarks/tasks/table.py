"""Write the results of the tasks as a Markdown table between two markers of docs/tasks.md."""

from pathlib import Path
from statistics import mean
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
BEGIN = "<!-- results: begin (python benchmarks/tasks/run.py --table writes it) -->"
END = "<!-- results: end -->"

Result = dict[str, Any]
NAMES = {"adapter": "adapter", "head": "classifier head", "tfidf": "TF-IDF"}
HIDDEN = {"loss", "perplexity"}  # shown only where a recipe has no other metric
HEAD = ["task", "metric", "base", "model", "result", "seeds", "eval rows", "tokens", "training", "CPU", "memory"]


def rows(results: list[Result]) -> list[list[str]]:
    """Return the cells of the table: a line for each variant and metric of a recipe."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["recipe"], result["variant"]), []).append(result)
    return [_row(name, variant, runs, m) for (name, variant), runs in groups.items() for m in _metrics(runs[0])]


def _metrics(result: Result) -> list[str]:
    return [name for name in result["metrics"] if name not in HIDDEN]


def _row(recipe: str, variant: str, runs: list[Result], metric: str) -> list[str]:
    first = runs[0]
    tokens = f"{mean(r['tokens'] for r in runs):,.0f}" if "tokens" in first else f"{first['train_rows']:,} rows"
    cpu = [r["cpu_seconds"] for r in runs if "cpu_seconds" in r]
    memory = f"{max(r['peak_memory_bytes'] for r in runs) / 1e9:.1f} GB" if "tokens" in first else ""
    base = "" if variant == "head" else value(metric, "base", runs[:1])  # an untrained head is no classifier
    return [
        recipe, metric, base, NAMES.get(variant, variant.replace("tfidf", "TF-IDF,")),
        value(metric, "adapter", runs), str(len(runs)), str(first["eval_rows"]), tokens,
        f"{mean(r['train_seconds'] for r in runs):.0f} s", f"{mean(cpu):.0f} s" if cpu else "", memory,
    ]  # fmt: skip


def value(metric: str, side: str, runs: list[Result]) -> str:
    """Return the mean over the seeds, the mean bounds of their intervals, and the lowest and highest seed."""
    found = [r["metrics"][metric] for r in runs]
    if found[0].get(side) is None:
        return ""
    digits = 1 if metric.startswith("perplexity") or metric in ("chrf", "bleu") else 3
    text = f"{mean(f[side] for f in found):.{digits}f}"
    if f"{side}_interval" in found[0]:
        low, high = (mean(f[f"{side}_interval"][i] for f in found) for i in (0, 1))
        text += f" ({low:.{digits}f} to {high:.{digits}f})"
    if len(runs) > 1:
        text += f"; seeds {min(f[side] for f in found):.{digits}f} to {max(f[side] for f in found):.{digits}f}"
    return text


def markdown(results: list[Result]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: list[Result], page: Path = PAGE) -> None:
    """Replace the table between the markers of the page."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold the markers of the table once: {BEGIN} ... {END}")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{rest.partition(END)[2]}", "utf-8")
