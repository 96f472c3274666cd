"""From records of runs to verdicts, ratios, a table and a picture.

A record is one training as results/*.json holds it (`bench.py` writes it). Ratios are taken within a round, where both
trainers ran minutes apart on the same machine, and only then is their median taken: a machine that is slower for a
while moves both sides of a pair.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Gains = dict[str, dict[int, float]]  # by trainer and round

OURS = "ours:fp32"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

# All trainers take the same number of Adam steps at the same rate over the same rows, but in their own order and from
# their own random A. What that moves is measured as the spread of the others over rounds, which have seeds of their
# own: a trainer's own spread would excuse itself. The fixed part is for what seeds do not show: litgpt and padded
# batches weigh rows or batches of another make-up.
LARGEST_PART_OF_GAIN, SPREADS = 0.15, 3.0


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some measurements."""

    median: float
    lowest: float
    highest: float

    def shown(self, digits: int = 0) -> str:
        if self.lowest == self.highest:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.lowest:.{digits}f}-{self.highest:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def tokens_per_second(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Real tokens a second over all steps, so that every trainer is timed on the same rows.

    The first step costs more, for all. Without it the figure depends on which rows a trainer happens to take first:
    those that group rows by length begin with the longest batch, their slowest by far.
    """
    return sum(tokens) / sum(seconds)


def trainers(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["trainer"] for record in records))


def of(records: Sequence[Record], trainer: str) -> list[Record]:
    """The runs of a trainer that came to an end."""
    return [record for record in records if record["trainer"] == trainer and not record["error"]]


def ratios(records: Sequence[Record], trainer: str, other: str, key: str) -> list[float]:
    """trainer / other of a measurement, one for each round in which both came to an end."""
    by_round = {record["round"]: record[key] for record in of(records, other)}
    return [r[key] / by_round[r["round"]] for r in of(records, trainer) if r["round"] in by_round]


def project(trainer: str) -> str:
    return trainer.partition(":")[0]


def base(trainer: str) -> str:
    """The base that a trainer's adapter is judged on, and with whom: 4 bits lose so much that there is more to gain.

    8 bits lose next to nothing, and are judged on fp32 with all others.
    """
    return "nf4" if trainer.endswith(":nf4") else "fp32"


def verdicts(records: Sequence[Record], case_tokens: int, steps: int) -> dict[str, str]:
    """Why a trainer is out, by trainer; an empty string for one that learned what the others on its base learned."""
    faults = {t: [fault(r, case_tokens, steps) for r in records if r["trainer"] == t] for t in trainers(records)}
    found = {trainer: next(filter(None, reasons), "") for trainer, reasons in faults.items()}
    gains = {t: {r["round"]: gain(r) for r in of(records, t)} for t in found if not found[t]}
    for kind in ("fp32", "nf4"):
        found |= off_reference({trainer: by_round for trainer, by_round in gains.items() if base(trainer) == kind})
    return found


def fault(record: Record, case_tokens: int, steps: int) -> str:
    """What is wrong with one run, whatever the others did."""
    if record["error"]:
        return record["error"]
    if len(record["tokens"]) != steps or sum(record["tokens"]) != case_tokens:
        return f"{len(record['tokens'])} steps of {sum(record['tokens'])} tokens, not {steps} of {case_tokens}"
    if len(record["grad_norms"]) != steps or not all(0 < norm < math.inf for norm in record["grad_norms"]):
        return f"gradient norms {record['grad_norms']}"
    if not all(math.isfinite(loss) for loss in (*record["losses"], record["eval_loss"])):
        return "a loss is not finite"
    if gain(record) <= 0:
        return f"learned nothing: eval loss fell by {gain(record):.3f}"
    return ""


def gain(record: Record) -> float:
    """By how much the eval loss fell."""
    return record["base_eval_loss"] - record["eval_loss"]


def off_reference(gains: Gains) -> dict[str, str]:
    """Of trainers on one base: whose eval loss fell in any round by another amount than is usual in that round."""
    return {t: next(filter(None, (_difference(gains, t, number) for number in gains[t])), "") for t in gains}


def reference(gains: Gains, trainer: str, number: int) -> float:
    """What `trainer` is judged by in a round: the median over projects, one vote each, however many variants it has.

    Of two projects each is judged by the other: their mean would halve the distance.
    """
    votes: dict[str, list[float]] = {}
    for voter, by_round in gains.items():
        if number in by_round:
            votes.setdefault(project(voter), []).append(by_round[number])
    if len(votes) == 2:
        del votes[project(trainer)]
    return statistics.median(map(statistics.median, votes.values()))


def _difference(gains: Gains, trainer: str, number: int) -> str:
    found, usual = gains[trainer][number], reference(gains, trainer, number)
    of_seeds = seed_spread([list(gains[other].values()) for other in gains if other != trainer])
    tolerance = max(LARGEST_PART_OF_GAIN * usual, SPREADS * of_seeds)
    if abs(found - usual) <= tolerance:
        return ""
    much = "less" if found < usual else "more"
    return f"learned {much}: eval loss fell by {found:.3f}, usual is {usual:.3f} ± {tolerance:.3f}"


def seed_spread(gains: Sequence[Sequence[float]]) -> float:
    """Pooled standard deviation of the gains over rounds, within trainers; 0 where nobody ran twice."""
    degrees = sum(len(values) - 1 for values in gains)
    if not degrees:
        return 0.0
    squares = sum((x - statistics.mean(values)) ** 2 for values in gains for x in values)
    return math.sqrt(squares / degrees)


def table(records: Sequence[Record], found: dict[str, str]) -> str:
    """A Markdown table, the fastest trainer first, those that are out last; no ratio to or of one that is out."""
    lines = [
        "| trainer | real tokens/s | ours is faster by | peak memory, GB | first step after, s | eval loss | |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(trainers(records), key=lambda t: (bool(found[t]), -speed(records, t)))
    for trainer in order:
        done = of(records, trainer)
        cells = [f"**{trainer}**" if trainer == OURS else trainer]
        if done:
            compared = not (found[trainer] or found.get(OURS))
            faster = ratios(records, OURS, trainer, "tokens_per_second") if compared else []
            cells += [
                spread([r["tokens_per_second"] for r in done]).shown(),
                spread(faster).shown(2) if faster else "",
                spread([r["peak_tree_bytes"] / 1e9 for r in done]).shown(1),
                spread([r["first_step_seconds"] for r in done]).shown(1),
                spread([r["eval_loss"] for r in done]).shown(3),
            ]
        else:
            cells += [""] * 5
        lines.append(f"| {' | '.join(cells)} | {'OUT: ' + found[trainer] if found[trainer] else 'learned'} |")
    return "\n".join(lines)


def speed(records: Sequence[Record], trainer: str) -> float:
    return statistics.median([r["tokens_per_second"] for r in of(records, trainer)] or [0.0])


def section(case: Record) -> str:
    """A case of a results file as Markdown: what it is, its ceiling, its table."""
    records, rates = case["runs"], [rate / 1e9 for rate in case["gemm_flop_per_second"]]
    per_token = {name: count / case["tokens"] / 1e6 for name, count in case["flop"].items()}
    ceiling = statistics.median(rates) * 1e9 / (sum(per_token.values()) * 1e6)
    of_base = {base(r["trainer"]): r["base_eval_loss"] for r in records if not r["error"]}
    bases = ", ".join(f"{loss:.3f} ({kind})" for kind, loss in sorted(of_base.items()))
    counted = ", ".join(f"{name} {count:.0f}" for name, count in per_token.items())
    reached = case["verdicts"].get(OURS) == ""
    share = f" Ours reaches {speed(records, OURS) / ceiling:.0%} of it." if reached else ""
    lines = [
        f"### {case['name']}",
        "",
        f"Rows: {case['rows']}. {case['steps']} steps. Eval loss of the base: {bases}.",
        f"GEMM {spread(rates).shown()} GFLOP/s; a token needs {sum(per_token.values()):.0f} MFLOP ({counted}): "
        f"ceiling {ceiling:.0f} tokens/s.{share}",
        "",
        table(records, case["verdicts"]),
        "",
    ]
    return "\n".join(lines)


def document(results: Record) -> str:
    head = f"{results['date']}, {results['machine']}, {results['threads']} threads, {results['rounds']} rounds"
    return "\n".join([f"{head}; median (lowest-highest).", "", *map(section, results["cases"])]).rstrip()


def written_between(text: str, results: str) -> str:
    """A README's text with `results` between its two markers; ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def draw(results: Record, path: Path) -> None:
    """Bars of speed and of memory for every trainer that is not out, a row of two panels a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = results["cases"]
    figure, panels = pyplot.subplots(len(cases), 2, figsize=(11, 1 + 3.4 * len(cases)), squeeze=False)
    for (left, right), case in zip(panels, cases, strict=True):
        names = [t for t in trainers(case["runs"]) if not case["verdicts"][t]]
        names.sort(key=lambda trainer: speed(case["runs"], trainer))
        for axis, key, unit, title in (
            (left, "tokens_per_second", 1, "real tokens/s"),
            (right, "peak_tree_bytes", 1e9, "peak memory, GB"),
        ):
            found = [spread([r[key] / unit for r in of(case["runs"], name)]) for name in names]
            middle = [s.median for s in found]
            reach = [[s.median - s.lowest for s in found], [s.highest - s.median for s in found]]
            colors = ["#1f77b4" if name.startswith("ours") else "#b0b0b0" for name in names]
            axis.barh(names, middle, xerr=reach, color=colors, error_kw={"linewidth": 1})
            axis.set_title(f"{case['name']}: {title}", fontsize=10)
            axis.tick_params(labelsize=8)
    figure.suptitle(f"{results['date']}, {results['machine']}, {results['threads']} threads", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
