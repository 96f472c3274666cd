"""Report on a sweep from its files, at any moment.

lora-ft report sweep=runs/2026-11-24_10-15-00-123456

    #  job   r  lr      loss    ppl  tokens/s ...      and report.md, report.html, report.json, PNG files in the folder
       base            3.3066  27.29
    1  3     8  0.0005 2.3366  10.35      260
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from lora_ft import config
from lora_ft.cli import entry
from lora_ft.sweeps import report, terminal


def main(cfg: config.ReportRun, invocation: entry.Invocation) -> None:
    """Print the tables, write the reports and print their paths; ConfigError if `sweep` is not a sweep folder."""
    written = report.write(Path(cfg.sweep).expanduser(), pictures=True)
    console = Console()
    console.print(terminal.table(written.ranking))
    for path in written.paths:
        console.print(Text(str(path)), soft_wrap=True)


if __name__ == "__main__":
    entry.run("report")
