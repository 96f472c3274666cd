"""`lora-ft COMMAND key=value ...` and `python -m lora_ft COMMAND key=value ...`."""

from typing import NoReturn

from lora_ft.cli import entry


def main() -> NoReturn:
    entry.run()


if __name__ == "__main__":
    main()
