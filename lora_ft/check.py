"""Show what `train` would do with the same overrides, without loading weights: rows, loss mask, steps, layers, disk.

lora-ft check experiment=demo optim.lr=1e-4

rows.jsonl:3 (shortest): 24 tokens, 6 supervised
  <|im_start|>user↵
  How many legs has a spider?<|im_end|>↵
  <|im_start|>assistant↵
  ⟦Eight.<|im_end|>⟧
...
steps            40 of at most 1,024 tokens (median 980, smallest 700, largest 1,020), 1.3 epochs
learning rate    ▃▆██▇▇▆▆▅▅▄▄▃▃▂▂▁▁
                 1.25e-04 first, at most 5.00e-04 after 4 steps of warm-up, 9.51e-07 last

All errors are reported at once, with the exit code of the first that train would meet; warnings leave the exit code
at 0.
"""

import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lora_ft import config, runs, validation
from lora_ft.adapters.summary import Layers, left_out_lines
from lora_ft.classes import Classes
from lora_ft.cli import entry, terminal
from lora_ft.data.dataset import Dataset, Report
from lora_ft.data.examples import Examples
from lora_ft.data.mixed_dataset import read_sources
from lora_ft.data.rows import Example, excerpt
from lora_ft.data.tokenize import Vocabulary
from lora_ft.errors import LoraFtError
from lora_ft.memory import planning
from lora_ft.memory.machine import resolve
from lora_ft.memory.plan_page import verdict
from lora_ft.memory.planning import Plan
from lora_ft.memory.prediction import Prediction
from lora_ft.memory.roofline import launch_bound
from lora_ft.models.described import described
from lora_ft.models.load import load_tokenizer
from lora_ft.training.dry_run import (
    ErrorCollector,
    PartialDryRun,
    Rows,
    Steps,
    check_machine,
    partial_dry_run,
    read_rows,
)

log = logging.getLogger("lora_ft")

_BAR = 40  # columns
_LONG = 320  # characters of a part of a row; the middle of longer ones is left out
_MOST_PARTS = 9  # alternating supervised and masked parts of a row; the middle of more is left out
_LEVELS = "▁▂▃▄▅▆▇█"
_LONE_BLANK = re.compile(r"(?<= ) | (?= )|^ | $", re.MULTILINE)

Facts = Iterator[tuple[str, RenderableType]]


def main(cfg: config.CheckRun, invocation: entry.Invocation) -> None:
    """Print the dry run of a training, then raise its errors."""
    collect = ErrorCollector()
    if cfg.resume and runs.exists(invocation.folder):
        collect(validation.changes, runs.read_config(invocation.folder), cfg)
    collect(check_machine, cfg)
    if tokenizer := collect(load_tokenizer, cfg.model):
        found = partial_dry_run(collect, cfg, collect(read_rows, cfg, tokenizer), tokenizer, invocation.folder)
        plan = _planned(collect, cfg, found)
        found = replace(found, warnings=[*found.warnings, *(_memory_warnings(plan) if plan else ())])
        terminal.write(page(cfg, found, tokenizer, plan))
    else:
        collect(_raise_bad, cfg.data)
    collect.raise_errors()


def _raise_bad(data: config.Data) -> None:
    for rows in read_sources(data).values():
        rows.ledger.raise_bad()


def _planned(collect: ErrorCollector, cfg: config.CheckRun, found: PartialDryRun) -> Plan | None:
    """Return the plan of the run with its own rows; None if an error prevents it, or if its step cannot be traced."""
    if collect.errors or not (found.rows and found.layers):
        return None
    # Rates are measured where they tell something: on a GPU, whose steps may wait for launches.
    machine = collect(functools.partial(resolve, rates=torch.cuda.is_available()), cfg.hardware, cfg.device)
    base = collect(described, cfg.model)
    if machine is None or base is None:
        return None
    try:
        return planning.make_for(cfg, base, found.rows.dataset, machine, advice=False)
    except LoraFtError as error:
        log.warning("%s", error)
        return None


def _memory_warnings(plan: Plan) -> Iterator[str]:
    """Yield a warning if a run does not fit, or if a GPU would wait for launches in a step of median size."""
    found = plan.prediction
    if found.fits is False:
        yield f"the run {verdict(found)}; lora-ft plan with the same overrides lists what would make it fit"
    if warning := launch_bound(found.typical, sum(found.workload.typical_micro_batch), found.machine):
        yield warning


def page(cfg: config.TrainRun, found: PartialDryRun, tokenizer: Any, plan: Plan | None = None) -> RenderableType:
    """Lay out a dry run for the terminal: some rows, statistics of the rows, figures of the training, warnings."""
    parts: list[RenderableType] = []
    if found.rows:
        legend = "training rows: ⟦supervised⟧ and masked; · space, ↵ end of line, → tab"
        rows, classes = found.rows.dataset, found.rows.dataset.classes
        samples = [part for kind, row in _samples(rows) for part in _sample(kind, row, tokenizer, classes)]
        parts += [Text(legend, "bold"), Text(), *samples]
        parts += [Text("rows", "bold"), _table(_row_facts(cfg, found.rows)), Text()]
    if found.steps or found.layers:
        parts += [Text("training", "bold"), _table(_training_facts(cfg, found, plan)), Text()]
    parts += [Text(f"! {warning}", "yellow") for warning in found.warnings]
    if not found.warnings and found.disk:
        parts.append(Text("no warnings", "green"))
    return Group(*parts)


def _samples(dataset: Dataset) -> list[tuple[str, Example]]:
    """Choose up to three examples that differ the most in length, or one of median length of each source."""
    if dataset.parts:
        sides = {name: dataset.train[part.train.start : part.train.stop] for name, part in dataset.parts.items()}
        return [(f"median of {name}", side[_by_length(side)[len(side) // 2]]) for name, side in sides.items()]
    by_length = _by_length(dataset.train)
    chosen = {"shortest": by_length[0], "longest": by_length[-1], "median": by_length[len(by_length) // 2]}
    kinds = ("shortest", "longest", "median")[: len(dataset.train)]
    return [(kind, dataset.train[chosen[kind]]) for kind in kinds]


def _by_length(examples: Examples) -> list[int]:
    return [int(index) for index in np.argsort(examples.lengths, kind="stable")]


def _sample(kind: str, example: Example, tokenizer: Any, classes: Classes | None) -> Iterator[RenderableType]:
    supervised = int(example.supervised.sum())
    weights = [] if example.weights is None else sorted({f"{w:g}" for w in example.weights[example.supervised]})
    weighted = f" (weights {', '.join(weights)})" if weights else ""
    head = f"{excerpt(example.source)} ({kind}): {len(example.ids):,} tokens, {supervised:,} supervised{weighted}"
    yield Text(head, "dim")
    text = Text(overflow="fold")
    control = _control_tokens(tokenizer)
    vocabulary = Vocabulary(tokenizer)
    parts = _text_and_classes(example, vocabulary, classes) if classes else list(_parts(example, vocabulary))
    for part, learned in _shortened(parts):
        style = "green" if learned else "dim"
        text.append("⟦" if learned else "", style)
        for number, piece in enumerate(
            control.split(part)
        ):  # a space next to a control token is at the end of its part
            text.append(_marked(piece), "cyan" if number % 2 else style)
        text.append("⟧" if learned else "", style)
    yield Padding(text, (0, 0, 1, 2))


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches each added token but whitespace, as a group to split by."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)'})")


def _parts(example: Example, vocabulary: Vocabulary) -> Iterator[tuple[str, bool]]:
    """Yield alternating supervised and masked parts of a text.

    Some tokenizers drop a space before the first token, so a part is what its tokens add to the decoded text before it.
    """
    edges = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1).tolist(), len(example.ids)]
    before = ""
    for start, end in itertools.pairwise(edges):
        until = vocabulary.text(example.ids[:end].tolist())
        yield until[len(before) :], bool(example.supervised[start])
        before = until


def _text_and_classes(example: Example, vocabulary: Vocabulary, classes: Classes) -> list[tuple[str, bool]]:
    """Return the text of a classifier's document, and the names of its classes."""
    names = [classes.names[number] for number in example.ids[example.supervised] if number < len(classes.names)]
    return [(vocabulary.text(example.ids[~example.supervised].tolist()), False), (", ".join(names) or "no label", True)]


def _shortened(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    if (more := len(parts) - _MOST_PARTS) > 0:
        half = _MOST_PARTS // 2
        parts = [*parts[:half], (f"\n... {more + 1} more parts ...\n", False), *parts[-half:]]
    return [(_without_middle(text), learned) for text, learned in parts]


def _without_middle(text: str) -> str:
    if len(text) <= _LONG:
        return text
    return f"{text[: _LONG // 2]} ... {len(text) - _LONG:,} more characters ... {text[-_LONG // 2 :]}"


def _marked(text: str) -> str:
    """Make lone spaces and control characters visible."""
    return "".join(map(_spelled, _LONE_BLANK.sub("·", text)))


def _spelled(character: str) -> str:
    if character in "\n\t":
        return "↵\n" if character == "\n" else "→"
    if character.isprintable():
        return character
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )


def _row_facts(cfg: config.TrainRun, found: Rows) -> Facts:
    rows, seen = found.dataset.report, found.statistics
    left_out = "".join(f", {count:,} {reason} left out" for reason, count in rows.left_out.items())
    if rows.is_stream:
        yield "stream", f"the figures are those of the first {cfg.data.shuffle_buffer:,} rows (data.shuffle_buffer)"
    yield "read", f"{rows.rows:,} rows ({rows.format}), {rows.duplicates:,} duplicates{left_out}"
    for name, source in rows.sources.items():
        yield f"source {name}", _source(source)
    if rows.converted:
        yield "converted", "\n".join(f"{count:,} {what}" for what, count in rows.converted.items())
    if rows.unused:
        yield "not used", f"columns {excerpt(', '.join(rows.unused))}"
    if rows.labels:
        yield "labels", excerpt(", ".join(f"{label}: {count:,}" for label, count in rows.labels.items()), longest=400)
    yield "documents", f"{rows.train_documents:,} to train on, {rows.eval_documents:,} to evaluate on"
    classes = found.dataset.classes
    part = rows.supervised_tokens / rows.train_tokens
    learned = f"{rows.supervised_tokens:,} of them supervised ({part:.1%})"
    if classes:
        pairs = zip(classes.names, classes.counts, strict=True)
        yield "classes", excerpt(", ".join(f"{name} {count:,}" for name, count in pairs), longest=_LONG)
        learned = "the label of a row counted as one"
    yield "tokens", f"{rows.train_tokens:,} to train on, {learned}"
    limit = "" if rows.sources else f" (data.max_length={cfg.data.max_length})"
    longest = f"the longest {rows.longest:,} tokens{limit}"
    yield "length", f"median {seen.median:,.0f}, 95% have at most {seen.percentile_95:,.0f}, {longest}"
    yield "", _histogram(seen.histogram)
    if rows.truncated or rows.split:
        what = f"{rows.truncated:,} prompts cut" if rows.truncated else f"{rows.split:,} texts cut into windows"
        yield "too long", what if rows.sources else f"{what} (data.too_long={cfg.data.too_long.value})"
    yield (
        "begin",
        f"{seen.begun:,} of {rows.train_documents:,} with {seen.begin}"
        if seen.begin
        else "the tokenizer adds no token before text",
    )
    if not classes:
        ends = "".join(f"{count:,} with {end}, " for end, count in seen.ends.items())
        yield "end", ends + f"{seen.unended:,} with none"
    if seen.prompts:
        same, what = seen.prompts - len(seen.other_prompts), "tokenizer(text)" if classes else "the prompt"
        yield "prompts", f"{same} of {seen.prompts} examined equal {what} at inference, token by token"
    yield "overlap", f"{seen.asked_before:,} eval rows have the prompt of a training row"


def _source(report: Report) -> str:
    return (
        f"{report.rows:,} rows ({report.format}), {report.train_documents:,} documents of {report.train_tokens:,} "
        f"tokens to train on, {report.supervised_tokens:,} of them supervised, {report.eval_documents:,} to evaluate on"
    )


def _histogram(bins: list[tuple[int, int, int]]) -> Text:
    most = max(count for _, _, count in bins)
    width = len(f"{bins[-1][1]:,}")
    return Text("\n").join(
        Text(f"{low:>{width},} to {high:>{width},} ")
        .append("█" * -(-_BAR * count // most), "blue")
        .append(f" {count:,}")
        for low, high, count in bins
    )


def _training_facts(cfg: config.TrainRun, found: PartialDryRun, plan: Plan | None) -> Facts:
    if found.steps:
        yield from _step_facts(cfg, found.steps)
    if found.layers:
        yield from _layer_facts(cfg, found.layers)
    if plan:
        yield "memory", _memory(plan.prediction)
    if found.disk:
        yield (
            "disk",
            f"{_megabytes(found.disk.needed)} with checkpoints ({_megabytes(found.disk.adapter)} the adapter's "
            f"weights), {_megabytes(found.disk.free)} free",
        )


def _memory(found: Prediction) -> str:
    budget = found.machine.budget_bytes
    of_free = "" if budget is None else f" of {budget / 2**30:.1f} GiB free"
    fits = {True: ": fits", False: ": does not fit", None: ", free memory unknown"}[found.fits]
    recomputed = f", train.gradient_checkpointing={found.gradient_checkpointing}"
    return f"predicted peak {found.peak_bytes / 2**30:.2g}{of_free or ' GiB'}, in the {found.phase}{recomputed}{fits}"


def _step_facts(cfg: config.TrainRun, steps: Steps) -> Facts:
    yield (
        "steps",
        (
            f"{steps.count:,} of at most {cfg.train.tokens_per_step:,} tokens (median {steps.median:,.0f}, smallest "
            f"{steps.smallest:,}, largest {steps.largest:,}), {steps.epochs:.3g} epochs"
        ),
    )
    total = sum(source.supervised_tokens for source in steps.sources.values())
    for name, source in steps.sources.items():
        planned = f"{source.supervised_tokens:,} supervised tokens, {source.supervised_tokens / total:.1%}"
        passes = f"in {source.passes:.3g} passes" if source.share else "evaluated only"
        yield f"source {name}", f"{planned} (data.mix.{name}: {source.share:.1%}), {passes}"
    yield "learning rate", _curve(steps.rates)
    warmup = f" after {cfg.optim.warmup_steps:,} steps of warm-up" if cfg.optim.warmup_steps else ""
    yield "", f"{steps.first_rate:.2e} first, at most {steps.peak_rate:.2e}{warmup}, {steps.last_rate:.2e} last"


def _layer_facts(cfg: config.TrainRun, layers: Layers) -> Facts:
    yield "layers", f"{layers.count:,}: " + ", ".join(f"{n} {t}" for t, n in layers.targets.items())
    for line in left_out_lines(layers):
        yield "left out", line
    yield "trainable", f"{layers.trainable:,} parameters, {layers.trainable / layers.base:.2%} of {layers.base:,}"
    if layers.experts:
        yield "experts", f"{layers.experts:,} of these parameters, {layers.experts / layers.trainable:.1%}"
    rule = "lora_alpha / sqrt(r)" if cfg.adapter.use_rslora else "lora_alpha / r"
    frozen = ", ".join(f"{size / layers.base:.1%} {name}" for name, size in layers.frozen.items())
    yield "adapted", f"{layers.adapted / layers.base:.1%} of the base's weights; frozen: {frozen}"
    if layers.quantized:
        yield "quantized", f"{layers.quantized / layers.base:.1%} of the base's weights ({layers.quantization})"
    yield "scale", f"{' and '.join(f'{scale:.4g}' for scale in layers.scales)} ({rule})"


def _curve(rates: list[float]) -> str:
    return "".join(_LEVELS[min(int(len(_LEVELS) * rate / max(rates)), len(_LEVELS) - 1)] for rate in rates)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _table(facts: Iterable[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=13)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", Text(value) if isinstance(value, str) else value)
    return table


if __name__ == "__main__":
    entry.run("check")
