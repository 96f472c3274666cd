"""Find the cheapest changes of settings that make a run fit into a device's memory.

    advise(cfg, model_config, workload, machine)
        -> [Advice(["model.embedding_device=cpu", "train.tokens_per_microbatch=1024"], ...), ...]

    1. Strongest form of each lever alone, and of the cheapest levers together: those that fit are candidates.
    2. What a candidate does not need is dropped or weakened as far as it fits, the most costly first.
    3. The candidate is traced as a whole. If it does not fit after all, step 2 is repeated with less memory.

Steps 1 and 2 ask for many peaks, which memory/shallow.py estimates. Step 3 traces the model itself, or three of its
layers if they are alike and memory/deepened.py finds the same peak.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lora_ft import config
from lora_ft.data.packing import best_fit
from lora_ft.errors import LoraFtError
from lora_ft.memory import cards, workload
from lora_ft.memory.levers import Change, Lever, levers, longest_row
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.prediction import Prediction, Traces, estimated_peak, loading_peak, predict
from lora_ft.memory.workload import Workload

_TRIES = 3
_MOST = 5  # pieces of advice

Chosen = dict[Lever, int]
"""Index of the option of each lever in use."""


@dataclass(frozen=True)
class Advice:
    """Changes that make a run fit: the overrides to type, what is predicted with them, and what they cost.

    slowdown: of a step, 0.3 for 30 % more time; None if the times are not known.
    """

    changes: list[str]
    prediction: Prediction
    cost: str
    slowdown: float | None

    def __str__(self) -> str:
        slower = "" if self.slowdown is None else f", {round(100 * self.slowdown):+d} % time"
        return f"{' '.join(self.changes)}  ({self.prediction.needed_bytes / 2**30:.2f} GiB{slower}; {self.cost})"


def advise(
    cfg: config.TrainRun,
    model_config: Any,
    work: Workload,
    machine: Machine,
    traces: Traces | None = None,
    now: Prediction | None = None,
    is_loaded: bool = False,
) -> list[Advice]:
    """Return the changes with which a run fits, the cheapest first; each alone is enough. [] if none are, or unknown.

    now: the run without advice, with which times are compared. is_loaded: the base has been loaded, so only steps must
    fit. `traces` shares traces with `predict`. Raises ConfigError for a model that cannot be traced.
    """
    if machine.budget_bytes is None:
        return []
    search = _Search(cfg, model_config, work, machine, {} if traces is None else traces, now, is_loaded)
    found: dict[tuple[str, ...], tuple[tuple[float, ...], Advice]] = {}
    for group, needed in search.groups():
        if len(found) == _MOST:
            break
        if (made := search.verified(group, needed)) is not None:
            chosen, advice = made
            found.setdefault(tuple(advice.changes), (search.rank(chosen, advice.slowdown), advice))
    return [advice for _, advice in sorted(found.values(), key=lambda pair: pair[0])]


def nearest_hardware(prediction: Prediction) -> str | None:
    """Return the name in conf/hardware of the device with the least memory that has the predicted peak; None if none.

    Only GPUs that compute in the same way are looked at: with flash attention and bfloat16, or without.
    """
    now = prediction.machine
    tensors = prediction.needed_bytes - now.context_bytes
    for card in cards.cards():
        found = resolve(card.hardware, "cuda", rates=False)
        same = now.target.kind != "cuda" or found.target.has_flash >= now.target.has_flash
        if same and tensors + found.context_bytes <= (found.budget_bytes or 0):
            return card.choice
    return None


class _Search:
    """The search for one run; peaks of combinations are computed once."""

    def __init__(
        self,
        cfg: config.TrainRun,
        model_config: Any,
        work: Workload,
        machine: Machine,
        traces: Traces,
        now: Prediction | None,
        is_loaded: bool,
    ) -> None:
        self.model_config, self.work, self.machine, self.traces, self.now = model_config, work, machine, traces, now
        found = levers(cfg, model_config, work, machine)
        self.visible = [lever for lever in found if not lever.hidden]
        self.hidden = [lever for lever in found if lever.hidden]
        self.order = {lever: number for number, lever in enumerate(found)}
        self.cfg = cfg.with_train(
            gradient_checkpointing=cfg.train.gradient_checkpointing.replace("auto", "off"),
            tokens_per_microbatch=cfg.train.microbatch_limit,
        )
        self.peaks: dict[tuple[tuple[int, int], ...], float] = {}
        self.budget, self.is_loaded = machine.budget_bytes or 0, is_loaded

    def groups(self) -> Iterator[tuple[list[Lever], Lever | None]]:
        """Yield levers to find a candidate in, and the one that it must have: the cheapest ones, then each alone."""
        prefix = next((g for g in _prefixes(self.visible) if self.fits(self.strongest(g))), None)
        if prefix is None:
            return
        yield prefix, None
        cheap = [lever for lever in self.visible if not lever.quality]
        enough = self.fits(self.strongest(cheap))
        for lever in self.visible:
            if self.fits(self.strongest([lever])):
                yield [lever], lever
            elif lever.quality and not enough and lever not in prefix and self.fits(self.strongest([*cheap, lever])):
                yield [*cheap, lever], lever

    def strongest(self, group: Sequence[Lever]) -> Chosen:
        """Return the strongest options of levers, and of those that training uses by itself."""
        return {lever: len(lever.options) - 1 for lever in (*group, *self.hidden)}

    def verified(self, group: list[Lever], needed: Lever | None) -> tuple[Chosen, Advice] | None:
        """Return the least of these levers with which the model itself, traced, fits."""
        budget = float(self.budget)
        for _ in range(_TRIES):
            chosen = self.least(group, needed, budget)
            if chosen is None:
                return None
            found = self.predicted(chosen)
            peak = found.peak_bytes if self.is_loaded else found.needed_bytes
            if peak <= self.budget:
                return chosen, self.advice(chosen, found)
            budget -= peak - self.budget + 0.002 * self.budget
        return None

    def least(self, group: list[Lever], needed: Lever | None, budget: float) -> Chosen | None:
        """Drop or weaken what is not needed of these levers; None if all of them are not enough."""
        chosen = self.strongest(group)
        if not self.fits(chosen, budget):
            return None
        # As little as possible of the most costly lever, then of the next; what training does by itself comes last.
        for lever in sorted(chosen, key=lambda lever: (lever.hidden, -self.order[lever])):
            without = {each: option for each, option in chosen.items() if each != lever}
            if lever != needed and self.fits(without, budget):
                chosen = without
            else:
                chosen[lever] = self.weakest(chosen, lever, budget)
        return chosen

    def weakest(self, chosen: Chosen, lever: Lever, budget: float) -> int:
        """Return the first option of a lever that fits together with the others."""
        low, high = 0, chosen[lever]
        while low < high:
            middle = (low + high) // 2
            if self.fits({**chosen, lever: middle}, budget):
                high = middle
            else:
                low = middle + 1
        return high

    def fits(self, chosen: Chosen, budget: float | None = None) -> bool:
        """Return True if the estimated peak is within the budget."""
        key = tuple(sorted((self.order[lever], option) for lever, option in chosen.items()))
        if key not in self.peaks:
            try:
                self.peaks[key] = self.estimated(chosen)
            except LoraFtError:
                if not chosen or set(chosen) <= set(self.hidden):
                    raise
                self.peaks[key] = float("inf")  # a change that this model does not allow
        return self.peaks[key] <= (self.budget if budget is None else budget)

    def estimated(self, chosen: Chosen) -> float:
        """Return the peak with these levers, extrapolated from a few layers if the model has many."""
        cfg = self.changed(chosen)
        peak = estimated_peak(cfg, self.model_config, recut(self.work, cfg), self.machine, self.traces)
        return peak if self.is_loaded else max(peak, loading_peak(cfg, self.model_config, self.machine))

    def predicted(self, chosen: Chosen) -> Prediction:
        """Return the prediction with these levers, traced."""
        cfg = self.changed(chosen)
        return predict(cfg, self.model_config, recut(self.work, cfg), self.machine, self.traces, is_quick=True)

    def changed(self, chosen: Chosen) -> config.TrainRun:
        """Return the settings with these levers."""
        cfg = self.cfg
        for key, value in self.changes(chosen).items():
            cfg = _with(cfg, key, value)
        return cfg

    def changes(self, chosen: Chosen) -> Change:
        """Return the changes of these levers together; of one setting, the smallest size counts."""
        found: Change = {}
        for lever in sorted(chosen, key=lambda lever: self.order[lever]):
            for key, value in lever.options[chosen[lever]].items():
                sizes = key == "train.tokens_per_microbatch" and key in found
                found[key] = min(value, found[key]) if sizes else value
        return found

    def advice(self, chosen: Chosen, found: Prediction) -> Advice:
        visible = {lever: option for lever, option in chosen.items() if not lever.hidden}
        changes = [f"{key}={_typed(value)}" for key, value in self.changes(visible).items()]
        costs = [lever.cost for lever in sorted(visible, key=lambda lever: self.order[lever])]
        speed = found.tokens_per_second
        slowdown = self.speed / speed - 1 if speed and self.speed else None
        return Advice(changes, found, "; ".join(costs), slowdown)

    @functools.cached_property
    def speed(self) -> float | None:
        """Tokens per second without advice; None if they are not known."""
        return (self.now or self.predicted(self.strongest([]))).tokens_per_second

    def rank(self, chosen: Chosen, slowdown: float | None) -> tuple[float, ...]:
        """Return a key that sorts by what changes the result, then by time, then by the most costly lever."""
        used = sorted((self.order[lever] for lever in chosen if not lever.hidden), reverse=True)
        quality = max((self.order[lever] for lever in chosen if lever.quality), default=-1)
        return quality, round(slowdown or 0.0, 2), *used


def _prefixes(group: Sequence[Lever]) -> Iterator[list[Lever]]:
    return (list(group[:count]) for count in range(1, len(group) + 1))


def recut(work: Workload, cfg: config.TrainRun) -> Workload:
    """Return the work of a run with another micro-batch or shorter rows; micro-batches are as full as they may be."""
    if work.assumed:
        context = max(work.longest, max(work.largest))
        made = workload.of_settings(cfg, context)
        return dataclasses.replace(made, assumed=work.assumed if made.largest == work.largest else made.assumed)
    tokens, longest = sum(work.largest), min(longest_row(work), cfg.data.max_length)
    capacity = min(tokens, cfg.train.microbatch_limit or tokens)
    if capacity == tokens and longest == longest_row(work):
        return work
    lengths = [min(length, longest) for length in work.largest]
    bins = best_fit(lengths, capacity)
    fullest = max(([lengths[i] for i in indices] for indices in bins), key=sum)
    rest = capacity - sum(fullest)
    micro_batch = [*fullest, *([rest] if rest else [])]
    count = -(-work.typical_tokens // capacity)
    return dataclasses.replace(work, largest=micro_batch, typical=[micro_batch] * count, longest=longest)


def _with(cfg: Any, key: str, value: Any) -> Any:
    """Return a copy of a config with another value of a setting."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(cfg, **{name: _with(getattr(cfg, name), rest, value) if rest else value})


def _typed(value: Any) -> str:
    """Return a value as typed on the command line."""
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
