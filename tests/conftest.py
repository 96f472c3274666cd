"""What holds for all tests: signals arrive, and figures are shown at the end.

record_property("figure", "190 kills, 0 failures")
"""

import signal

import pytest


def pytest_configure() -> None:
    # A shell starts what runs in the background with SIGINT ignored, which the commands under test would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    if figures := [value for report in reports for name, value in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(str(figure))
