"""Compare base and adapter on rows that were not trained on: the run's held-out rows, or others given with data=.

lora-ft eval run=runs/2026-11-23_10-15-00 eval.metrics=[exact_match,chrf]

                     base   adapter
    held-out loss   3.1420    2.0870  nats per token       -> and eval.json in the run folder:
    perplexity     23.1500    8.0600  113 tokens of 12 rows   {"base": {"loss": 3.142, ...}, "adapter": {...}, ...}

Which rows:

    run=F                                     what the run held out, by its own settings
    run=F data.path=TEST (or data.split=...)  all rows of TEST; refused where the run trained on some of them
    ... data.eval_fraction=0.2                that part of the rows, as train would hold it out: typed is typed;
        (or eval_path, eval_split)            rows that the run trained on may be among them, which is said
"""

import json
import logging
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs, validation
from lora_ft.adapters import loading, provenance
from lora_ft.cli import entry, overrides
from lora_ft.data.dataset import Dataset, labels, prepare, prepare_rows
from lora_ft.data.read import Rows, read, read_heldout
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation import metrics
from lora_ft.evaluation.compare import Comparison, compare, render
from lora_ft.evaluation.heldout import Heldout
from lora_ft.io import durable
from lora_ft.models.load import resolve_device
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.kernels import choose_kernels
from lora_ft.training.paths import use_fast_paths
from lora_ft.training.state import evaluation_rows

log = logging.getLogger("lora_ft")

Scores = dict[str, float]


def main(cfg: config.EvalRun, invocation: entry.Invocation) -> float:
    """Print the comparison, write eval.json into the run folder if there is one, and return the adapter's loss."""
    metrics.check(cfg.eval.metrics)
    keep_freed_memory()
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    cfg = loading.with_base(cfg, adapter)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    dataset, told, apart = _rows(cfg, invocation.overrides, tokenizer)
    rows, questions = evaluation_rows(dataset, cfg.eval.rows or len(dataset.heldout))
    if not rows:
        raise DataError("no row is held out: set data.eval_fraction above 0, or data.eval_path=FILE")
    if cfg.eval.metrics and not questions:
        raise DataError("eval.metrics needs questions and answers, and the held-out rows are plain text")
    if not apart:
        _say_other_rows(adapter, dataset)
    kernels = choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    comparison = compare(
        model,
        tokenizer,
        rows,
        questions,
        use_fast_paths(base.model, cfg.fast, kernels),
        cfg.eval.tokens_per_microbatch,
        len(questions) if cfg.eval.metrics else cfg.eval.samples,
        cfg.eval.max_new_tokens,
    )
    scores = _scores(comparison, cfg.eval.metrics, dataset.answers)
    shown = replace(comparison, answers=comparison.answers[: cfg.eval.samples])
    facts = {"evaluated": told}
    if cfg.run:
        path = Path(cfg.run).expanduser() / "eval.json"
        durable.write_json(path, _record(shown, scores, dataset))
        facts["written to"] = str(path)
    Console().print(render(shown, facts, {name: (scores[0][name], scores[1][name]) for name in scores[0]}))
    return comparison.adapter.loss


def _rows(cfg: config.EvalRun, typed: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, str, bool]:
    """The rows to evaluate, what to say of them, and whether it is known that the run did not train on them."""
    own = _own_data(cfg.run)
    data = _given(cfg.data, own, typed)
    same = own is not None and _place(data) == _place(own)
    if same or overrides.chosen(typed, "data.eval_fraction") or data.eval_path or data.eval_split:
        if place := data.eval_path or data.eval_split:
            return prepare(data, tokenizer), f"all rows of {place}", False
        return prepare(data, tokenizer), f"the rows of {data.path} that data.eval_fraction holds out", False
    trained = _read_own(own)
    found = read_heldout(data, trained)
    learned = trained.training_rows if trained else found.rows
    dataset = replace(prepare_rows(found, data, tokenizer), answers=labels(learned))
    return dataset, f"all rows of {data.path}", trained is not None


def _own_data(run: str | None) -> config.Data | None:
    """The settings of the run's own rows; None for an adapter made elsewhere."""
    if not run:
        return None
    stored = runs.read_config(Path(run).expanduser())["data"]
    known = {f.name: stored[f.name] for f in fields(config.Data) if f.name in stored}
    return validation.from_plain(config.Data, known)


def _given(data: config.Data, own: config.Data | None, typed: list[str]) -> config.Data:
    """The settings of the rows to evaluate, without what a run's settings say of the run's own rows only."""
    if data.eval_path and not data.path:  # data=NAME data.eval_path=FILE
        return replace(data, path=data.eval_path, eval_path=None)
    if own is None or overrides.chosen(typed, "data") is not None or _place(data) == _place(own):
        return data
    inherited = ["max_rows", "eval_path", "eval_split"]
    if _place(data)[0] != _place(own)[0]:
        inherited += ["name", "split", "revision"]
    default = config.Data()
    return replace(data, **{name: getattr(default, name) for name in inherited
                            if overrides.chosen(typed, f"data.{name}") is None})  # fmt: skip


def _place(data: config.Data) -> tuple[str | None, ...]:
    return str(Path(data.path).expanduser().absolute()), data.name, data.split, data.revision


def _read_own(own: config.Data | None) -> Rows | None:
    """The rows that the run was trained on, to be told from those evaluated; None where they are not to be had."""
    try:
        return read(own) if own else None
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("the run's own rows cannot be read, to see that none of them is evaluated: %s", error)
        return None


def _say_other_rows(adapter: Path, dataset: Dataset) -> None:
    """Rows other than the run's own may hold some that it learned, and then its loss looks better than it is."""
    record = adapter / provenance.RECORD
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
