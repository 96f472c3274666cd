"""Base against adapter: the same held-out rows, the same questions, one model with the adapter off and on.

                      base     adapter
held-out loss        3.142       2.087     nats per token
perplexity           23.15        8.06     113 tokens of 12 rows

question    How many legs has a spider?
reference   Eight.
base        A spider is a ...
adapter     Eight.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peft import PeftModel
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.data.dataset import Question, TokenRow
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation.generation import generate, visible
from lora_ft.evaluation.loss import EvalLoss, eval_loss
from lora_ft.ops.token_loss import Paths

_WIDE = 100  # columns; below, four texts side by side would be ribbons of words


@dataclass(frozen=True)
class Answers:
    """A held-out question, the answer that the data gives, and the two models' own."""

    question: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Comparison:
    """Held-out losses of base and adapter over the same rows, and their answers to some of the questions."""

    base: EvalLoss
    adapter: EvalLoss
    answers: list[Answers]


def compare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    questions: Sequence[Question],
    paths: Paths,
    tokens_per_microbatch: int,
    num_samples: int,
    max_new_tokens: int,
    earlier: Comparison | None = None,
    known: tuple[EvalLoss | None, EvalLoss | None] = (None, None),
) -> Comparison:
    """Evaluate `rows`, and answer the first `num_samples` questions greedily, without and with the adapter.

    The active adapter is the one compared. What the base gave in an `earlier` comparison of the same rows, questions
    and limits is taken from there; losses of base and adapter that are `known` are not measured again. Raises
    NonFiniteError for a loss that is not a number.
    """
    inner: PreTrainedModel = model.get_base_model()
    asked = questions[:num_samples]
    greedy = config.Sampling(max_new_tokens=max_new_tokens)

    def measured(loss: EvalLoss | None) -> tuple[EvalLoss, list[str]]:
        heldout = loss or eval_loss(inner, rows, paths, tokens_per_microbatch)
        if not math.isfinite(heldout.loss):
            raise NonFiniteError(f"held-out loss {heldout.loss}: the weights of the base or of the adapter are broken")
        return heldout, [generate(inner, tokenizer, question.prompt_ids, greedy, seed=0) for question in asked]

    if earlier:
        base_loss, base_answers = earlier.base, [answers.base for answers in earlier.answers]
    else:
        with adapter_off(model):
            base_loss, base_answers = measured(known[0])
    adapter_loss, adapter_answers = measured(known[1])
    told = zip(asked, base_answers, adapter_answers, strict=True)
    return Comparison(base_loss, adapter_loss, [Answers(q.prompt, q.answer, base, own) for q, base, own in told])


@contextlib.contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The bare base, bit for bit, until the block ends; what trains and what does not is given back as it was."""
    # PEFT freezes every adapter here and unfreezes the active one behind the block, loaded for inference or not.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad = required


def render(
    comparison: Comparison | None, facts: dict[str, str], scores: dict[str, tuple[float, float]] | None = None
) -> RenderableType:
    """What a person reads at the end of train and eval; None where nothing was held out. Nothing is cut.

    `scores` are further figures of base and adapter, by name; `facts` are lines below it all.
    """
    parts: list[RenderableType] = []
    if comparison is None:
        parts.append(Text("nothing was held out, so there is nothing to compare"))
    else:
        parts += [_figures(comparison, scores or {}), Text(), *(_Side(answers) for answers in comparison.answers)]
    return Group(*parts, _pairs(facts.items()))


def _figures(comparison: Comparison, scores: dict[str, tuple[float, float]]) -> Table:
    base, adapter = comparison.base, comparison.adapter
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for header in ("", "base", "adapter", ""):
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    counted = f"{base.tokens:,} tokens of {base.rows:,} rows"
    table.add_row("held-out loss", _number(base.loss), _number(adapter.loss), "nats per token")
    table.add_row("perplexity", _number(base.perplexity), _number(adapter.perplexity), counted)
    for name, values in scores.items():
        table.add_row(name, *map(_number, values))
    return table


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 1e4 else f"{value:.3g}" if math.isfinite(value) else "over 1e304"


@dataclass(frozen=True)
class _Side:
    """One question and its answers: columns where the terminal is wide, else lines below each other."""

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
    """Text as it is: no markup is read from it, and control characters do not reach the terminal."""
    return Text(visible(value), overflow="fold")
