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
from lora_ft.data import thoughts
from lora_ft.data.dataset import Dataset, EvalPrompt
from lora_ft.evaluation import classification, metrics
from lora_ft.evaluation.class_set import ClassSet, check, label_set, labelled
from lora_ft.evaluation.classification import Predictions
from lora_ft.evaluation.generation import generate
from lora_ft.metric_table import LOSS, Source
from lora_ft.ops.token_loss import Paths

_PROMPT_END = 16  # tokens


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
            end = self.tokenizer.decode(self.prompts[0].prompt_ids[-_PROMPT_END:])  # which may open a thought
            answers = [thoughts.after(answer, end) for answer in answers]
            references = [thoughts.after(prompt.answer) for prompt in self.prompts]
            found |= metrics.scores(of_answers, answers, references)
        return {name: found[name] for name in self.names}


def names(train: config.Train) -> list[str]:
    """Return the metrics to evaluate during training: train.eval_metrics, and train.best_metric unless it is a loss."""
    return list(dict.fromkeys([*train.eval_metrics, *([train.best_metric] if train.best_metric != LOSS else [])]))


def task_metrics(
    cfg: config.TrainRun,
    dataset: Dataset,
    prompts: Sequence[EvalPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    paths: Paths,
) -> TaskMetrics:
    """Prepare the metrics that the settings name on the prompts of an evaluation; none without eval rows.

    Raises the errors of `class_set.check`.
    """
    wanted, chosen = names(cfg.train), labelled(prompts, cfg.data)
    if dataset.eval:
        check(wanted, chosen, dataset.answers, "train.eval_metrics")
    classes = None
    if chosen and dataset.answers and (mixing.has_labels(cfg.data) or metric_table.of(Source.classes, wanted)):
        tokens = cfg.train.microbatch_limit or cfg.train.tokens_per_step
        classes = label_set(chosen, dataset.answers, tokenizer, cfg.data, paths, tokens)
    return TaskMetrics(wanted, prompts, classes, tokenizer, cfg.train.max_new_tokens)
