"""Compare base and adapter on the same eval rows and prompts, with the adapter off and on in one model.

                  base     adapter
eval loss        3.142       2.087     nats per token
perplexity       23.15        8.06     113 tokens of 12 rows
eval loss chat   3.511       1.713     64 tokens of 7 rows        (a line for each source of data.sources)

question    How many legs has a spider?
reference   Eight.
base        A spider is a ...
adapter     Eight.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peft import PeftModel
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.data.dataset import EvalPrompt
from lora_ft.data.rows import Example
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation import class_report
from lora_ft.evaluation.class_set import ClassSet
from lora_ft.evaluation.classification import Classification, Predictions
from lora_ft.evaluation.generation import generate, visible
from lora_ft.evaluation.loss import EvalLoss, Loss, eval_loss
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.ops.token_loss import Paths

MAJORITY = "majority"  # the heading of the yardstick that stands for the base of a classifier
_WIDE = 100  # columns; four texts side by side are unreadable in a narrower terminal


@dataclass(frozen=True)
class EvalSet:
    """Examples for the loss, and prompts to answer greedily.

    tokens_per_microbatch: most tokens of a forward pass. max_new_tokens: most tokens of an answer. loss: of the
    objective. sources: indices of the examples of each source; empty if there are no sources. classes: rows with
    labels, whose probabilities are computed; None for other rows. metrics: further metrics of a model, given its
    probabilities of labels; they join those of the objective. is_of_head: the classes are those of a classifier's head,
    whose base has none. ranks: the processes that share the work of the losses.
    """

    examples: Sequence[Example]
    prompts: Sequence[EvalPrompt]
    tokens_per_microbatch: int
    max_new_tokens: int
    loss: Loss
    sources: Mapping[str, range] = field(default_factory=dict)
    classes: ClassSet | None = None
    metrics: Callable[[PreTrainedModel, Predictions | None], dict[str, float]] | None = None
    is_of_head: bool = False
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Answers:
    """A prompt of the eval set, its reference answer, and the answers of base and adapter."""

    question: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Comparison:
    """Losses of base and adapter on the same rows, their answers to the same prompts, and probabilities of labels.

    is_of_head: of a classifier. `base` is then the yardstick of evaluation/heads.py, and losses are those of rows.
    """

    base: EvalLoss
    adapter: EvalLoss
    answers: list[Answers]
    base_classes: Predictions | None = None
    adapter_classes: Predictions | None = None
    is_of_head: bool = False


def compare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_set: EvalSet,
    paths: Paths,
    earlier: Comparison | None = None,
    known: tuple[EvalLoss | None, EvalLoss | None] = (None, None),
) -> Comparison:
    """Evaluate the base without adapter and the active adapter on one eval set.

    earlier: a comparison with the same base and eval set, whose results for the base are reused.
    known: losses of base and adapter, which are not computed again unless None.
    Raises NonFiniteError for a loss that is NaN or infinite.
    """
    inner: PreTrainedModel = model.get_base_model()

    def evaluated(loss: EvalLoss | None) -> tuple[EvalLoss, list[str], Predictions | None]:
        is_known = loss is not None
        chosen = eval_set.examples, paths, eval_set.tokens_per_microbatch, eval_set.sources
        loss = loss or eval_loss(inner, eval_set.loss, *chosen, eval_set.ranks)
        if not math.isfinite(loss.loss):
            raise NonFiniteError(
                f"eval loss {loss.loss}: weights of the base or the adapter are not finite, or too large"
            )
        classes = eval_set.classes.predict(inner) if eval_set.classes else None
        if eval_set.metrics and not is_known:
            loss = replace(loss, metrics=loss.metrics | eval_set.metrics(inner, classes))
        prompts = [prompt.prompt_ids for prompt in eval_set.prompts]
        greedy = config.Sampling(max_new_tokens=eval_set.max_new_tokens)
        answers = generate(inner, tokenizer, prompts, greedy, seed=0) if prompts else []  # a classifier writes none
        return loss, answers, classes

    if earlier:
        base, base_answers, base_classes = earlier.base, [a.base for a in earlier.answers], earlier.base_classes
    else:
        with adapter_off(model):
            base, base_answers, base_classes = evaluated(known[0])
    adapter, adapter_answers, adapter_classes = evaluated(known[1])
    rows = zip(eval_set.prompts, base_answers, adapter_answers, strict=True)
    answers = [Answers(p.prompt, p.answer, off, on) for p, off, on in rows]
    return Comparison(base, adapter, answers, base_classes, adapter_classes, eval_set.is_of_head)


@contextlib.contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Disable the adapter in a block: the model then computes exactly what the base does. Restores requires_grad."""
    # PEFT freezes every adapter at the start and unfreezes the active one at the end, even if it was frozen before.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, required in trainable:
            parameter.requires_grad = required


def render(
    comparison: Comparison | None,
    facts: dict[str, str],
    scores: dict[str, tuple[float, float]] | None = None,
    classes: tuple[Classification | None, Classification] | None = None,
) -> RenderableType:
    """Render the result of train or eval for the terminal, without truncation.

    comparison: None if there are no eval rows. facts: lines below the table and the answers.
    scores: further values of base and adapter, by name. classes: classifications of base and adapter.
    """
    parts: list[RenderableType] = []
    if comparison is None:
        parts.append(Text("no eval rows: base and adapter are not compared"))
    else:
        parts += [_losses(comparison, scores or {}, classes), Text()]
        if classes:
            parts += [class_report.render(classes[1]), Text()]
        parts += [_SideBySide(a) for a in comparison.answers]
    return Group(*parts, _pairs(facts.items()))


def _losses(
    comparison: Comparison,
    scores: dict[str, tuple[float, float]],
    classes: tuple[Classification | None, Classification] | None,
) -> Table:
    base, adapter = comparison.base, comparison.adapter
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for header in ("", MAJORITY if comparison.is_of_head else "base", "adapter", ""):
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    if comparison.is_of_head:
        table.add_row("eval loss", _number(base.loss), _number(adapter.loss), f"nats per row, {_rows(base)}")
    else:
        table.add_row("eval loss", _number(base.loss), _number(adapter.loss), "nats per token")
        counted = f"{base.tokens:,} tokens of {_rows(base)}"
        table.add_row("perplexity", _number(base.perplexity), _number(adapter.perplexity), counted)
    for name, source in base.sources.items():
        counted = _rows(source) if comparison.is_of_head else f"{source.tokens:,} tokens of {_rows(source)}"
        table.add_row(f"eval loss {name}", _number(source.loss), _number(adapter.sources[name].loss), counted)
    for name, values in scores.items():
        table.add_row(name, *map(_number, values))
    for name, of_base, of_adapter, interval in class_report.metric_rows(*classes) if classes else ():
        table.add_row(name, "" if of_base is None else _number(of_base), _number(of_adapter), interval)
    return table


def _rows(loss: EvalLoss) -> str:
    return f"{loss.rows:,} row{'s' * (loss.rows != 1)}"


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 1e4 else f"{value:.3g}" if math.isfinite(value) else "over 1e304"


@dataclass(frozen=True)
class _SideBySide:
    """A prompt and its answers: columns in a wide terminal, lines in a narrow one."""

    answers: Answers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = vars(self.answers)
        if options.max_width < _WIDE:
            yield _pairs(texts.items())
        else:
            table = Table(*texts, box=None, padding=(0, 2, 0, 0), header_style="dim")
            table.add_row(*map(_text, texts.values()))
            yield table
        yield Text()


def _pairs(items: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for name, value in items:
        table.add_row(Text(name), _text(value))
    return table


def _text(value: str) -> Text:
    """Return text that is shown literally: no markup, control characters escaped."""
    return Text(visible(value), overflow="fold")
