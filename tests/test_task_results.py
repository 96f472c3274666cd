"""Results of the tasks: the commands of docs/tasks.md, figures of the run's files, the table between markers."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from sweep_folders import metrics

from lora_ft.io import durable

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "tasks"))

import curves  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402


def result(seed: int, adapter: float, **changes: object) -> table.Result:
    metric = {"base": 0.1, "base_interval": [0.05, 0.15], "adapter": adapter,
              "adapter_interval": [adapter - 0.1, adapter + 0.1]}  # fmt: skip
    return {
        "recipe": "summarize", "variant": "adapter", "seed": seed, "eval_rows": 150, "tokens": 20_000 + seed,
        "train_seconds": 100.0, "peak_memory_bytes": 1.9e9, "metrics": {"loss": {"adapter": 2.0}, "rouge_l": metric},
    } | changes  # fmt: skip


def test_commands_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    shown = set(re.findall(r"^lora-ft (.*)$", page, re.MULTILINE))
    for recipe in run.RECIPES:
        train, evaluation = run.commands(recipe, "adapter", 3, Path(recipe), [])
        train = [word for word in train if not word.startswith(("seed=", "train.samples="))]
        evaluation = [word for word in evaluation if not word.startswith("eval.samples=")]
        assert " ".join(train) in shown
        assert {" ".join(sorted(evaluation))} <= {" ".join(sorted(line.split())) for line in shown}


def test_result_has_the_figures_of_the_run_and_intervals_of_its_answers(tmp_path: Path) -> None:
    samples = [{"reference": "a", "base": "b", "adapter": f"{'ab'[n % 2]} "} for n in range(20)]
    losses = {"base": {"loss": 3.0, "perplexity": 20.1, "exact_match": 0.0},
              "adapter": {"loss": 2.0, "perplexity": 7.4, "exact_match": 0.5}}  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps({**losses, "rows": 20, "samples": samples}))
    kept = {"steps": 5, "tokens": 99, "train_seconds": 1.5, "tokens_per_second": 66.0, "peak_memory_bytes": 7,
            "trainable_parameters": 3}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(kept))
    found = run.collected("answer", "adapter", 1, tmp_path)
    assert found.items() >= {"recipe": "answer", "seed": 1, "eval_rows": 20, **kept}.items()
    metric = found["metrics"]["exact_match"]
    assert (metric["base"], metric["adapter"], metric["base_interval"]) == (0.0, 0.5, (0.0, 0.0))
    assert metric["adapter_interval"][0] < 0.5 < metric["adapter_interval"][1]


def test_result_replaces_the_one_of_the_same_seed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for seed, value in ((1, 0.5), (0, 0.4), (1, 0.6)):
        run.add(path, result(seed, value))
    assert [(r["seed"], r["metrics"]["rouge_l"]["adapter"]) for r in run.read_results(path)] == [(0, 0.4), (1, 0.6)]


def test_table_has_means_intervals_and_the_range_of_the_seeds(tmp_path: Path) -> None:
    tfidf = {"recipe": "topic", "variant": "tfidf", "seed": 0, "eval_rows": 300, "train_rows": 2000, "train_seconds": 9,
             "metrics": {"accuracy": {"adapter": 0.75, "adapter_interval": [0.7, 0.8]}}}  # fmt: skip
    lines = table.markdown([result(0, 0.4), result(1, 0.6), tfidf]).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:5] == ["summarize", "rouge_l", "0.100 (0.050 to 0.150)", "adapter"]
    assert cells[5:8] == ["0.500 (0.400 to 0.600); seeds 0.400 to 0.600", "2", "150"]
    assert lines[3] == "| topic | accuracy |  | TF-IDF | 0.750 (0.700 to 0.800) | 1 | 300 | 2,000 rows | 9 s |  |  |"
    page = tmp_path / "page.md"
    durable.write_text(page, f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write([tfidf], page)
    assert page.read_text("utf-8") == f"before\n{table.BEGIN}\n{table.markdown([tfidf])}\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="must hold the markers"):
        table.write([tfidf], ROOT / "README.md")


def test_table_of_the_page_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    assert table.markdown(run.read_results(run.RESULTS)) in page


def test_curves_are_those_of_the_runs_and_seeds_share_a_panel(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("topic-adapter-0", "topic-adapter-12", "answer-adapter-0")]
    for folder in folders:
        folder.mkdir()
        metrics(folder, steps=8, begin=3.0, end=2.0, evaluations=2)
    train, evaluated = curves.losses(folders[0])
    assert [step for step, _ in train] == list(range(1, 9)) and evaluated[0] == (0, 3.0) and len(evaluated) == 3
    figure = curves.draw(folders)
    assert [(axes.get_title(), len(axes.lines)) for axes in figure.axes] == [
        ("topic-adapter", 4),
        ("answer-adapter", 2),
    ]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [list(point) for point in evaluated]
    together = curves.draw(folders, together=True)
    assert [len(axes.lines) for axes in together.axes] == [6]
    assert [text.get_text() for text in together.axes[0].get_legend().get_texts()] == [f.name for f in folders]
    assert curves.main([str(tmp_path / "a.png"), *map(str, folders)]) == 0
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and len(picture.getcolors()) > 2
