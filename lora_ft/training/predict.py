"""Predict the labels of rows with an adapter, and write them with their probabilities.

lora-ft eval run=F predict=rows.csv out=predictions.csv

    text                      text         prediction   probability   p_negative   p_positive
    great film         ->     great film   positive            0.97         0.03         0.97

Labels and temperature are those stored with the adapter; rows are read by the run's settings, with or without answers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config, objectives, validation
from lora_ft.adapters import labels as stored_labels
from lora_ft.adapters import loading, peft_folder
from lora_ft.classes import Classes
from lora_ft.data import label_prompts, unlabelled
from lora_ft.data import labels as row_labels
from lora_ft.data.dataset import EvalPrompt, prepare_rows
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError
from lora_ft.evaluation import heads, predictions
from lora_ft.evaluation.classification import Floats, with_temperature
from lora_ft.evaluation.label_scores import LabelScorer
from lora_ft.models.acceleration import accelerated, accelerated_lora
from lora_ft.models.device import resolve_device, selected
from lora_ft.ops.kernels import choose_kernels
from lora_ft.ops.token_loss import Paths

log = logging.getLogger("lora_ft")


def with_labels(cfg: config.EvalRun, adapter: Path) -> config.EvalRun:
    """Replace data.labels=auto by the labels that the adapter was trained to choose from, if its record has them."""
    if cfg.data.labels != row_labels.AUTO or (known := stored_labels.labels(adapter)) is None:
        return cfg
    return replace(cfg, data=replace(cfg.data, labels=known))


def predict(cfg: config.EvalRun) -> Counter[str]:
    """Write the prediction for each row of `cfg.data` to `cfg.out`; return the number of rows of each label."""
    validation.validate(cfg)
    out = predictions.check(cfg.out)
    adapter = loading.adapter_folder(cfg.run, cfg.adapter_path)
    saved = peft_folder.read_config(adapter)
    classes = loading.classes_of(adapter, saved)
    cfg = loading.with_base(cfg, adapter, saved)
    cfg = replace(cfg, objective=objectives.of_adapter(cfg.objective, classes))
    labels = list(classes.names) if classes else _labels(cfg, adapter)
    data = replace(cfg.data, labels=None, deduplicate=False)
    tokenizer = loading.adapter_tokenizer(adapter, cfg.model)
    found, columns = unlabelled.read(data, "predict", labels[0])
    dataset = prepare_rows(found, data, tokenizer, objectives.find(cfg.objective, classes).examples)
    prompts: list[EvalPrompt] = list(dataset.eval_prompts)
    if not prompts:
        raise DataError(f"predict={cfg.predict}: the rows have no prompts")
    if left_out := len(columns) - len(prompts):
        log.warning("predict: %d of %d rows are left out, as data.too_long says", left_out, len(columns))
    if classes:
        score = partial(_by_head, classes, dataset.eval)
    else:
        made = label_prompts.make([p.row for p in prompts], [p.prompt_ids for p in prompts], labels, tokenizer, data)
        score = partial(_by_words, made)
    is_multi = classes is not None and classes.is_multi
    probabilities = _probabilities(cfg, adapter, tokenizer, score, is_multi)
    table = predictions.table([columns[prompt.source] for prompt in prompts], labels, probabilities, is_multi)
    predictions.write(out, table)
    counts = Counter(dict.fromkeys(labels, 0))
    for row in predictions.chosen(probabilities, is_multi):
        counts.update(labels[i] for i in row)
    return counts


Score = Callable[[Paths, int, PreTrainedModel], Floats]


def _by_head(
    classes: Classes, examples: Sequence[Example], paths: Paths, tokens: int, model: PreTrainedModel
) -> Floats:
    return heads.predict(model, classes, examples, paths, tokens)


def _by_words(prompts: list[label_prompts.LabelPrompt], paths: Paths, tokens: int, model: PreTrainedModel) -> Floats:
    return LabelScorer(prompts, paths, tokens).probabilities(model)


def _labels(cfg: config.EvalRun, adapter: Path) -> list[str]:
    """Return the labels that data.labels names, else those stored with the adapter."""
    given = row_labels.of(cfg.data)
    labels = given.names if given and given.names else stored_labels.labels(adapter)
    if labels is None:
        raise ConfigError("predict needs labels, and the adapter has no record of any: name them with data.labels")
    return labels


def _probabilities(
    cfg: config.EvalRun, adapter: Path, tokenizer: PreTrainedTokenizerBase, score: Score, is_multi: bool
) -> Floats:
    """Return the probabilities of labels by the adapter, with its temperature; `score` computes them of a model."""
    device = resolve_device(cfg.device)
    kernels = choose_kernels(device, cfg.fast.kernels)
    with selected(device):
        base, model = loading.open_adapter(adapter, cfg.model, cfg.quant, cfg.device, tokenizer)
        with accelerated(base.model, cfg.fast, kernels) as made, accelerated_lora(model, loading.NAME, cfg.fast):
            found = score(made.paths, cfg.eval.tokens_per_microbatch, base.model)
    temperature = stored_labels.temperature(adapter)
    return found if temperature is None else with_temperature(found, temperature, multi_label=is_multi)
