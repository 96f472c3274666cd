"""Compare base and adapter on rows that the run did not train on: its eval rows, or other rows given by data=.

lora-ft eval run=runs/2026-11-23_10-15-00 eval.metrics=[exact_match,chrf]

                     base   adapter
    eval loss      3.1420    2.0870  nats per token       -> and eval.json in the run folder:
    perplexity    23.1500    8.0600  113 tokens of 12 rows   {"base": {"loss": 3.142, ...}, "adapter": {...}, ...}

Eval rows:

    run=F                                     the eval rows of the run
    run=F data.path=TEST (or data.split=...)  all rows of TEST; an error if the run trained on some of them
    ... data.eval_fraction=0.2                the eval rows that train would choose with these settings; a warning,
        (or eval_path, eval_split)            since the run may have trained on some of them
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, objectives, runs, validation
from lora_ft.adapters import files, loading, provenance
from lora_ft.classes import Classes
from lora_ft.cli import entry, overrides
from lora_ft.data.dataset import Dataset, labels, prepare, prepare_rows
from lora_ft.data.read import Rows, eval_split, read, read_eval
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation import classification, metrics
from lora_ft.evaluation.comparison import Comparison, EvalSet, compare, compare_classifier, render
from lora_ft.evaluation.heads import BASE_IS
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable
from lora_ft.models.acceleration import accelerated, accelerated_lora
from lora_ft.models.device import resolve_device, selected
from lora_ft.objectives import Objective
from lora_ft.objectives.classification import Classification
from lora_ft.ops.kernels import choose_kernels
from lora_ft.ops.token_loss import Paths
from lora_ft.training.state import choose_eval

log = logging.getLogger("lora_ft")

_FILE = "eval.json"


@dataclass(frozen=True)
class EvalResult:
    """Results of base and adapter on the same eval rows.

    metrics: value of the base and value of the adapter, by name.
    rows: description of the rows. data_sha256: hash of all rows and their split.
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


def evaluate(cfg: config.EvalRun, given: list[str]) -> EvalResult:
    """Compare base and adapter on the eval rows, and write eval.json into the run folder if there is one.

    `given` are the overrides that `cfg` was composed from; they take precedence over the settings of the run.
    """
    validation.validate(cfg)
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    saved = files.read_config(adapter)
    classes = loading.classes_of(adapter, saved)
    _check_metrics(cfg.eval.metrics, classes)
    cfg = loading.with_base(cfg, adapter, saved)
    cfg = replace(cfg, objective=objectives.of_adapter(cfg.objective, classes))
    objective = objectives.find(cfg.objective, classes)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    dataset, description, disjoint = _rows(cfg, objective, given, tokenizer)
    eval_set = _eval_set(cfg, objective, dataset)
    if not disjoint:
        _warn_of_other_rows(adapter, dataset)
    device = resolve_device(cfg.device)
    kernels = choose_kernels(device, cfg.fast.kernels)
    with selected(device):
        base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
        with accelerated(base.model, cfg.fast, kernels) as made, accelerated_lora(model, loading.NAME, cfg.fast):
            comparison = _compared(model, tokenizer, objective, eval_set, made.paths)
    found = {} if classes else _metrics(comparison, cfg.eval.metrics, dataset.answers)
    path = Path(cfg.run).expanduser() / _FILE if cfg.run else None
    result = EvalResult(comparison, found, description, dataset.report.sha256, path)
    if path:
        durable.write_json(path, _record(result, cfg.eval.samples))
    return result


def _check_metrics(names: list[str], classes: Classes | None) -> None:
    """Raise ConfigError for metrics of answers, if the adapter is a classifier, and the errors of `metrics.check`."""
    if classes is None:
        metrics.check(names)
    elif unknown := [name for name in names if name not in classification.METRICS]:
        raise ConfigError(
            f"eval.metrics: {unknown[0]} is no metric of a classifier, which writes no answers: all of "
            f"{', '.join(classification.METRICS)} are computed without being named"
        )


def _compared(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, objective: Objective, eval_set: EvalSet, paths: Paths
) -> Comparison:
    if isinstance(objective, Classification) and objective.classes:
        tokens = eval_set.tokens_per_microbatch
        return compare_classifier(model, objective.loss_of, objective.classes, eval_set.examples, paths, tokens)
    return compare(model, tokenizer, eval_set, paths)


def _eval_set(cfg: config.EvalRun, objective: Objective, dataset: Dataset) -> EvalSet:
    """Choose examples and prompts within the limits of `cfg.eval`; metrics need all prompts."""
    settings = cfg.eval
    examples, prompts = choose_eval(dataset, settings.rows or len(dataset.eval))
    if not examples:
        raise DataError("there are no eval rows: set data.eval_fraction above 0, or data.eval_path=FILE")
    if settings.metrics and not prompts and not isinstance(objective, Classification):
        raise DataError("eval.metrics needs rows with prompts and answers, but the eval rows are plain text")
    wanted = len(prompts) if settings.metrics else settings.samples
    return EvalSet(
        examples,
        prompts[:wanted],
        settings.tokens_per_microbatch,
        settings.max_new_tokens,
        objective.loss,
    )


def _rows(
    cfg: config.EvalRun, objective: Objective, given: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, str, bool]:
    """Return the rows to evaluate, their description, and True if the run certainly did not train on any of them."""
    own = _own_data(cfg.run)
    make_examples = objective.examples
    data = _data(cfg.data, own, given)
    data = objectives.data_of(cfg.objective, data)
    own = objectives.data_of(cfg.objective, own) if own else None
    same = own is not None and _identity(data) == _identity(own)
    if same or overrides.chosen(given, "data.eval_fraction") or data.eval_path or data.eval_split:
        source = data.eval_path or eval_split(data)
        description = f"all rows of {source}" if source else f"{data.path}, data.eval_fraction={data.eval_fraction}"
        return prepare(data, tokenizer, make_examples), description, False
    trained = _read_own(own)
    found = read_eval(data, trained)
    training_rows = trained.training_rows if trained else found.rows
    dataset = replace(prepare_rows(found, data, tokenizer, make_examples), answers=labels(training_rows))
    return dataset, f"all rows of {data.path}", trained is not None


def _own_data(run: str | None) -> config.Data | None:
    """Read the data settings of the run; None for an adapter without a run."""
    if not run:
        return None
    stored = runs.read_config(Path(run).expanduser())["data"]
    known = {f.name: stored[f.name] for f in fields(config.Data) if f.name in stored}
    return validation.from_plain(config.Data, known)


def _data(data: config.Data, own: config.Data | None, given: list[str]) -> config.Data:
    """Return the data settings to evaluate with; those of the run that apply to its own rows only are removed."""
    if data.eval_path and not data.path:  # data=NAME data.eval_path=FILE
        return replace(data, path=data.eval_path, split=data.eval_split or data.split, eval_path=None, eval_split=None)
    if own is None or overrides.chosen(given, "data") is not None or _identity(data) == _identity(own):
        return data
    inherited = ["max_rows", "eval_path", "eval_split"]
    if _identity(data)[0] != _identity(own)[0]:
        inherited += ["name", "split", "revision"]
    default = config.Data()
    return replace(data, **{name: getattr(default, name) for name in inherited
                            if overrides.chosen(given, f"data.{name}") is None})  # fmt: skip


def _identity(data: config.Data) -> tuple[str | None, ...]:
    """Return path, name, split and revision, which are equal for settings that read the same rows."""
    return str(Path(data.path).expanduser().absolute()), data.name, data.split, data.revision


def _read_own(own: config.Data | None) -> Rows | None:
    """Read the rows of the run, to find out which it trained on; None if they cannot be read."""
    try:
        return read(own) if own else None
    except (ConfigError, DataError, ResourceError) as error:
        log.warning("cannot read the run's own rows, so some evaluated rows may be training rows: %s", error)
        return None


def _warn_of_other_rows(adapter: Path, dataset: Dataset) -> None:
    """Warn if the rows are not those of the run: it may have trained on some of them, which lowers the loss."""
    record = adapter / provenance.RECORD
    if record.is_file() and json.loads(record.read_text("utf-8"))["data_sha256"] != dataset.report.sha256:
        log.warning(
            "the rows or their split are not the run's own: if the run trained on some of them, loss and metrics are "
            "too good"
        )


def _metrics(comparison: Comparison, names: list[str], labels: list[str] | None) -> dict[str, tuple[float, float]]:
    """Compute the metrics of both models' answers: (base, adapter) by name."""
    if not names:
        return {}
    references = [a.reference for a in comparison.answers]
    base = metrics.scores(names, [a.base for a in comparison.answers], references, labels)
    adapter = metrics.scores(names, [a.adapter for a in comparison.answers], references, labels)
    return {name: (base[name], adapter[name]) for name in names}


def _shown(comparison: Comparison, samples: int) -> Comparison:
    return replace(comparison, answers=comparison.answers[:samples])


def _record(result: EvalResult, samples: int) -> dict[str, Any]:
    """Return the contents of eval.json: losses in nats per token, metrics, the hash of the rows, the first answers."""
    comparison = _shown(result.comparison, samples)
    if comparison.classifications:
        base, adapter = (asdict(each) for each in comparison.classifications)
        return {
            "base": {"loss": comparison.base.loss} | base["metrics"],
            "adapter": {"loss": comparison.adapter.loss} | adapter["metrics"],
            "base_is": BASE_IS,
            "classification": adapter,
            "tokens": comparison.adapter.tokens,
            "rows": comparison.adapter.rows,
            "data_sha256": result.data_sha256,
        }
    return {
        "base": _losses(comparison.base) | {name: base for name, (base, _) in result.metrics.items()},
        "adapter": _losses(comparison.adapter) | {name: adapter for name, (_, adapter) in result.metrics.items()},
        "tokens": comparison.adapter.tokens,
        "rows": comparison.adapter.rows,
        "data_sha256": result.data_sha256,
        "samples": [asdict(answers) for answers in comparison.answers],
    }


def _losses(loss: EvalLoss) -> dict[str, float | None]:
    """Return loss and perplexity; None for an infinite perplexity, which JSON cannot represent."""
    values = {"loss": loss.loss, "perplexity": loss.perplexity}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    entry.run("eval")
