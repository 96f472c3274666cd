"""Rows of the tasks: read from lists as Debian writes them, the same each time, no group or text in two splits."""

import bz2
import csv
import hashlib
import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lora_ft import config
from lora_ft.data.read import read
from lora_ft.errors import DataError, ResourceError, SecurityError

TASKS = Path(__file__).parents[1] / "benchmarks" / "tasks"
sys.path.insert(0, str(TASKS))

import debian  # noqa: E402
import downloads  # noqa: E402
import intervals  # noqa: E402
import make_rows  # noqa: E402
import quiz  # noqa: E402
import tfidf  # noqa: E402

WORDS = "a small tool that draws maps of the sky and prints them for people who look at stars every night with care"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose downloads are lists of 60 programs with two packages each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packages, english, german = "", "", ""
    for n in range(120):
        source, section = f"source{n // 2}", make_rows.TOPICS[n // 2 % 10]
        body = f"Number {n} is {WORDS}. It is good.\n .\n Then comes paragraph {n}: {WORDS}.\n .\n  * a list"
        packages += f"Package: p{n}\nSource: {source} (1.0)\nDescription-md5: {n}\nSection: {section}\n\n"
        english += f"Package: p{n}\nDescription-md5: {n}\nDescription-en: synopsis {n}\n {body}\n\n"
        german += f"Package: p{n}\nDescription-md5: {n}\nDescription-de: Kurz {n}\n Nummer {n}.\n .\n Absatz {n}.\n\n"
    folder = tmp_path / "lora_ft" / "tasks" / "downloads"
    folder.mkdir(parents=True)
    contents = {
        "Packages.xz": lzma.compress(packages.encode()),
        "Translation-en.xz": lzma.compress(english.encode()),
        "Translation-de.bz2": bz2.compress(german.encode()),
        "bsdgames.deb": deb({subject: "one:{1 }eins|1:uno:ein\n" for subject, _, _ in quiz.QUESTIONS}),
    }
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = (downloads.FILES[name][0], hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(downloads, "FILES", files)
    debian.english.cache_clear()
    debian.german.cache_clear()
    yield tmp_path
    debian.english.cache_clear()
    debian.german.cache_clear()


def deb(files: dict[str, str]) -> bytes:
    """Return a Debian package with these files of the quiz."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"./usr/share/games/bsdgames/quiz/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode("latin-1")))
    members = {"debian-binary": b"2.0\n", "data.tar.xz": inner.getvalue()}
    parts = [f"{name:<16}{'0':<32}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
             for name, data in members.items()]  # fmt: skip
    return b"!<arch>\n" + b"".join(parts)


def test_stanzas_and_paragraphs_are_read_as_debian_writes_them() -> None:
    text = "Package: a\nTag: x,\n y\nDescription-en: S\n First\n line.\n .\n  code\n .\n Last.\n\nPackage: b\n\n"
    first, second = debian.stanzas(text)
    assert (first["Tag"], second) == ("x,\n y", {"Package": "b"})
    assert debian.paragraphs(first["Description-en"].partition("\n")[2]) == ("First line.", None, "Last.")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("{John {F{.} }}Kennedy|JFK", "John F. Kennedy"),
        ("W[illia|]m [I|1|the Conqueror]", "William I"),
        ("To be{,} or not to be{\\:}", "To be, or not to be:"),
        ("C[^\bo|o\b^|o]te", "Cote"),
        ("Yaound['\be|e\b'|e]", "Yaounde"),
    ],
)
def test_pattern_of_the_quiz_is_read_in_its_longest_form(pattern: str, text: str) -> None:
    assert quiz.longest(pattern) == text
    assert quiz.split("a\\:b:c") == ["a:b", "c"] and quiz.lines("a:\\\nb\n\nc") == ["a:b", "c"]


@pytest.mark.parametrize("task", ["topic", "summarize", "translate_de", "domain", "outside", "answer"])
def test_rows_are_the_same_each_time_and_no_group_or_text_is_in_two_splits(task: str, cache: Path) -> None:
    examples = list(make_rows.TASKS[task].examples())
    splits = make_rows.split_rows(task, examples)
    assert make_rows.split_rows(task, reversed(examples)) == splits
    found = [(name, e) for name, part in splits.items() for e in part]
    for of in (lambda e: e.group, lambda e: e.key.casefold()):
        places = {(of(e), name) for name, e in found}
        assert len(places) == len({value for value, _ in places})
    assert len({e.key for _, e in found}) == len(found) == len({e.key for e in examples})


def test_written_rows_are_read_with_their_splits(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_rows.main(["topic", "translate_de"]) == 0
    folder = cache / "lora_ft" / "tasks" / "topic"
    rows = {path.stem: list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) for path in folder.glob("*.csv")}
    assert set(rows) == {"train", "validation", "test"} and rows["train"][0].keys() == {"text", "label"}
    data = config.Data(path="cache:tasks/topic", format=config.Format.table, prompt="{text}", answer="{label}")
    found = read(data)
    assert len(found.training_rows) == len(rows["train"]) and len(found.eval_rows) == len(rows["validation"])
    assert str(folder) in capsys.readouterr().out


def test_file_that_differs_or_cannot_be_fetched_is_an_error_with_advice(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache / "lora_ft" / "tasks" / "downloads" / "Packages.xz"
    path.write_bytes(b"other")
    with pytest.raises(
        ResourceError, match=r"Packages.xz is not the file of Debian 12.15: its sha256 is .* save it as"
    ):
        downloads.file("Packages.xz")
    path.unlink()
    monkeypatch.setattr(downloads, "MIRROR", "http://127.0.0.1:9/")
    assert make_rows.main(["topic"]) == 7
    shown = capsys.readouterr().err
    assert "cannot be fetched" in shown and str(path) in shown and not path.exists()
    with pytest.raises(SystemExit):
        make_rows.main(["topics"])
    assert "there is no task topics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "cache:tasks/topic",
            DataError,
            r"there is no cache:tasks/topic \(.*\); make it: python benchmarks/tasks/make",
        ),
        ("cache:tasks/../../x", SecurityError, "leads out of the cache"),
        ("cache:tasks", DataError, "must have the form cache:KIND/FOLDER"),
    ],
)
def test_rows_that_are_not_in_the_cache_are_reported(
    path: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(error, match=message):
        read(config.Data(path=path))


def test_intervals_hold_the_metric_and_shrink_with_rows() -> None:
    answers, references = ["a b", "c", "d"] * 20, ["a c", "c", "e"] * 20
    for name, value in {"exact_match": 1 / 3, "rouge_l": 0.5}.items():
        low, high = intervals.of_answers(name, answers, references)
        assert low < value < high
        wider = intervals.of_answers(name, answers[:12], references[:12])
        assert wider[1] - wider[0] > high - low
    assert intervals.of_mean([1.0] * 5) == (1.0, 1.0)


def test_tfidf_learns_words_and_its_macro_f1_is_that_of_sklearn() -> None:
    from sklearn.metrics import f1_score

    train = ([f"good film {n}" for n in range(9)] + [f"bad film {n}" for n in range(9)], ["pos"] * 9 + ["neg"] * 9)
    found = tfidf.scores(train, (["a good one", "a bad one", "good"], ["pos", "neg", "pos"]))
    assert (found["accuracy"], found["macro_f1"], found["train_rows"]) == (1.0, 1.0, 18)
    texts = [str(n) for n in range(20)]
    assert tfidf.drawn(texts, texts, None) == (texts, texts)
    some = tfidf.drawn(texts, texts, 5)
    assert some == (tfidf.drawn(texts, texts, 20)[0][:5],) * 2
    rng = np.random.default_rng(0)
    labels, predicted = (rng.choice(np.array(["a", "b", "c"]), 50) for _ in range(2))
    assert tfidf.classified(labels, predicted).metrics["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro")
    )
