"""Compare base and adapter on rows that the run did not train on: its eval rows, or other rows given by data=.

lora-ft eval run=runs/2026-11-23_10-15-00 eval.metrics=[exact_match,chrf]

                     base   adapter
    eval loss      3.1420    2.0870  nats per token       -> and eval.json in the run folder:
    perplexity    23.1500    8.0600  113 tokens of 12 rows   {"base": {"loss": 3.142, ...}, "adapter": {...}, ...}

Eval rows:

    run=F                                     the eval rows of the run; of each source, if it has data.sources
    run=F data.path=TEST (or data.split=...)  all rows of TEST; an error if the run trained on some of them
    ... data.eval_fraction=0.2                the eval rows that train would choose with these settings; a warning,
        (or eval_path, eval_split)            since the run may have trained on some of them

Rows with labels (data.labels) get a probability of every label, and the metrics of these. `predict=ROWS out=FILE`
writes such probabilities for rows without labels (predict.py).
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lora_ft import config, metric_table, mixing, objectives, runs, validation
from lora_ft.adapters import labels as stored_labels
from lora_ft.adapters import loading, peft_folder, provenance
from lora_ft.classes import Classes
from lora_ft.cli import entry, overrides
from lora_ft.data.dataset import Dataset, few_answers, prepare_rows
from lora_ft.data.joined import Chained
from lora_ft.data.mixed_dataset import prepare, read_sources
from lora_ft.data.read import Rows, eval_split, read_eval, refuse_leaks
from lora_ft.errors import ConfigError, DataError, ResourceError
from lora_ft.evaluation import class_report, heads, metrics
from lora_ft.evaluation.class_set import ClassSet, check, label_set, labelled
from lora_ft.evaluation.classification import TEMPERATURES, Classification, Predictions, classify, fit_temperature
from lora_ft.evaluation.classification import metrics as metrics_of
from lora_ft.evaluation.comparison import Comparison, EvalSet, compare, render
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable
from lora_ft.metric_table import Source
from lora_ft.models.acceleration import accelerated, accelerated_lora
from lora_ft.models.device import resolve_device, selected
from lora_ft.objectives import Objective
from lora_ft.ops.kernels import choose_kernels
from lora_ft.ops.token_loss import Paths
from lora_ft.training.predict import predict, with_labels
from lora_ft.training.state import choose_eval
from lora_ft.training.task_metrics import yardstick

log = logging.getLogger("lora_ft")

_FILE, _CONFUSION = "eval.json", "eval_confusion.png"


@dataclass(frozen=True)
class EvalResult:
    """Results of base and adapter on the same eval rows.

    metrics: value of the base and value of the adapter, by name. classes: classifications of both, None without labels.
    rows: description of the rows. data_sha256: hash of all rows and their split.
    path: eval.json in the run folder; None without a run.
    """

    comparison: Comparison
    metrics: dict[str, tuple[float, float]]
    rows: str
    data_sha256: str
    path: Path | None
    classes: tuple[Classification, Classification] | None = None


def main(cfg: config.EvalRun, invocation: entry.Invocation) -> float | None:
    """Evaluate, print the comparison, and return the adapter's loss; or write predictions and return None."""
    if cfg.predict:
        data = _data(replace(cfg.data, path=cfg.predict), _own_data(cfg.run), invocation.overrides)
        counts = predict(replace(cfg, data=data))
        lines = [f"{count:,} {label}" for label, count in counts.items()]
        Console().print(f"{counts.total():,} rows written to {cfg.out}: {', '.join(lines)}", markup=False)
        return None
    result = evaluate(cfg, invocation.overrides)
    facts = {"evaluated": result.rows} | ({"written to": str(result.path)} if result.path else {})
    Console().print(render(_shown(result.comparison, cfg.eval.samples), facts, result.metrics, result.classes))
    return result.comparison.adapter.loss


def evaluate(cfg: config.EvalRun, given: list[str]) -> EvalResult:
    """Compare base and adapter on the eval rows, and write eval.json into the run folder if there is one.

    `given` are the overrides that `cfg` was composed from; they take precedence over the settings of the run.
    """
    validation.validate(cfg)
    metric_table.check("eval.metrics", cfg.eval.metrics)
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    own = _own_data(cfg.run)
    saved = peft_folder.read_config(adapter)
    classes = loading.classes_of(adapter, saved)
    cfg = loading.with_base(cfg, adapter, saved)
    cfg = replace(cfg, data=_data(cfg.data, own, given), objective=objectives.of_adapter(cfg.objective, classes))
    cfg = with_labels(cfg, adapter)
    objective = objectives.find(cfg.objective, classes)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    dataset, description, disjoint = _rows(cfg, objective, own, given, tokenizer)
    eval_set = _eval_set(cfg, objective, dataset, classes)
    if not disjoint:
        _warn_of_other_rows(adapter, dataset)
    device = resolve_device(cfg.device)
    kernels = choose_kernels(device, cfg.fast.kernels)
    with selected(device):
        base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
        with accelerated(base.model, cfg.fast, kernels) as made, accelerated_lora(model, loading.NAME, cfg.fast):
            scored = _class_set(cfg, dataset, eval_set, tokenizer, made.paths, classes)
            comparison = compare(
                model, tokenizer, replace(eval_set, classes=scored), made.paths, yardstick(objective, eval_set)
            )
    names = metric_table.of(Source.answers, cfg.eval.metrics)
    of_base, of_adapter = (
        metrics.scores_of(names, tokenizer, eval_set.prompts, texts)
        for texts in ([a.base for a in comparison.answers], [a.adapter for a in comparison.answers])
    )
    found = {name: (of_base[name], of_adapter[name]) for name in names}
    classified = _classified(comparison, cfg, adapter, dataset.report.sha256)
    path = Path(cfg.run).expanduser() / _FILE if cfg.run else None
    result = EvalResult(comparison, found, description, dataset.report.sha256, path, classified)
    if path:
        durable.write_json(path, _record(result, cfg.eval.samples))
    if path and classified and (drawn := class_report.picture(classified[1], "Confusion matrix of the eval rows")):
        durable.write_bytes(path.with_name(_CONFUSION), drawn)
    return result


def _eval_set(cfg: config.EvalRun, objective: Objective, dataset: Dataset, classes: Classes | None) -> EvalSet:
    """Choose examples and prompts within the limits of `cfg.eval`; metrics need all prompts."""
    settings = cfg.eval
    examples, prompts, sources = choose_eval(dataset, settings.rows or len(dataset.eval))
    if not examples:
        raise DataError("there are no eval rows: set data.eval_fraction above 0, or data.eval_path=FILE")
    if classes:
        heads.check(settings.metrics, examples, classes, "eval.metrics")
        tokens = settings.tokens_per_microbatch
        return EvalSet(examples, [], tokens, settings.max_new_tokens, objective.loss, sources, is_of_head=True)
    check(settings.metrics, labelled(prompts, cfg.data), dataset.answers, "eval.metrics")
    wanted = len(prompts) if metric_table.of(Source.answers, settings.metrics) else settings.samples
    return EvalSet(
        examples,
        prompts[:wanted],
        settings.tokens_per_microbatch,
        settings.max_new_tokens,
        objective.loss,
        sources,
    )


def _class_set(
    cfg: config.EvalRun,
    dataset: Dataset,
    eval_set: EvalSet,
    tokenizer: PreTrainedTokenizerBase,
    paths: Paths,
    classes: Classes | None,
) -> ClassSet | None:
    """Return the rows with labels, if the adapter is a classifier, or the settings name labels or a metric of them."""
    if classes:
        return heads.head_set(classes, eval_set.examples, paths, eval_set.tokens_per_microbatch)
    if not mixing.has_labels(cfg.data) and not metric_table.of(Source.classes, cfg.eval.metrics):
        if cfg.eval.calibrate:
            raise ConfigError("eval.calibrate=true needs rows with labels: set data.labels")
        return None
    prompts = labelled(choose_eval(dataset, cfg.eval.rows or len(dataset.eval)).prompts, cfg.data)
    assert dataset.answers is not None  # checked with the eval set
    return label_set(prompts, dataset.answers, tokenizer, cfg.data, paths, cfg.eval.tokens_per_microbatch)


def _classified(
    comparison: Comparison, cfg: config.EvalRun, adapter: Path, data_sha256: str
) -> tuple[Classification, Classification] | None:
    """Classify by base and adapter; the adapter's probabilities have its temperature, which calibration fits first."""
    base, found = comparison.base_classes, comparison.adapter_classes
    if base is None or found is None:
        return None
    if cfg.eval.calibrate:
        fitted = _fitted(found)
        stored_labels.store_temperature(adapter, fitted, len(found.references), data_sha256)
        log.info("temperature %.4f fitted on %d rows, stored in %s", fitted, len(found.references), adapter)
    temperature = stored_labels.temperature(adapter)
    if temperature is not None:
        found = found.with_temperature(temperature)
    return classify(base, cfg.seed), classify(found, cfg.seed, temperature)


def _fitted(found: Predictions) -> float:
    """Fit a temperature; raises DataError if each lower one fits better, as where every row is predicted right."""
    fitted = fit_temperature(found)
    if fitted < TEMPERATURES[0] * 1.01:
        right = metrics_of(found)["accuracy"]
        raise DataError(
            f"eval.calibrate: no temperature fits {len(found.references)} rows of which {right:.0%} are predicted "
            "right: they do not say how sure to be. Evaluate on more rows"
        )
    return fitted


def _rows(
    cfg: config.EvalRun,
    objective: Objective,
    own: config.Data | None,
    given: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, str, bool]:
    """Return the rows to evaluate, their description, and True if the run certainly did not train on any of them.

    own: the data settings of the run.
    """
    make_examples, data = objective.examples, objectives.data_of(cfg.objective, cfg.data)
    own = objectives.data_of(cfg.objective, own) if own else None
    same = own is not None and _identity(data) == _identity(own)
    if data.sources:
        return prepare(data, tokenizer, make_examples), f"eval rows of {', '.join(sorted(data.sources))}", False
    if same or overrides.chosen(given, "data.eval_fraction") or data.eval_path or data.eval_split:
        source = data.eval_path or eval_split(data)
        description = f"all rows of {source}" if source else f"{data.path}, data.eval_fraction={data.eval_fraction}"
        return prepare(data, tokenizer, make_examples), description, False
    trained = _read_own(own)
    found = read_eval(data)
    if trained:
        refuse_leaks(trained, [found])
    dataset = prepare_rows(found, data, tokenizer, make_examples)
    if data.labels is None:
        training_rows = Chained([rows.training_rows for rows in trained]) if trained else found.rows
        dataset = replace(dataset, answers=few_answers(training_rows))
    return dataset, f"all rows of {data.path}", trained is not None and not (own and own.stream)


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
        inherited += ["name", "split", "revision", "sources", "mix"]
    default = config.Data()
    return replace(data, **{name: getattr(default, name) for name in inherited
                            if overrides.chosen(given, f"data.{name}") is None})  # fmt: skip


def _identity(data: config.Data) -> tuple[Any, ...]:
    """Return path, name, split and revision, also of the sources: equal for settings that read the same rows."""
    sources = tuple((name, _identity(source)) for name, source in mixing.sources(data).items())
    return str(Path(data.path).expanduser().absolute()), data.name, data.split, data.revision, sources


def _read_own(own: config.Data | None) -> list[Rows] | None:
    """Read the rows of the run, to find out which it trained on; None if they cannot be read."""
    try:
        return list(read_sources(own).values()) if own else None
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


def _shown(comparison: Comparison, samples: int) -> Comparison:
    return replace(comparison, answers=comparison.answers[:samples])


def _record(result: EvalResult, samples: int) -> dict[str, Any]:
    """Return the contents of eval.json: losses in nats per token, metrics, the hash of the rows, the first answers."""
    comparison = _shown(result.comparison, samples)
    of_answers = ({name: pair[side] for name, pair in result.metrics.items()} for side in (0, 1))
    of_classes = (found.metrics for found in result.classes) if result.classes else ({}, {})
    base, adapter = (answers | classes for answers, classes in zip(of_answers, of_classes, strict=True))
    return {
        "base": _losses(comparison.base, comparison) | base,
        "adapter": _losses(comparison.adapter, comparison) | adapter,
        **({"base_is": heads.BASE_IS} if comparison.is_of_head else {}),
        "tokens": comparison.adapter.tokens,
        "rows": comparison.adapter.rows,
        "data_sha256": result.data_sha256,
        **(
            {"classification": dict(zip(("base", "adapter"), map(asdict, result.classes), strict=True))}
            if result.classes
            else {}
        ),
        "samples": [asdict(answers) for answers in comparison.answers],
    }


def _losses(loss: EvalLoss, comparison: Comparison) -> dict[str, Any]:
    """Return loss and perplexity, of each source too; None for an infinite perplexity, which JSON cannot represent.

    A classifier has no perplexity.
    """
    values = {"loss": loss.loss} | ({} if comparison.is_of_head else {"perplexity": loss.perplexity})
    finite: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    sources = {name: {**_losses(source, comparison), "tokens": source.tokens} for name, source in loss.sources.items()}
    return finite | ({"sources": sources} if sources else {})


if __name__ == "__main__":
    entry.run("eval")
