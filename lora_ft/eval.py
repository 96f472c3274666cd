"""Compare base and adapter on rows that were not trained on: the run's eval rows, or others given with data=.

lora-ft eval run=runs/2026-11-23_10-15-00 eval.metrics=[exact_match,chrf]

                     base   adapter
    eval loss      3.1420    2.0870  nats per token       -> and eval.json in the run folder:
    perplexity    23.1500    8.0600  113 tokens of 12 rows   {"base": {"loss": 3.142, ...}, "adapter": {...}, ...}

Eval rows:

    run=F                                     the run's own, by its settings
    run=F data.path=TEST (or data.split=...)  all rows of TEST; refused if the run trained on some of them
    ... data.eval_fraction=0.2                that part of the rows, split as train would split it; rows that the
        (or eval_path, eval_split)            run trained on may be among them, which is logged
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs, validation
from lora_ft.adapters import loading, provenance
from lora_ft.cli import entry, overrides
from lora_ft.data.dataset import Dataset, labels, prepare, prepare_rows
from lora_ft.data.read import Rows, eval_split, read, read_eval
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation import metrics
from lora_ft.evaluation.comparison import Comparison, EvalSet, compare, render
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable
from lora_ft.models.acceleration import accelerated
from lora_ft.models.load import resolve_device
from lora_ft.objectives import find as find_objective
from lora_ft.ops.allocator import keep_freed_memory
from lora_ft.ops.kernels import choose_kernels
from lora_ft.training.state import choose_eval

log = logging.getLogger("lora_ft")

_FILE = "eval.json"


@dataclass(frozen=True)
class EvalResult:
    """Base and adapter on the same eval rows.

    metrics: value of the base and value of the adapter, by name.
    rows: which rows were evaluated, in words; data_sha256 identifies them.
    path: eval.json in the run folder; None without a run.
    """

    comparison: Comparison
    metrics: dict[str, tuple[float, float]]
    rows: str
    data_sha256: str
    path: Path | None


def main(cfg: config.EvalRun, invocation: entry.Invocation) -> float:
    """Evaluate, print the comparison, and return the adapter's loss."""
    result = evaluate(cfg, invocation.overrides)
    facts = {"evaluated": result.rows} | ({"written to": str(result.path)} if result.path else {})
    Console().print(render(_shown(result.comparison, cfg.eval.samples), facts, result.metrics))
    return result.comparison.adapter.loss


def evaluate(cfg: config.EvalRun, typed: list[str]) -> EvalResult:
    """Compare base and adapter on the eval rows, and write eval.json into the run folder if there is one.

    `typed` are the overrides that `cfg` was composed from: a setting given there is preferred to the run's.
    """
    validation.validate(cfg)
    metrics.check(cfg.eval.metrics)
    keep_freed_memory()
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    cfg = loading.with_base(cfg, adapter)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    dataset, described, disjoint = _rows(cfg, typed, tokenizer)
    eval_set = _eval_set(cfg, dataset)
    if not disjoint:
        _warn_of_other_rows(adapter, dataset)
    kernels = choose_kernels(resolve_device(cfg.device), compile_=cfg.fast.compile, liger=cfg.fast.liger)
    base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
    with accelerated(base.model, cfg.fast, kernels) as made:
        comparison = compare(model, tokenizer, eval_set, made.paths)
    found = _metrics(comparison, cfg.eval.metrics, dataset.answers)
    path = Path(cfg.run).expanduser() / _FILE if cfg.run else None
    result = EvalResult(comparison, found, described, dataset.report.sha256, path)
    if path:
        durable.write_json(path, _record(result, cfg.eval.samples))
    return result


def _eval_set(cfg: config.EvalRun, dataset: Dataset) -> EvalSet:
    """Choose examples and prompts within the limits of `cfg.eval`: all prompts for metrics, else the samples."""
    settings = cfg.eval
    examples, prompts = choose_eval(dataset, settings.rows or len(dataset.eval))
    if not examples:
        raise DataError("there are no eval rows: set data.eval_fraction above 0, or data.eval_path=FILE")
    if settings.metrics and not prompts:
        raise DataError("eval.metrics needs questions and answers, but the eval rows are plain text")
    wanted = len(prompts) if settings.metrics else settings.samples
    return EvalSet(
        examples,
        prompts[:wanted],
        settings.tokens_per_microbatch,
        settings.max_new_tokens,
        find_objective(cfg.objective).loss,
    )


def _rows(cfg: config.EvalRun, typed: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, str, bool]:
    """The rows to evaluate, their description, and whether it is known that the run did not train on them."""
    own = _own_data(cfg.run)
    make_examples = find_objective(cfg.objective).examples
    data = _given(cfg.data, own, typed)
    same = own is not None and _identity(data) == _identity(own)
    if same or overrides.chosen(typed, "data.eval_fraction") or data.eval_path or data.eval_split:
        if place := data.eval_path or eval_split(data):
            return prepare(data, tokenizer, make_examples), f"all rows of {place}", False
        return (
            prepare(data, tokenizer, make_examples),
            f"the rows of {data.path} that data.eval_fraction sets apart",
            False,
        )
    trained = _read_own(own)
    found = read_eval(data, trained)
    learned = trained.training_rows if trained else found.rows
    dataset = replace(prepare_rows(found, data, tokenizer, make_examples), answers=labels(learned))
    return dataset, f"all rows of {data.path}", trained is not None


def _own_data(run: str | None) -> config.Data | None:
    """Load the data settings of the run; None for an adapter made elsewhere."""
    if not run:
        return None
    stored = runs.read_config(Path(run).expanduser())["data"]
    known = {f.name: stored[f.name] for f in fields(config.Data) if f.name in stored}
    return validation.from_plain(config.Data, known)


def _given(data: config.Data, own: config.Data | None, typed: list[str]) -> config.Data:
    """The data settings to evaluate, without those of the run's settings that hold for the run's own rows only."""
    if data.eval_path and not data.path:  # data=NAME data.eval_path=FILE
        return replace(data, path=data.eval_path, split=data.eval_split or data.split, eval_path=None, eval_split=None)
    if own is None or overrides.chosen(typed, "data") is not None or _identity(data) == _identity(own):
        return data
    inherited = ["max_rows", "eval_path", "eval_split"]
    if _identity(data)[0] != _identity(own)[0]:
        inherited += ["name", "split", "revision"]
    default = config.Data()
    return replace(data, **{name: getattr(default, name) for name in inherited
                            if overrides.chosen(typed, f"data.{name}") is None})  # fmt: skip


def _identity(data: config.Data) -> tuple[str | None, ...]:
    """Path, name, split and revision: equal for settings that read the same rows."""
    return str(Path(data.path).expanduser().absolute()), data.name, data.split, data.revision


def _read_own(own: config.Data | None) -> Rows | None:
    """Read the run's rows, to check that none is evaluated that was trained on; None if they cannot be read."""
    try:
        return read(own) if own else None
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("cannot read the run's own rows, so rows it trained on may be among those evaluated: %s", error)
        return None


def _warn_of_other_rows(adapter: Path, dataset: Dataset) -> None:
    """Warn about rows other than the run's own: the run may have trained on some, which lowers its loss."""
    record = adapter / provenance.RECORD
    if record.is_file() and json.loads(record.read_text("utf-8"))["data_sha256"] != dataset.report.sha256:
        log.warning(
            "these rows, or their split, are not the run's own: if the run trained on some of them, "
            "loss and metrics are too good"
        )


def _metrics(comparison: Comparison, names: list[str], labels: list[str] | None) -> dict[str, tuple[float, float]]:
    """Metrics of the base's answers and of the adapter's, by name."""
    if not names:
        return {}
    references = [a.reference for a in comparison.answers]
    base = metrics.scores(names, [a.base for a in comparison.answers], references, labels)
    adapter = metrics.scores(names, [a.adapter for a in comparison.answers], references, labels)
    return {name: (base[name], adapter[name]) for name in names}


def _shown(comparison: Comparison, samples: int) -> Comparison:
    return replace(comparison, answers=comparison.answers[:samples])


def _record(result: EvalResult, samples: int) -> dict[str, Any]:
    """The contents of eval.json: losses in nats per token, metrics, the hash of the rows, and the first answers."""
    comparison = _shown(result.comparison, samples)
    return {
        "base": _losses(comparison.base) | {name: base for name, (base, _) in result.metrics.items()},
        "adapter": _losses(comparison.adapter) | {name: adapter for name, (_, adapter) in result.metrics.items()},
        "tokens": comparison.adapter.tokens,
        "rows": comparison.adapter.rows,
        "data_sha256": result.data_sha256,
        "samples": [asdict(answers) for answers in comparison.answers],
    }


def _losses(loss: EvalLoss) -> dict[str, float | None]:
    """Loss and perplexity; null for a perplexity above all floats, as JSON has no infinity."""
    values = {"loss": loss.loss, "perplexity": loss.perplexity}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    entry.run("eval")
