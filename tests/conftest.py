"""Figures that tests measure, shown at the end: `record_property("figure", "190 kills, 0 failures")`."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    if figures := [value for report in reports for name, value in report.user_properties if name == "figure"]:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(str(figure))
