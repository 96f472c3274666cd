"""Setup of all tests: a plain processor on request, signals that arrive, and figures at the end.

record_property("figure", "190 kills, 0 failures")
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import absl.logging
import pytest

if os.environ.get("LORA_FT_TEST_PLAIN_CPU"):  # before anything imports torch; child processes find it in PYTHONPATH
    _plain_cpu = Path(__file__).parent / "plain_cpu"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_plain_cpu), os.environ.get("PYTHONPATH")]))
    runpy.run_path(str(_plain_cpu / "sitecustomize.py"))

# The files that take longest start first: a process works off whole files, and the last one decides the end.
LONGEST = ("test_faults", "test_sweep", "test_readme", "test_training", "test_hub", "test_python_api", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_configure() -> None:
    # A shell starts what runs in the background with SIGINT ignored, which the commands under test would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # absl, which rouge_score and tensorboard import, closes the stderr that it found when Hydra sets up logging: in a
    # test that would be the file that pytest captures into.
    absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    if figures := [value for report in reports for name, value in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(str(figure))
