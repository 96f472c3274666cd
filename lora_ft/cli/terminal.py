"""Write a page of rich to the terminal or into a pipe. No torch here."""

import sys

from rich.console import Console, RenderableType


def write(content: RenderableType, most_columns: int | None = None, piped_columns: int | None = None) -> None:
    """Write a page to stdout, without spaces at the ends of lines, in the encoding of stdout.

    most_columns: width that a wider terminal does not use. piped_columns: width if stdout is not a terminal.
    """
    console = Console()
    if not console.is_terminal and piped_columns:
        console.width = piped_columns
    if most_columns:
        console.width = min(console.width, most_columns)
    with console.capture() as shown:
        console.print(content)
    for line in shown.get().splitlines():  # rich pads lines with spaces
        sys.stdout.write(line.rstrip().encode(console.encoding, "replace").decode(console.encoding) + "\n")
    sys.stdout.flush()  # before errors on stderr
