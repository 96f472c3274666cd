"""Run a recipe for several seeds and collect its results from the run's own files.

    python benchmarks/tasks/run.py summarize --seeds 0,1,2        train, evaluate, add to results/tasks.jsonl
    python benchmarks/tasks/run.py topic --variant head           another variant of the recipe
    python benchmarks/tasks/run.py topic --variant tfidf          TF-IDF with logistic regression on the same rows
    python benchmarks/tasks/run.py --table                        write the table of docs/tasks.md

Each run is the two commands of docs/tasks.md, `lora-ft train` and `lora-ft eval`, in processes of their own. A result
replaces that of the same recipe, variant and seed.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import intervals
import table
import tfidf

from lora_ft import metric_table
from lora_ft.io import durable

RESULTS = Path(__file__).resolve().parents[1] / "results" / "tasks.jsonl"
EXAMPLES = 1_000_000  # eval.json then holds every answer


@dataclass(frozen=True)
class Recipe:
    """An experiment: metrics of its eval rows, overrides of `eval`, and overrides of `train` by variant.

    eval_rows: number of the eval rows that are evaluated; None for all.
    """

    metrics: tuple[str, ...] = ()
    eval: tuple[str, ...] = ("data.split=test",)
    eval_rows: int | None = None
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"adapter": ()})


_CLASSES = ("accuracy", "macro_f1")
_OF_CLASSES: dict[str, tuple[str, ...]] = {"adapter": (), "head": ("objective=classification", "data.system=null")}
RECIPES = {
    "sentiment": Recipe(_CLASSES, (), 300, _OF_CLASSES),
    "topic": Recipe(_CLASSES, variants=_OF_CLASSES),
    "intents": Recipe(_CLASSES, variants=_OF_CLASSES),
    "summarize": Recipe(("rouge_l",), ("data.split=test", "eval.max_new_tokens=32")),
    "translate_de": Recipe(("chrf",), ("data.split=test", "eval.max_new_tokens=96")),
    "answer": Recipe(("exact_match",), ("data.split=test", "eval.max_new_tokens=16")),
    "domain": Recipe(eval=()),
}
TFIDF = "tfidf"


def commands(recipe: str, variant: str, seed: int, folder: Path, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of `lora-ft train` and of `lora-ft eval`."""
    found = RECIPES[recipe]
    train = ["train", f"experiment={recipe}", *found.variants[variant], *overrides]
    train += [f"seed={seed}", "train.samples=0", f"hydra.run.dir={folder}"]
    evaluation = ["eval", f"run={folder}", *found.eval]
    evaluation += [f"eval.rows={found.eval_rows}"] if found.eval_rows else []
    generated = [name for name in found.metrics if name not in _CLASSES]
    if not generated:
        return train, [*evaluation, "eval.samples=0"]  # labels are scored, not generated
    return train, [*evaluation, f"eval.samples={EXAMPLES}", f"eval.metrics=[{','.join(generated)}]"]


def run(recipe: str, variant: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate; return the result. A finished run is not trained again."""
    train, evaluation = commands(recipe, variant, seed, folder, overrides)
    trained = {} if (folder / "result.json").exists() else {"cpu_seconds": _lora_ft(train)}
    _lora_ft(evaluation)
    return collected(recipe, variant, seed, folder) | trained


def _lora_ft(overrides: list[str]) -> int:
    """Run a command; return the CPU seconds that it took, which other processes of the machine hardly change."""
    print("lora-ft", *overrides, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lora_ft", *overrides], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def collected(recipe: str, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return a result from result.json and eval.json of a run folder."""
    result, found = (json.loads((folder / name).read_text("utf-8")) for name in ("result.json", "eval.json"))
    values = {
        name: {"base": found["base"].get(name), "adapter": found["adapter"].get(name)}
        for name in ("loss", "perplexity", *RECIPES[recipe].metrics)
    }
    for name, source in found["adapter"].get("sources", {}).items():
        base = found["base"]["sources"][name]
        values[f"perplexity {name}"] = {"base": base["perplexity"], "adapter": source["perplexity"]}
    for name in RECIPES[recipe].metrics:
        for side in ("base", "adapter"):
            if (interval := _interval(name, side, found)) is not None:
                values[name][f"{side}_interval"] = interval
    kept = ("steps", "tokens", "train_seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters")
    return {
        "recipe": recipe, "variant": variant, "seed": seed, "date": f"{datetime.date.today()}",
        "cores": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(), "eval_rows": found["rows"], "metrics": values,
        **{name: result[name] for name in kept},
    }  # fmt: skip


def _interval(name: str, side: str, found: dict[str, Any]) -> Any:
    if "classification" in found:
        classes = found["classification"].get(side)
        return classes and classes["intervals"].get(name)
    if metric_table.METRICS[name].source is not metric_table.Source.answers:
        return None
    answers, references = ([row[key].strip() for row in found["samples"]] for key in (side, "reference"))
    return intervals.of_answers(name, answers, references)


def baseline(recipe: str, overrides: list[str], most_rows: int | None) -> dict[str, Any]:
    """Return the result of TF-IDF in the form of a run's."""
    found = tfidf.baseline(recipe, overrides, most_rows, RECIPES[recipe].eval_rows)
    values = {name: {"adapter": found[name], "adapter_interval": found[f"{name}_interval"]} for name in _CLASSES}
    variant = TFIDF if most_rows is None else f"{TFIDF} {most_rows} rows"
    return {
        "recipe": recipe, "variant": variant, "seed": 0, "date": f"{datetime.date.today()}", "metrics": values,
        "eval_rows": found["eval_rows"], "train_rows": found["train_rows"], "train_seconds": found["seconds"],
    }  # fmt: skip


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def add(path: Path, result: dict[str, Any]) -> None:
    """Add a result to a file of JSON lines, in place of that of the same recipe, variant and seed."""
    key = [result[name] for name in ("recipe", "variant", "seed")]
    others = [r for r in read_results(path) if [r["recipe"], r["variant"], r["seed"]] != key]
    ordered = sorted([*others, result], key=lambda r: (list(RECIPES).index(r["recipe"]), r["variant"], r["seed"]))
    durable.write_text(path, "".join(json.dumps(r) + "\n" for r in ordered))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES))
    parser.add_argument("overrides", nargs="*", help="settings, as for lora-ft train")
    parser.add_argument("--variant", default="adapter", help="adapter, head or tfidf")
    parser.add_argument("--seeds", default="0", help="as in 0,1,2")
    parser.add_argument("--rows", type=int, help="tfidf: number of training rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table of docs/tasks.md")
    given = parser.parse_args(arguments)
    if given.recipe and given.variant == TFIDF:
        add(given.results, baseline(given.recipe, given.overrides, given.rows))
    elif given.recipe:
        for seed in map(int, given.seeds.split(",")):
            folder = (given.runs / f"{given.recipe}-{given.variant}-{seed}").absolute()
            add(given.results, run(given.recipe, given.variant, seed, folder, given.overrides))
    elif not given.table:
        parser.error("give a recipe, or --table")
    if given.table:
        table.write(read_results(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
