"""Selected rows: data.where keeps the rows whose columns have its values, and counts the others."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_ft.config import Data
from lora_ft.data import where
from lora_ft.data.read import read
from lora_ft.data.rows import Ledger
from lora_ft.errors import ConfigError

ROWS = [
    {"prompt": f"p{n}", "completion": "c", "source": source, "label": label, "ok": ok}
    for n, (source, label, ok) in enumerate(
        [("rotten_tomatoes", 0, True), ("imdb", 1, False), ("rotten_tomatoes", 1, None), ("a, b", -2, True)]
    )
]


def select(where_: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> tuple[list[str], dict[str, int]]:
    ledger = Ledger()
    found = where.selected([(str(n), row) for n, row in enumerate(rows)], where_, "a.jsonl", ledger)
    return [row["prompt"] for _, row in found], dict(ledger.left_out)


@pytest.mark.parametrize(("where_", "kept"), [
    ({"source": "rotten_tomatoes"}, "p0 p2"),
    ({"source": "[rotten_tomatoes,imdb]"}, "p0 p1 p2"),
    ({"source": ["rotten_tomatoes", "imdb"]}, "p0 p1 p2"),
    ({"source": '["a, b", imdb]'}, "p1 p3"),
    ({"source": "a, b"}, "p3"),
    ({"label": "1"}, "p1 p2"), ({"label": 1}, "p1 p2"), ({"label": "[0,-2]"}, "p0 p3"), ({"label": [0, "-2"]}, "p0 p3"),
    ({"ok": "true"}, "p0 p3"), ({"ok": True}, "p0 p3"), ({"ok": "null"}, "p2"), ({"ok": None}, "p2"),
    ({"source": "rotten_tomatoes", "label": "1"}, "p2"),
])  # fmt: skip
def test_rows_with_the_values_are_kept_and_the_others_counted(where_, kept):
    expected = kept.split()
    left_out = {where.LEFT_OUT: len(ROWS) - len(expected)} if len(expected) < len(ROWS) else {}
    assert select(where_) == (expected, left_out)


def test_a_row_without_the_column_is_left_out():
    assert select({"a": "null"}, [{"prompt": "p", "a": None}, {"prompt": "q"}]) == (["p"], {where.LEFT_OUT: 1})


@pytest.mark.parametrize(("where_", "message"), [
    ({"sorce": "imdb"}, r"data\.where\.sorce: no row of a\.jsonl has this column; there are prompt, completion, so"),
    ({"source": "imbd"}, r"data\.where\.source: no row of a\.jsonl has the value imbd; there are rotten_tomatoes, i"),
    ({"source": "[imdb,x]"}, r"no row of a\.jsonl has the value x;"),
    ({"label": "1.0"}, r"has the value 1\.0; there are 0, 1, -2"),
    ({"ok": "True"}, r"has the value True; there are true, false, null"),
    ({"source": "imdb", "label": "0"}, r"data\.where: no row of a\.jsonl has all of these values: source, label"),
    ({"source": "[]"}, "has all of these values: source"),
    ({"source": {"a": "b"}}, r"data\.where\.source must be a value or a list"),
    ({"source": [["a"]]}, r"data\.where\.source must be a value or a list"),
])  # fmt: skip
def test_a_column_or_value_that_no_row_has_is_an_error_with_the_known_ones(where_, message):
    with pytest.raises(ConfigError, match=message):
        select(where_)


def test_at_most_ten_known_values_are_named():
    rows = [{"prompt": "p", "n": n} for n in range(50)]
    with pytest.raises(ConfigError, match=r"there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        select({"n": "50"}, rows)
    with pytest.raises(ConfigError, match=r"there are c0, c1, .*c9, \.\.\.$"):
        select({"m": "50"}, [{f"c{n}": n for n in range(50)}])


def files(folder: Path) -> list[Path]:
    """Write the rows as JSON lines, JSON, CSV and Parquet."""
    rows = [{**row, "ok": str(row["ok"])} for row in ROWS]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(rows))
    header = "prompt,completion,source,label,ok\n"
    (folder / "a.csv").write_text(header + "".join(",".join(f'"{v}"' for v in row.values()) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return sorted(folder.iterdir())


def test_values_select_the_same_rows_of_every_format_before_columns_are_renamed(tmp_path):
    for file in files(tmp_path):
        data = Data(path=str(file), where={"source": "rotten_tomatoes", "label": "[0,1]"}, eval_fraction=0)
        found = read(data)
        assert [row.messages[0]["content"] for row in found.rows] == ["p0", "p2"]
        assert found.ledger.left_out[where.LEFT_OUT] == 2
        data.columns = {"prompt": "source", "completion": "prompt"}
        assert [row.answer for row in read(data).rows] == ["p0", "p2"]
        data = Data(path=str(file), where={"source": "imdb"}, prompt="{source}?", answer="{label}", eval_fraction=0)
        assert [row.answer for row in read(data).rows] == ["1"]


def test_eval_rows_are_selected_too(tmp_path):
    for name in ("train", "test"):
        rows = [{**row, "prompt": f"{name} {row['prompt']}"} for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, other = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    found = read(Data(path=path, eval_path=other, where={"source": "rotten_tomatoes"}))
    assert [row.messages[0]["content"] for row in found.rows] == ["train p0", "train p2", "test p0", "test p2"]
    assert found.is_eval == [False, False, True, True]
    assert found.ledger.left_out[where.LEFT_OUT] == 4


def test_max_rows_counts_the_selected_rows(tmp_path):
    found = read(Data(path=str(files(tmp_path)[2]), where={"label": "1"}, max_rows=1, eval_fraction=0))
    assert [row.messages[0]["content"] for row in found.rows] == ["p1"]
