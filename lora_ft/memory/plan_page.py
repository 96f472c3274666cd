"""Lay out a plan for the terminal: the terms of the peak, the verdict, the step as a picture, the run, the advice.

memory at the peak, in the backward          GiB   share   source
  base weights, nf4                         3.20    41 %   traced
  ...
fits: 7.9 of 23.0 GiB, 15.1 GiB left
"""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_ft.memory.plan_bars import bars
from lora_ft.memory.planning import Plan
from lora_ft.memory.prediction import Prediction
from lora_ft.memory.roofline import LEFT_OUT

GIB = 2**30
WIDTH = 100

Facts = Iterator[tuple[str, str]]


def page(plan: Plan) -> RenderableType:
    """Return the whole page."""
    found = plan.prediction
    parts: list[RenderableType] = [Text(title(plan), "bold"), Text()]
    parts += [_terms(found), verdict_line(found), Text()]
    parts += [Text("memory over a step, GiB", "bold"), *bars(found, WIDTH), Text()]
    parts += [Text("run", "bold"), _facts(run_facts(plan)), Text()]
    parts += [Text("files", "bold"), _facts(file_facts(plan))]
    parts += _advice(plan)
    return Group(*parts)


def title(plan: Plan) -> str:
    """Return the run and the machine in one line."""
    cfg = plan.cfg
    base = plan.base.hub_id or cfg.model.path
    quant = "" if cfg.quant.kind.value == "none" else f" in {cfg.quant.kind.value}"
    return f"{base}{quant}, LoRA of rank {cfg.adapter.r}, on {plan.prediction.machine.name}"


def verdict(found: Prediction) -> str:
    """Return the verdict in one line: fits: 7.9 of 23.0 GiB."""
    needed, budget = found.needed_bytes / GIB, found.machine.budget_bytes
    when = " while the base is loaded" if found.loading_bytes > found.peak_bytes else ""
    if budget is None:
        return f"needs {_gib(needed)} GiB{when}; the memory of {found.machine.name} is not known"
    return f"{'fits' if found.fits else 'does not fit'}: {_gib(needed)} of {_gib(budget / GIB)} GiB{when}"


def verdict_line(found: Prediction) -> Text:
    """Return the verdict in its colour."""
    return Text(verdict(found), {True: "bold green", False: "bold red", None: "bold yellow"}[found.fits])


def _gib(amount: float) -> str:
    return f"{amount:.1f}" if amount >= 0.95 else f"{amount:.2f}"


def _terms(found: Prediction) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"memory at the peak, in the {found.phase}", min_width=34)
    for name in ("GiB", "share"):
        table.add_column(name, justify="right")
    table.add_column("source", overflow="fold")
    for term in found.terms:
        source = f"{term.source}: {term.note}" if term.note else term.source
        table.add_row(
            f"  {term.name}", hundredths(term.bytes), share(term.bytes, found.peak_bytes), Text(source, "dim")
        )
    table.add_row(Text("  peak", "bold"), Text(f"{found.peak_bytes / GIB:.2f}", "bold"), "", "")
    if found.loading_bytes > found.peak_bytes:
        table.add_row("  while the base is loaded", f"{found.loading_bytes / GIB:.2f}", "", "")
    machine = found.machine
    if machine.budget_bytes is not None and found.left_bytes is not None:
        others = f"{machine.memory_bytes / GIB:.1f} GiB" if machine.memory_bytes else ""
        if machine.used_bytes:
            source = machine.sources.get("used_bytes", "")
            others += f" less {machine.used_bytes / GIB:.1f} GiB that others use" + (f" ({source})" if source else "")
        table.add_row("  budget", f"{machine.budget_bytes / GIB:.2f}", "", Text(others, "dim"))
        table.add_row("  left", f"{found.left_bytes / GIB:.2f}", "", "")
    return table


def _advice(plan: Plan) -> list[RenderableType]:
    """Lay out the changes that make the run fit, each with the overrides to type."""
    if not plan.advice:
        if plan.nearest_hardware:
            return [Text(), Text(f"no change makes it fit on this device; it fits on hardware={plan.nearest_hardware}")]
        return []
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", min_width=4)
    table.add_column(overflow="fold")
    for number, each in enumerate(plan.advice, 1):
        change = "same" if abs(each.slowdown or 0) < 0.005 else f"{each.slowdown:+.0%}"
        slower = "" if each.slowdown is None else f", {change} time"
        table.add_row(f"{number}.", Text(" ".join(each.changes), "cyan"))
        table.add_row("", Text(f"peak {hundredths(each.prediction.needed_bytes)} GiB{slower}: {each.cost}", "dim"))
    effect = "saves memory" if plan.prediction.fits else "makes it fit"
    return [Text(), Text(f"each of these {effect}, the cheapest first", "bold"), table]


def hundredths(count: int) -> str:
    """Return bytes in GiB."""
    return f"{count / GIB:.2f}" if count >= 0.005 * GIB else "<0.01"


def share(count: int, whole: int) -> str:
    """Return a part in per cent of a whole."""
    return f"{count / whole:.0%}" if count >= 0.005 * whole else "<1%"


def _facts(facts: Facts) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=15)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", Text(value))
    return table


def run_facts(plan: Plan) -> Facts:
    """Yield names and values of the run: rows, micro-batch, step, time."""
    work, train = plan.prediction.workload, plan.cfg.train
    yield "rows", f"assumed: {work.assumed}" if work.assumed else "lengths of the run's own rows"
    documents = f"{len(work.largest)} rows" if len(work.largest) > 1 else "1 row"
    yield "micro-batch", f"at most {sum(work.largest):,} tokens, {documents}"
    yield "step", f"{work.typical_tokens:,} tokens in {_several(len(work.typical), 'micro-batch')}"
    yield "recomputed", _recomputed(train.gradient_checkpointing)
    steps = f"{work.steps:,} steps, " if work.steps else ""
    epochs = f", {work.epochs:.3g} epochs" if work.epochs else ""
    known = f"{steps}{work.tokens:,} tokens{epochs}" if work.tokens else "not known without rows (data=)"
    yield "length", known
    yield from _time_facts(plan)


def _time_facts(plan: Plan) -> Facts:
    time, machine = plan.prediction.time, plan.prediction.machine
    if time is None or not plan.tokens_per_second:
        yield "speed", f"not known: give the rates of {machine.name}, as in hardware.bandwidth and hardware.bf16_tflops"
        return
    yield "speed", f"{plan.tokens_per_second:,.0f} tokens/s, within {time.error:.0%}; bound by {time.bound_by}"
    parts = ", ".join(
        f"{part} {duration(seconds)}" for part, seconds in time.by_part.items() if seconds > 0.005 * time.seconds
    )
    yield "step takes", f"{duration(time.seconds)} ({parts})"
    sources = {machine.sources.get(name, "") for name in ("matmul", "bandwidth")} - {""}
    if sources:
        yield "rates", "; ".join(sorted(sources))
    if plan.seconds:
        yield "run takes", f"{duration(plan.seconds)}, without {LEFT_OUT}"


def _several(count: int, name: str) -> str:
    plural = "es" if name.endswith("ch") else "s"
    return f"{count:,} {name}{plural if count != 1 else ''}"


def _recomputed(setting: str) -> str:
    every = setting.removeprefix("every_")
    layers = {"off": "no layer", "1": "every layer"}.get(every, f"one layer in {every}")
    return f"{layers} (train.gradient_checkpointing={setting})"


def file_facts(plan: Plan) -> Facts:
    """Yield names and values of what is downloaded, loaded and written."""
    stored = plan.storage
    yield "config", plan.base.source
    assumed = f" (assumed: {stored.assumed})" if stored.assumed else ""
    yield "download", "nothing, the base is here" if plan.base.here else f"{size(stored.download_bytes)}{assumed}"
    if stored.converted_bytes:
        yield "converted once", size(stored.converted_bytes)
    checkpoints = "with its checkpoints" if plan.prediction.workload.steps else "with checkpoints, if it has many steps"
    yield "run folder", f"{size(stored.run_bytes)} {checkpoints}; adapter file {size(stored.adapter_file_bytes)}"
    yield "loading", ", ".join(_loading(plan))


def _loading(plan: Plan) -> Iterator[str]:
    stored, machine = plan.storage, plan.prediction.machine
    if machine.target.kind == "cuda":
        yield f"{hundredths(stored.loading_device_bytes + machine.context_bytes)} GiB of the GPU"
    yield f"{size(stored.loading_host_bytes)} of main memory and {size(stored.mapped_bytes)} of mapped files"


def duration(seconds: float | None) -> str:
    """Return a time in two units: 2 h 5 min."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        if seconds < 1:
            return f"{seconds * 1e3:.0f} ms"
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: int) -> str:
    """Return bytes on a disk."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
