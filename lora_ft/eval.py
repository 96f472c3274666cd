"""Compare base and adapter on held-out rows: the run's own split, or rows given with data=.

lora-ft eval run=runs/2026-11-23_10-15-00 eval.metrics=[exact_match,chrf]

                     base   adapter
    held-out loss   3.1420    2.0870  nats per token       -> and eval.json in the run folder:
    perplexity     23.1500    8.0600  113 tokens of 12 rows   {"base": {"loss": 3.142, ...}, "adapter": {...}, ...}
"""

import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_ft import config, durable, entry
from lora_ft.adapters import files, source
from lora_ft.data.prepare import Dataset, prepare
from lora_ft.errors import DataError
from lora_ft.evaluation import metrics
from lora_ft.evaluation.compare import Comparison, compare, render
from lora_ft.evaluation.heldout import Heldout
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.token_loss import choose_paths
from lora_ft.training.learner import evaluation_rows

log = logging.getLogger("lora_ft")

Scores = dict[str, float]


def main(cfg: config.EvalRun, invocation: entry.Invocation) -> float:
    """Print the comparison, write eval.json into the run folder if there is one, and return the adapter's loss."""
    metrics.check(cfg.eval.metrics)
    keep_freed_memory()
    adapter = source.adapter_folder(cfg.run, cfg.adapter_path)
    tokenizer = source.adapter_tokenizer(adapter, cfg.model)
    dataset = prepare(cfg.data, tokenizer)
    rows, questions = evaluation_rows(dataset, cfg.eval.rows or len(dataset.heldout))
    if not rows:
        raise DataError("no row is held out: set data.eval_fraction above 0, or data.eval_path=FILE")
    if cfg.eval.metrics and not questions:
        raise DataError("eval.metrics needs questions and answers, and the held-out rows are plain text")
    _say_other_rows(adapter, dataset)
    base, model = source.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    comparison = compare(
        model,
        tokenizer,
        rows,
        questions,
        choose_paths(base.model, cfg.fast),
        cfg.eval.tokens_per_microbatch,
        len(questions) if cfg.eval.metrics else cfg.eval.samples,
        cfg.eval.max_new_tokens,
    )
    scores = _scores(comparison, cfg.eval.metrics, dataset.answers)
    shown = replace(comparison, answers=comparison.answers[: cfg.eval.samples])
    facts = {}
    if cfg.run:
        path = Path(cfg.run).expanduser() / "eval.json"
        durable.write_json(path, _record(shown, scores, dataset))
        facts["written to"] = str(path)
    Console().print(render(shown, facts, {name: (scores[0][name], scores[1][name]) for name in scores[0]}))
    return comparison.adapter.loss


def _say_other_rows(adapter: Path, dataset: Dataset) -> None:
    """Rows other than the run's own may hold some that it learned, and then its loss looks better than it is."""
    record = adapter / files.RECORD
    if record.is_file() and json.loads(record.read_text("utf-8"))["data_sha256"] != dataset.report.sha256:
        log.warning(
            "these rows, or their split, are not the run's own: where rows that it was trained on are among "
            "them, the figures mean little"
        )


def _scores(comparison: Comparison, names: list[str], labels: list[str] | None) -> tuple[Scores, Scores]:
    """The metrics of the base's answers and of the adapter's."""
    if not names:
        return {}, {}
    references = [a.reference for a in comparison.answers]
    base, adapter = [a.base for a in comparison.answers], [a.adapter for a in comparison.answers]
    return metrics.scores(names, base, references, labels), metrics.scores(names, adapter, references, labels)


def _record(comparison: Comparison, scores: tuple[Scores, Scores], dataset: Dataset) -> dict[str, Any]:
    """What eval.json holds: losses in nats per token, the hash of the rows, and the answers that were shown."""
    return {
        "base": _losses(comparison.base) | scores[0],
        "adapter": _losses(comparison.adapter) | scores[1],
        "tokens": comparison.adapter.tokens,
        "rows": comparison.adapter.rows,
        "data_sha256": dataset.report.sha256,
        "samples": [asdict(answers) for answers in comparison.answers],
    }


def _losses(heldout: Heldout) -> dict[str, float | None]:
    """JSON has no infinity: a perplexity beyond all floats is null."""
    return {name: value if math.isfinite(value) else None
            for name, value in (("loss", heldout.loss), ("perplexity", heldout.perplexity))}  # fmt: skip


if __name__ == "__main__":
    entry.run("eval")
