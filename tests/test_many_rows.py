"""Rows in chunks and processes: the same dataset, errors and hashes for any number of processes, in flat memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from echo import Echo
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_folder, tiny_tokenizer

from lora_ft.config import Data
from lora_ft.data import cache, columns, encoding, parsing, progress, row_store, workers
from lora_ft.data.columns import InMemory, Writer
from lora_ft.data.dataset import prepare
from lora_ft.data.row_store import RowWriter, packed
from lora_ft.data.rows import MOST_BAD_ROWS, Row
from lora_ft.data.split import choose_eval, content_hash, first_of_equal
from lora_ft.errors import DataError, ResourceError

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_chunks(monkeypatch):
    """Let a few rows be many: chunks of seven, of which the format is found from the first two, and small buffers."""
    monkeypatch.setattr(parsing, "FIRST_ROWS", 10)
    monkeypatch.setattr(encoding, "FIRST_ROWS", 10)
    monkeypatch.setattr(parsing, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(row_store, "_ROWS_AT_ONCE", 9)
    monkeypatch.setattr(columns, "_MOST_IN_MEMORY", 2000)
    monkeypatch.setattr(columns, "_READ_BYTES", 100)


def lines(tmp_path: Path, rows: list[object], name: str = "rows.jsonl") -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (tmp_path / name).write_text(text, "utf-8")
    return str(tmp_path / name)


def questions(count: int) -> list[object]:
    """Return rows of which each seventh equals the first, up to case."""
    return [
        {"prompt": "WHAT is 0" if n and n % 7 == 0 else f"What is {n % 7 and n}", "completion": "0.", "more": n}
        for n in range(count)
    ]


def outcome(data: Data) -> tuple[object, ...]:
    """Return everything that a dataset consists of, or its error."""
    try:
        found = prepare(data, TOKENIZER)
    except DataError as error:
        return (str(error),)
    examples = [(e.ids.tolist(), e.supervised.tolist(), e.source, e.row) for e in [*found.train, *found.eval]]
    prompts = [(p.prompt_ids.tolist(), p.prompt, p.answer, p.source) for p in found.eval_prompts]
    return found.report, examples, prompts, found.answers


NUMBERS = [(0, 1, 2), pytest.param((None, 0, 3, 5), marks=pytest.mark.nightly)]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("bad", [0, 3, 30], ids="{} bad rows".format)
def test_the_dataset_does_not_depend_on_the_number_of_processes(bad, numbers, tmp_path, small_chunks):
    rows = questions(60)
    for n in range(bad):  # found while a file is read, while a row is made of it, and while it is rendered
        rows.insert(7 + n, ['{"prompt"', {"prompt": "?"}, {"prompt": "a", "completion": "<|im_end|>"}][n % 3])
    settings = {"path": lines(tmp_path, rows), "eval_fraction": 0.2, "deduplicate": True}
    found = [outcome(Data(**settings, workers=number)) for number in numbers]
    assert found.count(found[0]) == len(found)
    if bad:
        assert found[0][0].startswith(f"{min(bad, MOST_BAD_ROWS)} bad rows")
    else:
        assert found[0][0].left_out == {"equal to an earlier row": 8}


def test_chunks_give_the_dataset_of_one_chunk(tmp_path, request):
    path = lines(tmp_path, questions(60))
    whole = outcome(Data(path=path, eval_fraction=0.2, workers=0))
    request.getfixturevalue("small_chunks")
    assert outcome(Data(path=path, eval_fraction=0.2, workers=0)) == whole
    assert not cache.folder().exists() or not list(cache.folder().iterdir())


def test_weights_of_some_chunks_are_beside_those_of_none(tmp_path, request):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [chat[0], {**chat[1], **({"weight": 0.5} if n in (20, 21) else {})}]} for n in range(40)]
    data = Data(path=lines(tmp_path, rows), eval_fraction=0, workers=0)
    whole = prepare(data, TOKENIZER)
    request.getfixturevalue("small_chunks")
    found = prepare(data, TOKENIZER)
    weights = [[None if e.weights is None else e.weights.tolist() for e in each.train] for each in (whole, found)]
    assert weights[0] == weights[1] and [n for n, each in enumerate(weights[0]) if each] == [20, 21]
    assert found.report.sha256 == whole.report.sha256


def test_a_row_of_another_shape_after_the_first_rows_is_a_bad_row(tmp_path, small_chunks):
    path = lines(tmp_path, [*questions(30), {"instruction": "a", "output": "b"}, {"prompt": "c", "completion": "d"}])
    with pytest.raises(DataError, match=r"^1 bad row:\n .*rows\.jsonl:31: prompt: is missing"):
        prepare(Data(path=path, workers=0), TOKENIZER)


def test_columns_of_late_rows_are_reported_as_not_used(tmp_path, small_chunks):
    rows = [*questions(30), {"prompt": "c", "completion": "d", "late": 1}]
    assert prepare(Data(path=lines(tmp_path, rows), workers=0), TOKENIZER).report.unused == ["more", "late"]


@pytest.mark.parametrize("number", [0, 1, 2, pytest.param(3, marks=pytest.mark.nightly)])
def test_results_come_in_the_order_of_the_tasks(number):
    tasks = [np.full(100_000, n) for n in range(8)]  # larger than the buffer of a pipe
    found = list(workers.mapped(Echo, ("x",), iter(tasks), number))
    assert [(own, int(task[0])) for own, task in found] == [("x", n) for n in range(8)]


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_is_raised_after_the_results_before_it(number):
    def tasks():
        yield from (1, 2, 3)
        raise DataError("unreadable")

    for given_tasks, message in ((iter([1, 2, 3, DataError("bad"), 4, 5]), "bad"), (tasks(), "unreadable")):
        results = workers.mapped(Echo, (0,), given_tasks, number)
        assert [next(results)[1] for _ in range(3)] == [1, 2, 3]
        with pytest.raises(DataError, match=message):
            next(results)
    with pytest.raises((RuntimeError, KeyError), match="a bug"):
        list(workers.mapped(Echo, (0,), iter([KeyError("a bug")]), number))


def test_a_process_that_dies_is_an_error_that_names_the_setting():
    with pytest.raises(ResourceError, match=r"was killed by SIGKILL: .*data\.workers=0"):
        list(workers.mapped(Echo, (0,), iter([1, 2, "die", 3, 4, 5]), 2))


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = """
import sys
from lora_ft.data import workers
pool = [workers._Worker(), workers._Worker()]
print(*(worker._process.pid for worker in pool), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = list(map(int, process.stdout.readline().split()))
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stdin.close(), process.stdout.close()
    assert all(_ends(child) for child in children)


def _ends(pid: int) -> bool:
    import time

    for _ in range(300):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.text(max_size=3), "content": st.text(st.characters(), max_size=5)}, optional={"x": JSON}
    ),
    max_size=3,
)
ROWS = st.lists(
    st.builds(
        Row, source=st.text(max_size=5) | st.integers(0, 10**20).map("a.jsonl:{}".format), messages=MESSAGES,
        answer=st.text(max_size=5), plain_prompt=st.none() | st.text(max_size=5),
        context=st.frozensets(st.integers(0, 9)), excluded=st.frozensets(st.integers(0, 9)),
        tools=st.none() | st.lists(JSON, max_size=2),
    ),
    max_size=12,
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(1, 5), st.data())
def test_stored_rows_are_the_rows_that_were_written(rows, size, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_store, "_ROWS_AT_ONCE", data.draw(st.integers(1, 5)))
        writer = RowWriter()
        for start in range(0, len(rows), size):
            writer.append(packed(rows[start : start + size]))
        stored = writer.finish()
        assert list(stored) == rows == [stored[i] for i in range(len(rows))] and len(stored) == writer.count
        assert list(stored.sources) == [row.source for row in rows]
        assert stored.is_chat.tolist() == [bool(row.messages) for row in rows]
        kept = np.array(sorted(data.draw(st.sets(st.integers(0, len(rows) - 1) if rows else st.nothing()))), np.int64)
        selected = stored.select(kept)
        assert list(selected) == [rows[i] for i in kept] and list(selected.sources) == [rows[i].source for i in kept]
        assert (selected.digest == stored.digest) is (len(kept) == len(rows))


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=20), st.floats(0, 0.99))
def test_eval_rows_and_duplicates_are_those_of_whole_hashes(numbers, fraction):
    rows = [Row("x", [], str(n)) for n in numbers]
    whole = [content_hash(row) for row in rows]
    hashes = packed(rows).columns["hashes"]
    assert hashes.astype(">u8").tobytes() == b"".join(h[:16] for h in whole)
    smallest, largest = min(whole, default=b""), max(whole, default=b"")
    expected = [
        len(set(whole)) > 1
        and fraction > 0
        and (h == smallest or (h != largest and int.from_bytes(h[:8], "big") < fraction * 2**64))
        for h in whole
    ]
    assert choose_eval(hashes, fraction).tolist() == expected
    assert first_of_equal(hashes).tolist() == sorted({h: i for i, h in reversed(list(enumerate(whole)))}.values())


def test_large_columns_are_in_files_that_have_no_name(tmp_path, small_chunks, monkeypatch):
    expected = np.arange(3000, dtype=np.int32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writer, scratch = Writer(), tmp_path / "lora_ft" / "rows"
    for start in range(0, 3000, 600):
        writer.append(ids=expected[start : start + 600], pairs=np.ones((2, 2), np.int64))
    assert len(list(scratch.iterdir())) == 2
    found = writer.finish()
    assert list(scratch.iterdir()) == []
    assert found.read("ids", 17, 2500).tolist() == expected[17:2500].tolist()
    assert columns.whole(found, "pairs").shape == (10, 2) and found.count("ids") == 3000
    columns.save(tmp_path / "saved", found, {"a": "b"})
    again, metadata = columns.load(tmp_path / "saved")
    assert metadata == {"a": "b"} and columns.checksum(again) == columns.checksum(found)
    in_memory = InMemory({name: columns.whole(found, name) for name in found.names()})
    assert columns.checksum(in_memory) == columns.checksum(found)


def test_without_a_cache_folder_rows_are_kept_in_the_temporary_folder(tmp_path, small_chunks, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file, not a folder")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert len(prepare(Data(path=lines(tmp_path, questions(60)), eval_fraction=0, workers=0), TOKENIZER).train) == 60
    [folder] = (tmp_path / "tmp").iterdir()  # removed when the process ends
    assert f"using the temporary folder {folder}" in caplog.text
    assert list(folder.iterdir()) == []


def test_the_cache_keeps_what_was_used_last(tmp_path, monkeypatch):
    stored = InMemory({"ids": np.zeros(1000, np.int32)})
    for name, age in (("old", 40 * 86400), ("unused", 3 * 86400), ("used", 2 * 86400)):
        cache.store(name, stored, {})
        path = cache.folder() / f"{name}.safetensors"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    (cache.folder() / "ids.tmp-0123abcd").write_bytes(b"left by a run that was killed")
    os.utime(cache.folder() / "ids.tmp-0123abcd", (0, 0))
    assert cache.load("unused") and cache.load("used") is not None
    os.utime(cache.folder() / "unused.safetensors", (10**9 * 1.7, 10**9 * 1.7))
    monkeypatch.setattr(cache, "_UNUSED_SECONDS", 10**9)
    monkeypatch.setattr(cache, "_MOST_BYTES", 9000)
    cache.store("new", stored, {})
    assert sorted(path.name for path in cache.folder().iterdir()) == ["new.safetensors", "used.safetensors"]


def test_progress_is_shown_after_a_second_with_rows_per_second(monkeypatch):
    now, shown = [0.0], []

    def slow(count: int):
        for _ in range(count):
            now[0] += 0.4
            yield 100

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.shown_by(shown.append):
        assert list(progress.counted("reading rows", slow(2), int)) == [100, 100]
        assert shown == []
        list(progress.counted("tokenizing rows", slow(4), int, 1000))
    assert shown == [
        "tokenizing rows  300 of 1,000  250 rows/s  0:03 left",
        "tokenizing rows  400 of 1,000  250 rows/s  0:02 left",
        "",
    ]


def test_progress_is_not_printed_into_a_pipe(capfd, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN", 0.0)
    assert list(progress.counted("reading rows", [1, 2], int)) == [1, 2]
    assert capfd.readouterr() == ("", "")


_PEAK = """
import resource, sys
from lora_ft.config import Data
from lora_ft.data.dataset import prepare_rows
from lora_ft.data.read import read
from lora_ft.data.statistics import measure
from lora_ft.models.load import load_tokenizer
from lora_ft import config
import lora_ft.training.state

data = Data(path=sys.argv[1], workers=0)
tokenizer = load_tokenizer(config.Model(path=sys.argv[2]))
found = read(data)
dataset = prepare_rows(found, data, tokenizer)
measure(found, dataset, data, tokenizer)
lora_ft.training.state.plan_steps(dataset.train, config.Train(), 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.nightly
def test_peak_memory_is_flat_in_the_number_of_rows(tmp_path):
    base, peaks = tiny_folder(tmp_path, "llama"), []
    for count in (10_000, 100_000):
        path = lines(
            tmp_path, [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(count)]
        )
        ended = subprocess.run(
            [sys.executable, "-c", _PEAK, path, str(base)], capture_output=True, text=True, check=True
        )
        peaks.append(int(ended.stdout))
    assert peaks[1] < 1.06 * peaks[0]
