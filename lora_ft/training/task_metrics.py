"""The metrics of an eval set beside its loss, for evaluations during training and at its end.

    task = task_metrics(cfg, dataset, prompts, tokenizer, paths)
    task(model)                     {"macro_f1": 0.91, "chrf": 55.2}: those of train.eval_metrics and train.best_metric

Metrics of classes come from the probabilities of labels (one forward pass over prompts and labels); metrics of answers
need an answer to each prompt, which are generated greedily, in batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config, metric_table, mixing
from lora_ft.data.dataset import Dataset, EvalPrompt
from lora_ft.data.rows import Example
from lora_ft.evaluation import class_set, classification, heads, metrics
from lora_ft.evaluation.class_set import ClassSet, label_set, labelled
from lora_ft.evaluation.classification import Predictions
from lora_ft.evaluation.comparison import Comparison, EvalSet
from lora_ft.evaluation.generation import generate
from lora_ft.metric_table import LOSS, Source
from lora_ft.objectives import Objective
from lora_ft.objectives.classification import Classification as ByHead
from lora_ft.ops.token_loss import Paths


@dataclass(frozen=True)
class TaskMetrics:
    """Computes the metrics `names` of a model; classes: the rows with labels, None without labels."""

    names: list[str]
    prompts: Sequence[EvalPrompt]
    classes: ClassSet | None
    tokenizer: PreTrainedTokenizerBase | None
    max_new_tokens: int

    def __call__(self, model: PreTrainedModel, predictions: Predictions | None = None) -> dict[str, float]:
        """Compute the metrics; `predictions` of the classes are not computed again if they are given."""
        found: dict[str, float] = {}
        if self.classes and metric_table.of(Source.classes, self.names):
            found |= classification.metrics(predictions or self.classes.predict(model))
        if of_answers := metric_table.of(Source.answers, self.names):
            greedy = config.Sampling(max_new_tokens=self.max_new_tokens)
            assert self.tokenizer is not None  # a run has one; a plan evaluates nothing
            answers = generate(model, self.tokenizer, [prompt.prompt_ids for prompt in self.prompts], greedy, seed=0)
            found |= metrics.scores_of(of_answers, self.tokenizer, self.prompts, answers)
        return {name: found[name] for name in self.names}


def names(train: config.Train) -> list[str]:
    """Return the metrics to evaluate during training: train.eval_metrics, and train.best_metric unless it is a loss."""
    return list(dict.fromkeys([*train.eval_metrics, *([train.best_metric] if train.best_metric != LOSS else [])]))


def check(wanted: Sequence[str], dataset: Dataset, prompts: Sequence[EvalPrompt], data: config.Data) -> None:
    """Raise DataError for metrics that eval rows with these prompts cannot have."""
    if dataset.classes:
        heads.check(wanted, dataset.eval, dataset.classes, "train.eval_metrics")
    elif dataset.eval:
        class_set.check(wanted, labelled(prompts, data), dataset.answers, "train.eval_metrics")


def task_metrics(
    cfg: config.TrainRun,
    dataset: Dataset,
    examples: Sequence[Example],
    prompts: Sequence[EvalPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    paths: Paths,
) -> TaskMetrics:
    """Prepare the metrics that the settings name on the examples and prompts of an evaluation.

    Without eval rows there are none. Raises the errors of `check`.
    """
    wanted, chosen = names(cfg.train), labelled(prompts, cfg.data)
    check(wanted, dataset, prompts, cfg.data)
    classes, tokens = None, cfg.train.microbatch_limit or cfg.train.tokens_per_step
    is_labelled = mixing.has_labels(cfg.data) or metric_table.of(Source.classes, wanted)
    if dataset.classes and examples:
        classes = heads.head_set(dataset.classes, examples, paths, tokens)
    elif chosen and dataset.answers and is_labelled:
        classes = label_set(chosen, dataset.answers, tokenizer, cfg.data, paths, tokens)
    return TaskMetrics(wanted, prompts, classes, tokenizer, cfg.train.max_new_tokens)


def yardstick(objective: Objective, eval_set: EvalSet) -> Comparison | None:
    """Return what stands for the base of a classifier with a head; None for a language model."""
    if isinstance(objective, ByHead) and objective.classes:
        return heads.majority(objective.loss_of, objective.classes, eval_set.examples, eval_set.sources)
    return None
