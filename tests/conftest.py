"""Setup of all tests: a simulated CPU without AVX-512 on request, default handling of signals, and a list of figures.

record_property("figure", "190 kills, 0 failures")     # printed in the section "figures" at the end
"""

import gc
import os
import runpy
import signal
import sys
from pathlib import Path

import absl.logging
import pytest

if os.environ.get("LORA_FT_TEST_PLAIN_CPU"):  # before any import of torch; child processes get PYTHONPATH
    _plain_cpu = Path(__file__).parent / "plain_cpu"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_plain_cpu), os.environ.get("PYTHONPATH")]))
    runpy.run_path(str(_plain_cpu / "sitecustomize.py"))

# The slowest files start first: with -n, each process runs whole files, and a slow one at the end delays all.
LONGEST = ("test_faults", "test_sweep", "test_docs", "test_gpu_benchmark", "test_training", "test_hub",
           "test_python_api", "test_train")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    # Each full collection would look at 500,000 objects of imported modules: an eighth of the time of the tests.
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, which the tested commands would inherit.
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)
    # absl, imported by rouge_score and tensorboard, closes its stderr when Hydra configures logging. In a test that
    # would be pytest's capture file.
    absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    if figures := [value for report in reports for name, value in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(str(figure))
