"""What a peer is given and what it prints: the one contract between the driver and the scripts beside this file.

    python peers/NAME.py CASE OUT VARIANT SEED        one training: CASE as written by case.py, an empty folder OUT
    python peers/NAME.py CASE OUT prepare 0           once before, where a trainer needs its own form of base or rows

    CASE/settings.json     what everybody trains with: `Settings`
    CASE/train.jsonl       {"messages": [...]} a line, for a trainer that tokenizes itself
    CASE/train_ids.jsonl   {"input_ids": [...], "labels": [...]} a line, the same rows; -100 is not supervised
    CASE/eval_ids.jsonl the rows of the common evaluation

The last line of a peer's output is an `Outcome` as JSON. Standard library only: every interpreter can read this file.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The common recipe: LoRA on every linear layer but the head, AdamW at a constant rate, fp32.

    model: transformers folder of the base. tokens_per_step: by seed, for trainers that count tokens instead of rows:
    the smallest step that cuts the same rows into the same number of steps.
    """

    model: str
    kind: str
    supervision: str
    steps: int
    rows_per_step: int
    tokens_per_step: list[int]
    r: int
    alpha: int
    lr: float
    clip: float


@dataclass(frozen=True)
class Outcome:
    """One training as its trainer saw it; lists have an entry a step.

    tokens: real ones, padding not counted. seconds: from the end of the step before (the first: from its forward).
    losses: as the trainer reports them. grad_norms: before clipping. first_forward: Unix time at which the forward
    of step 1 began. result: folder of a stock PEFT adapter, or of a transformers model with the adapter merged.
    """

    tokens: list[int]
    seconds: list[float]
    losses: list[float]
    grad_norms: list[float]
    first_forward: float
    result: str
    versions: dict[str, str]


@dataclass
class Stopwatch:
    """Collects an outcome: `forward` before each forward pass, `step` after each optimizer step."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    first_forward: float = 0.0
    _since: float = 0.0
    _pending: int = 0

    def forward(self, tokens: int) -> None:
        if not self.first_forward:
            self.first_forward, self._since = time.time(), time.perf_counter()
        self._pending += tokens

    def step(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.tokens.append(self._pending)
        self._since, self._pending = now, 0

    def learned(self, loss: float, grad_norm: float) -> None:
        self.losses.append(float(loss))
        self.grad_norms.append(float(grad_norm))

    def outcome(self, result: Path, *packages: str) -> Outcome:
        return Outcome(self.tokens, self.seconds, self.losses, self.grad_norms, self.first_forward, str(result),
                       versions(*packages))  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    case: Path
    out: Path
    variant: str
    seed: int
    settings: Settings


def arguments() -> Arguments:
    """The command line of a peer, with the settings that it names."""
    case, out, variant, seed = sys.argv[1:]
    settings = Settings(**json.loads((Path(case) / "settings.json").read_text("utf-8")))
    return Arguments(Path(case), Path(out), variant, int(seed), settings)


def token_rows(case: Path, part: str) -> list[dict[str, list[int]]]:
    """The rows of `part` (train, eval) as ids and labels."""
    return [json.loads(line) for line in (case / f"{part}_ids.jsonl").read_text("utf-8").splitlines()]


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", *packages)}


def report(outcome: Outcome) -> None:
    """Print the outcome as the last line of the output."""
    sys.stdout.flush()
    sys.stdout.write("\n" + json.dumps(asdict(outcome)) + "\n")


def parse(output: str) -> Outcome:
    """The outcome in a peer's output; ValueError where the last line is none."""
    lines = output.strip().splitlines()
    return Outcome(**json.loads(lines[-1] if lines else ""))
