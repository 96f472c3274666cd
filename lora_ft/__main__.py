"""`lora-ft VERB key=value ...` and `python -m lora_ft VERB key=value ...`."""

from typing import NoReturn

from lora_ft.cli import entry


def main() -> NoReturn:
    entry.run()


if __name__ == "__main__":
    main()
