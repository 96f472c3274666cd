"""Make the rows of the tasks in docs/tasks.md, in the cache: ~/.cache/lora_ft/tasks/TASK/{train,validation,test}.csv

    python benchmarks/tasks/make_rows.py              every task
    python benchmarks/tasks/make_rows.py topic        one task; then: lora-ft train experiment=topic

The same command makes the same files, byte for byte. Rows of one group (the packages of one program, the sentences of
one template, the questions about one fact) are all in one split, and no text is in two.
"""

import argparse
import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import debian
import intents
import quiz

from lora_ft.errors import LoraFtError
from lora_ft.io import caches, durable

SPLITS = {"test": 0.15, "validation": 0.05, "train": 0.8}  # share of the groups

# The ten largest sections of Debian that name a subject, not a language or a kind of file.
TOPICS = ("net", "science", "admin", "games", "text", "sound", "graphics", "fonts", "web", "math")
OUTSIDE = "games"  # section that is not trained on in the task domain


@dataclass(frozen=True)
class Example:
    """A row and its group. key: text that no other split may have."""

    group: str
    key: str
    row: dict[str, str]


@dataclass(frozen=True)
class Task:
    """Rows of a task in the order of their use, and the most rows of each split."""

    examples: Callable[[], Iterable[Example]]
    train: int
    validation: int
    test: int


def topic() -> Iterator[Example]:
    """Yield synopsis and beginning of a description, and its section."""
    for d in debian.english().values():
        if d.section in TOPICS and d.text:
            text = first_words(f"{d.synopsis}. {d.text}", 25)
            yield Example(d.source, text, {"text": text, "label": d.section})


def intent() -> Iterator[Example]:
    for s in intents.sentences(each=4):
        yield Example(s.template, s.text, {"text": s.text, "label": s.intent})


def summarize() -> Iterator[Example]:
    """Yield descriptions of 25 to 80 words with their one-line synopsis."""
    for d in debian.english().values():
        if 25 <= len(d.text.split()) <= 80 and None not in d.paragraphs:
            yield Example(d.source, d.text, {"document": d.text, "summary": d.synopsis})


def translate() -> Iterator[Example]:
    """Yield paragraphs of 5 to 40 words with their German translation, where both texts have the same paragraphs."""
    german = debian.german()
    for md5, d in debian.english().items():
        if md5 in german and len(german[md5].paragraphs) == len(d.paragraphs):
            for source, target in zip(d.paragraphs, german[md5].paragraphs, strict=True):
                if source and target and source != target and 5 <= len(source.split()) <= 40:
                    yield Example(d.source, source, {"source": source, "target": target})


def answer() -> Iterator[Example]:
    for group, question, reply in quiz.questions():
        yield Example(group, question, {"question": question, "answer": reply})


def domain() -> Iterator[Example]:
    return texts(lambda section: section == "science")


def outside() -> Iterator[Example]:
    return texts(lambda section: section == OUTSIDE)


def texts(chosen: Callable[[str], bool]) -> Iterator[Example]:
    for d in debian.english().values():
        if chosen(d.section) and len(d.text.split()) >= 25:
            text = f"{d.synopsis}\n{first_words(d.text, 150)}"
            yield Example(d.source, text, {"text": text})


TASKS = {
    "topic": Task(topic, train=2000, validation=200, test=300),
    "intents": Task(intent, train=2000, validation=200, test=200),
    "summarize": Task(summarize, train=1500, validation=100, test=150),
    "translate_de": Task(translate, train=1500, validation=100, test=100),
    "answer": Task(answer, train=1500, validation=100, test=200),
    "domain": Task(domain, train=1500, validation=100, test=100),
    "outside": Task(outside, train=100, validation=100, test=100),
}


def split_rows(task: str, examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Split examples by the hash of their group, one of each key, in the order of the hash of their key."""
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    known: set[str] = set()
    for example in sorted(examples, key=lambda e: (digest(task, e.key), digest(task, e.group))):
        normal = " ".join(example.key.casefold().split())
        if normal not in known:
            known.add(normal)
            splits[split_of(task, example.group)].append(example)
    return splits


def split_of(task: str, group: str) -> str:
    share = int.from_bytes(digest(task, group)[:8]) / 2**64
    for name, part in SPLITS.items():
        if share < part:
            return name
        share -= part
    return "train"


def digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()


def first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def write(task: str, folder: Path) -> dict[str, int]:
    """Write the splits of a task as CSV files; return the number of rows of each."""
    made, counts = TASKS[task], {}
    durable.make_folder(folder)
    for name, examples in split_rows(task, made.examples()).items():
        if rows := [example.row for example in examples[: getattr(made, name)]]:
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            durable.write_text(folder / f"{name}.csv", text.getvalue())
            counts[name] = len(rows)
    return counts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}; all by default")
    wanted = parser.parse_args(arguments).tasks or list(TASKS)
    if unknown := set(wanted) - set(TASKS):
        parser.error(f"there is no task {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    for task in wanted:
        folder = caches.writable("tasks") / task
        try:
            counts = write(task, folder)
        except LoraFtError as error:
            print(f"{task}: {error}", file=sys.stderr)
            return error.exit_code
        except ModuleNotFoundError as error:
            print(f"{task}: the package {error.name} is missing: pip install 'lora_ft[tasks]'", file=sys.stderr)
            return 7
        print(f"{folder}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
