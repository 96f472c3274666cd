"""The table of known failures: it is current, and every `closes` mark names a failure."""

from collections import Counter
from pathlib import Path

import catalogue
import pytest


def test_catalogue_table_is_current() -> None:
    assert catalogue.TABLE.read_text("utf-8") == catalogue.table(catalogue.closed_by()), "run make catalogue"


def test_every_failure_has_a_row() -> None:
    sizes = Counter(number[0] for number in catalogue.FAILURES)
    assert sizes == {"A": 26, "B": 8, "C": 11, "D": 9, "E": 7, "F": 9, "G": 5}
    rows = [
        line.split(" | ") for line in catalogue.table({"A02": ["`test_a.py::test_b`"]}).splitlines() if "| " in line
    ]
    cells = {row[0].removeprefix("| "): row[2] for row in rows if len(row) == 3}
    assert cells.pop("ID") == "tests |"
    assert cells.keys() == catalogue.FAILURES.keys()
    assert {number for number, tests in cells.items() if tests != "none |"} == {"A02"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('@pytest.mark.closes("A99")\ndef test_one(): ...', r"test_x\.py:1: unknown failure: 'A99'"),
        ("@pytest.mark.closes()\ndef test_one(): ...", r"unknown failure: pytest\.mark\.closes"),
        ("@pytest.mark.closes(A01)\ndef test_one(): ...", "unknown failure: A01"),
        ('@pytest.mark.closes("A01")\ndef helps(): ...', "closes must be a decorator of a test function"),
        ('pytestmark = pytest.mark.closes("A01")', "closes must be a decorator of a test function"),
    ],
)
def test_invalid_closes_marks_are_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        catalogue.closed_by(tmp_path)


def test_closes_marks_are_found_in_subfolders_and_beside_other_marks(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    above = '@pytest.mark.parametrize("a", [1])\n@pytest.mark.closes("A01", "B02")\n@pytest.mark.nightly\n'
    (tmp_path / "inside" / "test_x.py").write_text(f"{above}def test_one(a): ...\n")
    (tmp_path / "test_y.py").write_text('@pytest.mark.closes("A01")\ndef test_two(): ...\n')
    tests = ["`inside/test_x.py::test_one` (nightly)", "`test_y.py::test_two`"]
    assert catalogue.closed_by(tmp_path) == {"A01": tests, "B02": tests[:1]}
